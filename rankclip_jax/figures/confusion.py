"""Confusion matrices."""

from collections.abc import Mapping

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from rankclip_jax.figures.words import literal, printable

_ON_LIGHT = "#121212"  # the cells stay light on a dark page, where black would become white
_LETTERS = 24  # of a class's name
_MOST = 40  # rows or columns, so that each has its name


def confusion(matrices: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Confusion matrices side by side, in per cent of each row; only rows and columns with something in them. Of more
    than 40, those that are confused most.

    Colours go by the square root, so that a few per cent are seen.

    Args:
      matrices: name -> {"classes": (C,) str, "confusion": (C, C) int, [label, class that came first]}, as
        WORKDIR/eval/zero_shot_NAME.npz holds them.
    """
    shown = {}
    for name, arrays in matrices.items():
        counts_CxC = arrays["confusion"]
        rows, columns = shown_classes(counts_CxC)
        percent = 100 * counts_CxC[rows] / counts_CxC[rows].sum(axis=1, keepdims=True)
        classes = [_short(str(label)) for label in arrays["classes"]]
        shown[name] = percent[:, columns], [classes[i] for i in rows], [classes[i] for i in columns]
    widths = [max(len(columns), 4) for _, _, columns in shown.values()]
    tallest = max(len(rows) for _, rows, _ in shown.values())
    cell = min(0.42, 7 / max(tallest, max(widths)))  # inches
    size = (sum(widths) * cell + 2.0 * len(shown), max(tallest * cell, 1.5) + 2.4)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(shown), width_ratios=widths))
    for axes, (name, (percent_RxC, rows, columns)) in zip(panels, shown.items(), strict=True):
        axes.imshow(percent_RxC, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation_stage="data")
        upwards = dict(rotation=90, ha="right", va="center", rotation_mode="anchor", fontsize=8)
        axes.set_xticks(range(len(columns)), columns, **upwards)
        axes.set_yticks(range(len(rows)), rows, fontsize=8)
        if cell > 0.3:
            for (row, column), value in np.ndenumerate(percent_RxC):
                if value >= 0.5:
                    ink = "white" if value > 35 else _ON_LIGHT
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
        axes.set(xlabel="the class it was taken for", ylabel="the class it is", title=printable(name))
    return literal(figure)


def shown_classes(counts_CxC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the classes in the rows and in the columns of `confusion`."""
    rows = np.flatnonzero(counts_CxC.sum(axis=1))
    columns = np.concatenate([rows, np.setdiff1d(np.flatnonzero(counts_CxC.sum(axis=0)), rows)])
    if len(columns) <= _MOST:
        return rows, columns
    wrong_CxC = counts_CxC * ~np.eye(len(counts_CxC), dtype=bool)
    pairs = np.argsort(-wrong_CxC, axis=None, kind="stable")[:_MOST]
    worst = np.array(np.unravel_index(pairs, wrong_CxC.shape)).T.ravel()
    kept = list(dict.fromkeys([*worst[np.repeat(wrong_CxC.ravel()[pairs] > 0, 2)], *rows]))[:_MOST]
    kept = [number for number in columns if number in kept]
    return np.array([number for number in kept if number in rows], int), np.array(kept, int)


def _short(name):
    return printable(name if len(name) <= _LETTERS else name[: _LETTERS - 1] + "…")
