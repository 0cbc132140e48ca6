"""Numbers over the steps: the curves of runs, single charts, and means with their intervals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.figures.words import literal, printable

MOST_POINTS = 400  # of a line


class Line(NamedTuple):
    """(step, value) in the order of the steps, and the number of the run that they are of."""

    points: Sequence[tuple[float, float]]
    run: int = 0
    dashed: bool = False


def colour(number: int) -> str:
    """Of the run, or whatever is compared, of this number; #rrggbb."""
    return to_hex(f"C{number % 10}")


def curves(workdirs: Mapping[str, str | Path]) -> Figure:
    """Loss, zero-shot accuracy and, where it was measured, rank agreement over the steps.

    Args:
      workdirs: name -> workdir. What is not there yet is not drawn, so that a run can be watched.
    """
    runs = {name: read_metrics(workdir) for name, workdir in workdirs.items()}
    keys = list(dict.fromkeys(key for rows in runs.values() for row in rows for key in row))
    tops = [key for key in keys if key.startswith("zero_shot/") and key.endswith("/top1")]
    ranks = [key for key in keys if key.startswith(("geometry/", "val/")) and key.endswith("spearman_in_modal")]
    figure = Figure(figsize=(15 if ranks else 11, 4), dpi=120, layout="constrained")
    loss, top, *rank = figure.subplots(1, 3 if ranks else 2)
    for number, (name, rows) in enumerate(runs.items()):
        own = dict(color=colour(number)) if len(runs) > 1 else {}

        def line(axes, key, label, factor=1.0, rows=rows, name=name, own=own, **style):
            points = [(row["step"], factor * row[key]) for row in rows if key in row]
            if points:
                label = f"{name}, {label}" if len(runs) > 1 else label
                axes.plot(*zip(*_thinned(points), strict=True), label=printable(label), **own, **style)

        if len(runs) == 1:  # beside each other, two totals of different terms would be compared in vain
            line(loss, "loss", "total", alpha=0.5)
        line(loss, "clip", "CLIP term" if len(runs) == 1 else "training")
        line(loss, "val/clip", "CLIP term, validation" if len(runs) == 1 else "validation", marker="o", linestyle="--")
        for place, key in enumerate(tops):
            line(top, key, key.split("/")[1], 100, marker="os^Dv"[place % 5], linestyle=("-", "--", ":")[place % 3])
        for key in ranks:
            line(rank[0], key, key.split("/")[1] if key.startswith("geometry/") else "validation", marker="o")
    loss.set(xlabel="step", ylabel="loss (nats)", title="Loss" if len(runs) == 1 else "CLIP term")
    top.set(xlabel="step", ylabel="top-1 (%)", title="Zero-shot accuracy", ylim=(0, 102))
    for axes in rank:
        axes.set(xlabel="step", ylabel="Spearman", title="Do image-image and text-text rankings agree?")
    for axes in (loss, top, *rank):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(handles=list(axes.lines), fontsize=9)
    return literal(figure)


def chart(lines: Sequence[Line], percent: bool = False) -> Figure:
    """One metric, small, without a title: each line in its run's colour. percent: the values are shares."""
    figure = Figure(figsize=(3.8, 2.2), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        alone: dict[str, Any] = dict(marker="o", markersize=4) if len(line.points) == 1 else {}
        style: dict[str, Any] = dict(color=colour(line.run), linewidth=1.4, linestyle="--" if line.dashed else "-")
        axes.plot(*zip(*_thinned(line.points), strict=True), **style, **alone)
    axes.set_xlim(0, 1.02 * max(1, *(step for line in lines for step, _ in line.points)))
    axes.set_xlabel("step", fontsize=8)
    plain(axes, percent)
    axes.locator_params(axis="x", integer=True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return literal(figure)


def plain(axes: Axes, percent: bool = False) -> None:
    """Few, round ticks, in small letters; no frame. percent: the values are shares."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=(1, 2, 2.5, 5, 10)))
        axis.get_offset_text().set_fontsize(8)
    if percent:
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g} %")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def bands(panels: Mapping[str, Mapping[str, tuple[Sequence[float], np.ndarray, np.ndarray]]]) -> Figure:
    """A panel a metric: a line for what is compared, and a band around it.

    Args:
      panels: title -> name -> (steps, means, half widths), (T,) each.
    """
    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure = Figure(figsize=(4.2 * columns, 3 * rows), dpi=75, layout="constrained")
    axes_RxC = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, named) in zip(axes_RxC.flat, panels.items(), strict=False):
        for number, (name, (steps, mean_T, half_T)) in enumerate(named.items()):
            style = dict(color=colour(number), linestyle="-" if number < 10 else "--")
            axes.plot(steps, mean_T, label=printable(name), linewidth=1.4, **style)
            axes.fill_between(steps, mean_T - half_T, mean_T + half_T, alpha=0.12, linewidth=0, color=colour(number))
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    for axes in axes_RxC.flat[len(panels) :]:
        axes.set_axis_off()
    figure.legend(handles=list(axes_RxC.flat[0].lines), loc="outside lower center", ncols=5, fontsize=8)
    return literal(figure)


def _thinned(points):
    """At most MOST_POINTS: of equal parts of the line the lowest and the highest point, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    values, kept = np.array([value for _, value in points]), {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), MOST_POINTS // 2 - 1):
        kept |= {part[values[part].argmin()], part[values[part].argmax()]}
    return [points[i] for i in sorted(kept)]
