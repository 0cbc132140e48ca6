"""Captions in rows: every token is there once, in its caption's order; first fit by falling length, as in books."""

import numpy as np
import pytest

from benchmarks.train_contenders import CC3M
from rankclip_jax.common import packing

EOT = 63
# Words a caption of CC3M has, roughly, with the two marks.
TYPICAL = np.clip(np.round(np.random.default_rng(1).normal(13, 5.6, 4096)).astype(int), 4, 75) + 2


def captions(n, length, rng):
    """Tokens of given lengths (..., L); a length of 0 has no end of text."""
    tokens = np.zeros((*n.shape, length), np.int32)
    for at, size in np.ndenumerate(n):
        tokens[at][: size or length] = rng.integers(1, EOT, size or length)
        if size:
            tokens[at][size - 1] = EOT
    return tokens


def first_fit(n, rows, length):
    """The textbook's loop, a unit at a time -> starts, or None."""
    used, starts = [0] * rows, [0] * len(n)
    for b in sorted(range(len(n)), key=lambda b: -n[b]):
        row = next((r for r in range(rows) if used[r] + n[b] <= length), None)
        if row is None:
            return None
        starts[b], used[row] = row * length + used[row], used[row] + n[b]
    return starts


@pytest.mark.parametrize("seed", range(60))
def test_as_the_textbook_has_it_and_nothing_is_lost(seed):
    rng = np.random.default_rng(seed)
    units, c, length = rng.integers(1, 5), rng.integers(1, 30), rng.integers(2, 20)
    tokens = captions(rng.integers(0, length + 1, (units, c)), length, rng)
    n = packing.lengths(tokens, EOT)
    np.testing.assert_array_equal(n, [[1 + max(0, list(t).index(EOT) if EOT in t else 0) for t in u] for u in tokens])
    rows = rng.integers(1, c + 1)
    expected = [first_fit(list(unit), rows, length) for unit in n]
    packed = packing.pack(tokens, n, rows)
    assert (packed is None) == (None in expected)
    if packed is None:
        return
    np.testing.assert_array_equal(packed.ends, np.array(expected) + n - 1)
    for unit in range(units):
        flat, places = packed.tokens[unit].ravel(), packed.positions[unit].ravel()
        for b, end in enumerate(packed.ends[unit]):
            at = slice(end - n[unit, b] + 1, end + 1)
            np.testing.assert_array_equal(flat[at], tokens[unit, b, : n[unit, b]])
            np.testing.assert_array_equal(places[at], np.arange(n[unit, b]))
            flat[at] = places[at] = 0
        assert not flat.any() and not places.any()


def test_extremes():
    rng = np.random.default_rng(0)
    for size in (1, 2, 77):
        n = np.full((2, 40), size)
        tokens = captions(n, 77, rng)
        rows = -(-40 // (77 // size))
        assert packing.pack(tokens, n, rows) is not None and packing.pack(tokens, n, rows - 1) is None
        assert packing.rows_for(n.ravel(), 40, 8, 77) == rows  # which nothing spreads


@pytest.mark.parametrize("c, units", [(8, 1), (16, 1), (32, 8), (64, 64), (512, 256)])
def test_few_batches_overflow_and_little_is_left_empty(c, units):
    rows = packing.rows_for(TYPICAL, c, units, 77)
    drawn = np.random.default_rng(5).choice(TYPICAL, (2**20 // c, c))
    needed = np.ceil((packing._first_fit(drawn, c, 77) + drawn).max(axis=1) / 77)
    assert units * (needed > rows).mean() < 2e-3
    assert rows <= needed.mean() * 1.1 + 2 and packing.worthwhile(rows, c)


def test_rows_hold_what_999_of_1000_batches_need_however_skewed_the_lengths():
    # The short ones of a batch share a row, a long one takes its own: 3 of 1,000 batches have three of those.
    assert packing.rows_for(np.repeat([8, 77], [96, 4]), 8, 1, 77) == 4
    assert packing.rows_for(np.repeat(*np.array(list(CC3M.items())).T), 8, 1, 77) == 2


def test_what_saves_less_than_a_tenth_is_not_worthwhile():
    assert packing.worthwhile(90, 100) and not packing.worthwhile(91, 100)
    assert packing.rows_for(np.full(100, 70), 64, 1, 77) == 64 and packing.scaled((9, 32), 16) == 5
    assert packing.scaled((9, 10), 1) == 1


@pytest.mark.parametrize("seed", range(20))
def test_texts_of_any_number_are_taken_in_order_until_no_more_fit(seed):
    rng = np.random.default_rng(seed)
    units, most, rows, length = rng.integers(1, 5), rng.integers(1, 20), rng.integers(1, 9), 10
    n = rng.integers(1, length + 1, rng.integers(1, 200))
    tokens = captions(n, length, rng)
    done = 0
    while done < len(n):
        packed, (unit, nth) = packing.fill(tokens[done:], n[done:], units, most, rows)
        assert packed.ends.shape == (units, most) and packed.tokens.shape == (units, rows, length)
        assert len(unit) >= min(len(n) - done, units * min(rows, most))  # never fewer than padded
        last = packed.tokens.reshape(units, -1)[unit, packed.ends[unit, nth]]
        np.testing.assert_array_equal(last, EOT)
        first = packed.tokens.reshape(units, -1)[unit, packed.ends[unit, nth] - n[done : done + len(unit)] + 1]
        np.testing.assert_array_equal(first, tokens[done : done + len(unit), 0])
        done += len(unit)
