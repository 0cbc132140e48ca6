"""Which pictures look alike: those that a comparison of all pairs finds."""

import numpy as np
import pytest
from PIL import Image

from input_pipeline import duplicates
from rankclip_jax.common.errors import InputError
from tests.input_pipeline.test_filtering import encoded, photograph


def test_alike_is_what_a_comparison_of_all_pairs_finds():
    rng = np.random.default_rng(0)
    rows = 600
    looks, given = duplicates.Looks(rows), []
    for row in range(rows):
        if row % 3 and given and rng.random() < 0.9:  # an earlier one, a little changed
            content, bits, colours = given[rng.integers(len(given))]
            bits ^= sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 9), replace=False))
            colours = np.clip(colours + rng.integers(-1, 2, 48) * rng.integers(0, 16), 0, 255).astype(np.uint8)
        else:
            bits, colours = int(rng.integers(2**63)) * (row % 5 > 0), rng.integers(0, 256, 48).astype(np.uint8)
        content = row if row % 10 else row // 100
        given.append((content, bits, colours))
        if row % 7:
            looks.add(row, duplicates.Look(*given[-1]))
    copies, alike, seen = np.zeros(rows, bool), np.zeros(rows, bool), set()
    for j in range(rows):
        if j % 7:
            copies[j] = given[j][0] in seen
            seen.add(given[j][0])
            alike[j] = not copies[j] and any(
                i % 7
                and not (copies[i] or alike[i])
                and bin(given[i][1] ^ given[j][1]).count("1") <= 5
                and np.abs(given[i][2].astype(int) - given[j][2]).mean() <= 6
                for i in range(j)
            )
    assert copies.sum() > 30 and alike.sum() > 50
    np.testing.assert_array_equal(looks.copies(), copies)
    np.testing.assert_array_equal(looks.alike(), alike)


@pytest.mark.parametrize("set_bits", [0.0, 0.03, 0.12, 0.5])
def test_alike_compares_each_pair_once_however_few_bits_are_set(set_bits, monkeypatch):
    """Products on white: most cells are even, and those at the edges always are."""
    rng = np.random.default_rng(0)
    rows, looks, compared = 300, duplicates.Looks(300), []
    same = duplicates.Looks._same
    monkeypatch.setattr(duplicates, "_ROWS", 7)
    monkeypatch.setattr(duplicates, "_NEIGHBOURS", 16)
    count = lambda self, a, b: compared.extend(map(frozenset, zip(a.tolist(), b.tolist(), strict=True)))  # noqa: E731
    monkeypatch.setattr(duplicates.Looks, "_same", lambda self, a, b: count(self, a, b) or same(self, a, b))
    inside = np.arange(64) % 8 % 7 > 0
    bits = np.packbits((rng.random((rows, 64)) < set_bits) & inside, axis=1).view(np.uint64).ravel()
    bits[200:] = bits[:100] ^ np.uint64(2**40 + 2**20)
    colours = np.clip(rng.integers(0, 9, (rows, 1)) + rng.normal(225, 5, (rows, 48)), 0, 255).astype(np.uint8)
    alike = np.zeros(rows, bool)
    for row in range(rows):
        looks.add(row, duplicates.Look(row, int(bits[row]), colours[row]))
        near = (np.bitwise_count(bits[:row] ^ bits[row]) <= 5) & ~alike[:row]
        alike[row] = (near & (np.abs(colours[:row].astype(int) - colours[row]).sum(axis=1) <= 6 * 48)).any()
    assert 10 < alike.sum() < 295
    np.testing.assert_array_equal(looks.alike(), alike)
    assert len(compared) == len(set(compared)) <= np.sum(np.bitwise_count(bits[:, None] ^ bits) <= 5) // 2
    assert duplicates.Looks(3).alike().tolist() == [False] * 3


def test_a_look_survives_size_and_quality_and_differs_otherwise():
    def differ(a, b):
        a, b = map(duplicates.look, (a, b))
        return (a.bits ^ b.bits).bit_count(), np.abs(a.colours.astype(int) - b.colours).mean()

    for seed in range(10):
        original = photograph(seed, (400, 300))
        data = encoded(original, format="JPEG", quality=95)
        for changed in (
            encoded(original, format="PNG"),
            encoded(original, format="JPEG", quality=30),
            encoded(original.resize((200, 150)), format="WEBP", quality=60),
        ):
            bits, levels = differ(data, changed)
            assert bits <= 5 and levels <= 6
        bits, levels = differ(data, encoded(photograph(seed + 100, (400, 300)), format="PNG"))
        assert bits > 5 and levels > 6
    bits, levels = differ(*(encoded(Image.new("RGB", (9, 9), (level,) * 3), format="PNG") for level in (100, 110)))
    assert bits == 0 and levels == 10
    pixels = np.asarray(photograph(0))
    assert duplicates.look(pixels).bits == duplicates.look(encoded(photograph(0), format="PNG")).bits
    with pytest.raises(InputError):
        duplicates.look(b"no picture")
