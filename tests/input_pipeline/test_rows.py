"""Rows of a source in order, read ahead by threads."""

from concurrent.futures import ThreadPoolExecutor

import tensorflow as tf

from input_pipeline import rows, sources


def test_rows_come_in_order_with_their_gaps(tmp_path):
    def read(row):
        tf.debugging.Assert(row % 3 != 1, ["a reason"])
        return {"image": tf.strings.as_string(row), "caption": "x"}

    source = sources.Source(1000, read, str, lambda: [])
    for numbers in (range(200), range(100, 131), range(0, 1000, 7), range(1, 2), range(4, 100, 3), range(0)):
        got = list(rows.read_rows(source, numbers))
        assert [row.number for row in got] == list(numbers)
        assert all((row.reason is None) == (row.number % 3 != 1) for row in got)
        assert all(row.image == str(row.number).encode() for row in got if row.reason is None)


def test_no_more_items_are_taken_ahead_than_asked():
    taken = []

    def items():
        for i in range(50):
            taken.append(i)
            yield i

    with ThreadPoolExecutor(2) as pool:
        for done, result in enumerate(rows.in_order(pool, lambda i: i * i, items(), ahead=5)):
            assert result == done**2 and len(taken) <= done + 5
    assert len(taken) == 50
