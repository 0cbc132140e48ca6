"""Captions laid one behind the other in rows, so that the text tower computes no padding.

Under a causal mask nothing behind the end of a text reaches its embedding. So a row of L tokens can hold several
captions, each attending to itself alone and counting its positions from 0, and the embeddings are those of a row each.
A unit is what one device packs on its own: its share of a batch, or of a part of it where gradients are accumulated.
"""

import math
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

_OVERFLOWS = 1e-3  # share of the batches that rows_for lets overflow
_WORTH = 0.9  # config.model.pack_text=auto packs where this share of the tokens, or less, remains


class Packed(NamedTuple):
    """c captions in each of U units, in R rows of L tokens; int32 of NumPy or JAX.

    Attributes:
      tokens: (U, R, L), 0 where there is no caption.
      positions: (U, R, L), a token's place in its caption; 0 where there is none. A token attends to so many before it.
      ends: (U, c), where each caption's end of text lies in its unit's R * L tokens.
    """

    tokens: Any
    positions: Any
    ends: Any


def lengths(tokens: np.ndarray, eot_id: int) -> np.ndarray:
    """Tokens (..., L) up to the first end of text, which the tower pools: int (...). 1 without one, as the tower has
    it."""
    return np.argmax(tokens == eot_id, axis=-1) + 1


def pack(tokens_UxcxL: np.ndarray, n_Uxc: np.ndarray, rows: int) -> Packed | None:
    """Packs each unit's captions, of n tokens, in `rows` rows; None where those of a unit do not fit."""
    units, _, length = tokens_UxcxL.shape
    starts_Uxc = _first_fit(n_Uxc, rows, length)
    if starts_Uxc is None:
        return None
    n_N = n_Uxc.ravel()
    within_T = np.arange(n_N.sum()) - np.repeat(np.cumsum(n_N) - n_N, n_N)
    from_T = np.repeat(np.arange(n_N.size) * length, n_N) + within_T
    to_T = np.repeat((starts_Uxc + np.arange(units)[:, None] * rows * length).ravel(), n_N) + within_T
    ends_Uxc = np.maximum(starts_Uxc + n_Uxc - 1, 0).astype(np.int32)
    tokens, positions = np.zeros((2, units, rows, length), np.int32)
    packed = Packed(tokens, positions, ends_Uxc)
    packed.tokens.reshape(-1)[to_T] = tokens_UxcxL.reshape(-1)[from_T]
    packed.positions.reshape(-1)[to_T] = within_T
    return packed


def _first_fit(n_Uxc: np.ndarray, rows: int, length: int) -> np.ndarray | None:
    """Each caption, the longest first, in the first row with room -> starts in the unit's rows * length tokens, int
    (U, c). None: not all fit.

    Captions of one length at a time, of all units: they fill the rows in order, as many as each has room for.
    """
    units, captions = n_Uxc.shape
    used_UxR = np.zeros((units, rows), np.int64)
    start_N = np.zeros(units * captions, np.int64)
    order_N = np.argsort(-n_Uxc.ravel(), kind="stable")  # by length, then unit, then caption
    sizes, firsts = np.unique(-n_Uxc.ravel()[order_N], return_index=True)
    for size, first, after in zip(-sizes, firsts, [*firsts[1:], len(order_N)], strict=True):
        if not size:
            break  # what fills up a unit
        some = order_N[first:after]
        count_U = np.bincount(some // captions, minlength=units)
        room_UxR = (length - used_UxR) // size
        before_UxR = np.cumsum(room_UxR, axis=1) - room_UxR
        here_UxR = np.clip(count_U[:, None] - before_UxR, 0, room_UxR)
        here = here_UxR.ravel()
        if here.sum() < len(some):
            return None
        nth = np.arange(len(some)) - np.repeat(np.cumsum(here) - here, here)  # number in its row
        row_start = (np.arange(rows) * length + used_UxR).ravel()
        start_N[some] = np.repeat(row_start, here) + nth * size
        used_UxR += here_UxR * size
    return start_N.reshape(n_Uxc.shape)


def fill(
    tokens_NxL: np.ndarray, n_N: np.ndarray, units: int, captions: int, rows: int
) -> tuple[Packed, tuple[np.ndarray, np.ndarray]]:
    """Packs as many of the first captions as fit, at most `captions` a unit -> (Packed, (unit, caption) of each)."""
    length = tokens_NxL.shape[1]
    count = min(len(n_N), units * captions, int(np.searchsorted(np.cumsum(n_N), units * rows * length, "right")))
    while True:
        share = -(-count // units)
        where = np.divmod(np.arange(count), share)
        tokens_UxcxL = np.zeros((units, captions, length), np.int32)
        n_Uxc = np.zeros((units, captions), np.int64)
        tokens_UxcxL[where], n_Uxc[where] = tokens_NxL[:count], n_N[:count]
        packed = pack(tokens_UxcxL, n_Uxc, rows)
        if packed is not None:
            return packed, where
        count = max(count * 9 // 10, min(count - 1, units * rows))  # a row for each always fits


def rows_for(lengths_N: np.ndarray, captions: int, units: int, length: int) -> int:
    """Rows of `length` tokens in which a unit's captions fit, of lengths as those seen, for all but one in a thousand
    batches of `units` units.

    Units are drawn from the lengths and packed; of the last row only what is filled counts. The larger of two
    estimates: a normal distribution's, wider because the lengths are only a sample, and the draws', perhaps skewed.
    """
    draws = max(16, min(2**14, 2**18 // captions))
    drawn_Dxc = np.random.default_rng(0).choice(np.minimum(lengths_N, length), (draws, captions))
    enough = min(captions, 2 * -(-int(drawn_Dxc.sum(axis=1).max()) // length) + 1)  # two neighbours fill more than one
    starts_Dxc = _first_fit(drawn_Dxc, enough, length)
    assert starts_Dxc is not None
    needed_D, fit = (starts_Dxc + drawn_Dxc).max(axis=1) / length, 1 - _OVERFLOWS / units
    normal = needed_D.mean() + NormalDist().inv_cdf(fit) * needed_D.std() * math.sqrt(1 + captions / len(lengths_N))
    return min(captions, math.ceil(max(normal, np.quantile(needed_D, fit, method="higher"))))


def worthwhile(rows: int, captions: int) -> bool:
    """Whether packing saves a tenth of the tokens or more."""
    return rows <= _WORTH * captions


def scaled(rows_and_captions: tuple[int, int], captions: int) -> int:
    """Rows for another number of captions, in proportion."""
    rows, of = rows_and_captions
    return min(captions, -(-rows * captions // of))
