"""Pictures that come again: with the same bytes, or looking the same at another size or quality.

A look is a dHash (64 bits: whether each cell of a 9 x 8 thumbnail is brighter than its left neighbour) and a 4 x 4
thumbnail in colour. Two pictures look the same if at most 5 bits and on average 6 of 255 levels differ.
"""

import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from PIL import Image

from rankclip_jax.common import pictures

_BITS, _LEVELS = 5, 6  # of what looks the same: bits that differ at most, and levels on average
_BRIGHTER = 2  # levels: less is the noise of a JPEG in an even area
_CELLS = 4 * 4 * 3


class Look(NamedTuple):
    """Attributes: content: 64 bits of BLAKE2b of the bytes; bits: the dHash; colours: uint8 (48,)."""

    content: int
    bits: int
    colours: np.ndarray


def look(picture: bytes | np.ndarray) -> Look:
    """The look of encoded bytes, or of uint8 pixels (H, W, 3). Raises BadImageError as common/pictures.py does."""
    data = picture if isinstance(picture, bytes) else picture.tobytes()
    with pictures.opened(picture) as image:
        image.draft(None, (72, 64))  # a JPEG is decoded at a smaller size, which is cheaper
        small = pictures.rgb(image)
        grey_8x9 = np.asarray(small.convert("L").resize((9, 8), Image.Resampling.BOX), np.int16)
        colours = np.asarray(small.resize((4, 4), Image.Resampling.BOX)).ravel()
    bits = np.packbits(np.diff(grey_8x9, axis=1) >= _BRIGHTER)
    content = hashlib.blake2b(data, digest_size=8).digest()
    return Look(int.from_bytes(content), int.from_bytes(bits.tobytes()), colours)


class Looks:
    """The looks of up to `rows` rows; those that were not added are no duplicates of anything."""

    def __init__(self, rows: int):
        self._there_N = np.zeros(rows, bool)
        self._content_N, self._bits_N = np.zeros(rows, np.uint64), np.zeros(rows, np.uint64)
        self._colours_NxC = np.zeros((rows, _CELLS), np.uint8)

    def add(self, row: int, one: Look) -> None:
        self._there_N[row] = True
        self._content_N[row], self._bits_N[row], self._colours_NxC[row] = one

    def copies(self) -> np.ndarray:
        """bool (rows,): rows whose bytes came before."""
        return _came_before(self._content_N, np.flatnonzero(self._there_N))

    def alike(self) -> np.ndarray:
        """bool (rows,): rows that are no copies and look like an earlier row that is neither itself."""
        rows_M = np.flatnonzero(self._there_N & ~self.copies())
        looks_Mx = np.column_stack([self._bits_N[rows_M].view(np.uint8).reshape(-1, 8), self._colours_NxC[rows_M]])
        _, exactly_M = np.unique(looks_Mx, axis=0, return_inverse=True)  # such as one placeholder in many files
        found_N = np.zeros(len(self._there_N), bool)
        found_N[rows_M] = _came_before(exactly_M.ravel(), np.arange(len(rows_M)))
        for first, second in self._pairs(rows_M[~found_N[rows_M]]):
            found_N[second] |= not found_N[first]  # in order, so that it is settled whether `first` stays
        return found_N

    def _pairs(self, rows_M):
        """(first, second), first < second, of all that look the same, by the second.

        If 64 bits in 6 groups differ in 5, one group is the same. Of rows that have it, sorted by brightness, only
        neighbours can have the same colours.
        """
        brightness_M = self._colours_NxC[rows_M].mean(axis=1)
        found = [np.zeros((0, 2), np.int64)]
        edges = np.linspace(0, 64, _BITS + 2).astype(int).tolist()
        for begin, end in itertools.pairwise(edges):
            bits_M = self._bits_N[rows_M] >> np.uint64(begin) & np.uint64(2 ** (end - begin) - 1)
            order_M = np.lexsort((brightness_M, bits_M))
            i = np.arange(len(rows_M))
            for step in itertools.count(1):
                i = i[i + step < len(rows_M)]
                a, b = order_M[i], order_M[i + step]
                near = (bits_M[a] == bits_M[b]) & (brightness_M[b] - brightness_M[a] <= _LEVELS)
                i = i[near]
                if not len(i):
                    break
                found.append(self._same(np.sort(rows_M[np.column_stack([a, b])[near]], axis=1)))
        pairs = np.unique(np.concatenate(found), axis=0)
        return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist()

    def _same(self, pairs_Px2):
        first_P, second_P = pairs_Px2.T
        same = np.bitwise_count(self._bits_N[first_P] ^ self._bits_N[second_P]) <= _BITS
        pairs_Px2 = pairs_Px2[same]
        colours_2xPxC = self._colours_NxC[pairs_Px2.T].astype(np.int16)
        return pairs_Px2[np.abs(colours_2xPxC[0] - colours_2xPxC[1]).mean(axis=1) <= _LEVELS]


def _came_before(values_N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """bool (N,): those of `rows`, in order, whose value an earlier one of them has."""
    found_N = np.zeros(len(values_N), bool)
    found_N[rows] = True
    found_N[rows[np.unique(values_N[rows], return_index=True)[1]]] = False
    return found_N
