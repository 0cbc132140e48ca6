"""Pictures that come again: with the same bytes, or looking the same at another size or quality.

A look is a dHash (64 bits: whether each cell of a 9 x 8 thumbnail is brighter than its left neighbour) and a 4 x 4
thumbnail in colour. Two pictures look the same if at most 5 bits and on average 6 of 255 levels differ.
"""

import hashlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from rankclip_jax.common import pictures
from rankclip_jax.common.progress import progress

_BITS, _LEVELS = 5, 6  # of what looks the same: bits that differ at most, and levels on average
_BRIGHTER = 2  # levels: less is the noise of a JPEG in an even area
_CELLS = 4 * 4 * 3
_ROWS, _NEIGHBOURS = 64, 16_384  # that are compared at once


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
        neighbours can have the same colours: they are compared as blocks, which lie in the cache.
        """
        light_M = self._colours_NxC[rows_M].sum(axis=1, dtype=np.int64)
        found, groups = [np.zeros((0, 2), np.int64)], _groups(self._bits_N[rows_M])
        with progress("find alike", len(groups) * len(rows_M), unit="looks") as bar:
            for number, group in enumerate(groups):
                order_M = np.lexsort((light_M, self._bits_N[rows_M] & group))
                sorted_M = rows_M[order_M]
                bits_M = self._bits_N[sorted_M]
                run_M = np.cumsum(np.diff(bits_M & group, prepend=bits_M[:1] & group) != 0)
                place_M = run_M * 2**15 + light_M[order_M]  # 2**15: more than the brightness of any two rows
                end_M = np.searchsorted(place_M, place_M + _CELLS * _LEVELS, side="right")
                for i in range(0, len(rows_M), _ROWS):
                    some, end = slice(i, i + _ROWS), end_M[i : i + _ROWS][-1]
                    for j in range(i, end, _NEIGHBOURS):
                        others = slice(j, min(j + _NEIGHBOURS, end))
                        differ = (bits_M[some, None] ^ bits_M[others]).ravel()
                        close_P = np.flatnonzero(np.bitwise_count(differ) <= _BITS)
                        same_GxP = (differ[close_P] & np.array(groups[: number + 1])[:, None]) == 0
                        close_P = close_P[same_GxP[-1] & ~same_GxP[:-1].any(axis=0)]  # each pair in one group
                        a_P, b_P = np.divmod(close_P, others.stop - j) + np.array([[i], [j]])
                        found.append(self._same(sorted_M[a_P[a_P < b_P]], sorted_M[b_P[a_P < b_P]]))
                    bar.update(len(bits_M[some]))
        pairs = np.concatenate(found)
        return pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist()

    def _same(self, a_P, b_P):
        """(first, second) of those rows that have the same colours."""
        for step in (3, 1):  # the reds alone tell most apart, at a third of the cost
            colours_NxC = self._colours_NxC[:, ::step]
            differ_PxC = np.abs(colours_NxC[a_P].astype(np.int16) - colours_NxC[b_P])
            same = differ_PxC.sum(axis=1) <= _CELLS * _LEVELS
            a_P, b_P = a_P[same], b_P[same]
        return np.sort(np.column_stack([a_P, b_P]), axis=1)


def _groups(bits_M: np.ndarray) -> list[np.uint64]:
    """Masks of 6 groups of bits. Each gets some that tell most pictures apart: those of a white edge do not."""
    one_64 = [np.uint64(1) << np.uint64(bit) for bit in range(64)]
    telling_64 = [-abs(2 * np.count_nonzero(bits_M & one) - len(bits_M)) for one in one_64]
    order = sorted(range(64), key=telling_64.__getitem__, reverse=True)
    return [np.bitwise_or.reduce([one_64[bit] for bit in order[g :: _BITS + 1]]) for g in range(_BITS + 1)]


def _came_before(values_N: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """bool (N,): those of `rows`, in order, whose value an earlier one of them has."""
    found_N = np.zeros(len(values_N), bool)
    found_N[rows] = True
    found_N[rows[np.unique(values_N[rows], return_index=True)[1]]] = False
    return found_N
