"""The histogram of caption lengths that prepare and --inspect print."""

from collections import Counter

import pytest

from input_pipeline import caption_lengths


def test_every_caption_is_in_a_bar():
    assert caption_lengths.histogram(Counter({3: 2, 5: 8}), "words") == [
        "caption lengths in words, 4.6 on average",
        "             3   20.0%  ##########",
        "             4    0.0%",
        "             5   80.0%  " + 40 * "#",
    ]


@pytest.mark.parametrize("longest", [1, 15, 16, 77, 790, 8_001, 1_000_000])
def test_few_bars_whatever_the_lengths(longest):
    lines = caption_lengths.histogram(Counter({1: 1, longest: 1}), "tokens")
    assert len(lines) <= 17 and sum(float(line.split("%")[0].split()[-1]) for line in lines[1:]) == 100


def test_the_rows_are_those_of_packing():
    # Six captions of 12 tokens lie in a row of 77, so 64 take eleven.
    assert caption_lengths.packed(Counter({12: 500}), 77).endswith("about 11 rows: config.model.pack_rows=(11, 64)")
    assert caption_lengths.packed(Counter({90: 5}), 77).endswith("(64, 64)")  # cut at 77
