"""The index of shards, made by all processes of a run together."""

import functools
import shutil
import threading

import pytest

from input_pipeline.sources import offset_index, tfrecord
from input_pipeline.sources.offset_index import Peers
from tests.input_pipeline.test_index import many, records_of


class Agreed:
    """all_of among threads, each of which stands for a process."""

    def __init__(self, count):
        self._barrier, self._said, self._count = threading.Barrier(count, timeout=60), {}, count

    def of(self, index):
        calls = iter(range(100))

        def all_of(value):
            call = next(calls)
            self._said[call, index] = value
            self._barrier.wait()
            return [self._said[call, one] for one in range(self._count)]

        return all_of


def together(count, work):
    """[work(index, all_of)] of `count` processes at once."""
    agreed, found = Agreed(count), [None] * count

    def run(index):
        found[index] = work(index, agreed.of(index))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("shared", ["beside", "workdir", "nothing"])
def test_each_process_indexes_its_share(shared, tmp_path, scanned):
    paths, right = many(tmp_path, 10)
    scanned.clear()

    def work(index, all_of, count=2):
        cache = None if shared == "beside" else str(tmp_path / f"cache{index}")
        folder = str(tmp_path / ("run" if shared != "nothing" else f"run{index}"))
        found = offset_index.offset_index(tfrecord.kind(), paths, cache, Peers((index, count), folder, all_of))
        return records_of(found)

    assert together(2, work) == [right, right]
    # Where they share nothing each scans the other's half, too.
    assert sorted(scanned) == sorted([f"{n:05}" for n in range(10)] * (2 if shared == "nothing" else 1))
    scanned.clear()
    assert together(2, work) == [right, right] and scanned == []
    # With another number of processes, on machines that have nothing.
    shutil.rmtree(tmp_path / "cache0", ignore_errors=True)
    assert together(3, functools.partial(work, count=3)) == [right] * 3
    assert scanned == [] or shared == "nothing"


def test_what_one_process_knows_alone_it_tells_the_others(tmp_path, scanned):
    paths, right = many(tmp_path, 10)
    offset_index.offset_index(tfrecord.kind(), paths[:7], str(tmp_path / "cache0"))
    scanned.clear()

    def work(index, all_of):
        peers = Peers((index, 2), str(tmp_path / "run"), all_of)
        return records_of(offset_index.offset_index(tfrecord.kind(), paths, str(tmp_path / f"cache{index}"), peers))

    assert together(2, work) == [right, right]
    # Of the even ones the first knows 0 to 6, of the odd ones the second knows none.
    assert sorted(scanned) == ["00001", "00003", "00005", "00007", "00008", "00009"]
