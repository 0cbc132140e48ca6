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
from rankclip_jax.figures.names import metric, split
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
    """The loss and what was measured over the steps: accuracy, retrieval, rank agreement; a panel each.

    Args:
      workdirs: name -> workdir. What is not there yet is not drawn, so that a run can be watched.
    """
    runs = {name: read_metrics(workdir) for name, workdir in workdirs.items()}
    panels = _panels(runs)
    figure = Figure(figsize=(max(5.5, 5 * len(panels)), 4), dpi=120, layout="constrained")
    axes_C = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    for axes, (title, ylabel, keys) in zip(axes_C, panels, strict=False):
        for number, (name, rows) in enumerate(runs.items()):
            own = dict(color=colour(number)) if len(runs) > 1 else {}
            for place, (key, label) in enumerate(keys.items()):
                factor = 100 if metric(key).share else 1
                points = [(row["step"], factor * row[key]) for row in rows if key in row]
                if points:
                    label = f"{name}, {label}" if len(runs) > 1 else label
                    style = _style(key, place)
                    axes.plot(*zip(*_thinned(points), strict=True), label=printable(label), **own, **style)
        axes.set(xlabel="step", ylabel=ylabel, title=title)
        if ylabel.endswith("(%)"):
            axes.set_ylim(0, 102)
        axes.grid(alpha=0.3)
        axes.legend(handles=list(axes.lines), fontsize=9)
    if not panels:
        axes_C[0].set_axis_off()
        figure.text(0.5, 0.5, "no numbers yet", ha="center", color="0.5")
    return literal(figure)


def _panels(runs: Mapping[str, list[dict]]) -> list[tuple[str, str, dict[str, str]]]:
    """(title, label of the y axis, metric -> its label) of each panel with a line in it."""
    keys = list(dict.fromkeys(key for rows in runs.values() for row in rows for key in row))
    if len(runs) == 1:
        loss = {key: metric(key).title for key in ("loss", "clip", "val/clip", "val/siglip") if key in keys}
        title = "Loss"
    else:  # beside each other, two totals of different terms would be compared in vain
        shown = "clip" if all(any("clip" in row for row in rows) for rows in runs.values() if rows) else "loss"
        loss = {key: word for key, word in ((shown, "training"), (f"val/{shown}", "validation")) if key in keys}
        title = metric(shown).title
    of = {key: parts for key in keys if (parts := split(key))}
    accuracy = {
        key: name if kind == "zero_shot" else f"{name}, linear probe"
        for key, (kind, name, number) in of.items()
        if number == "top1"
    }
    ways = {"image_to_text_r1": "image to text", "text_to_image_r1": "text to image"}
    retrieval = {key: f"{name}, {ways[number]}" for key, (_, name, number) in of.items() if number in ways}
    ranks = {key: name for key, (_, name, number) in of.items() if number == "spearman_in_modal"}
    ranks |= {key: "validation" for key in keys if key == "val/spearman_in_modal"}
    linear = [kind for kind, _, number in of.values() if number == "top1" and kind == "linear_probe"]
    found = [
        (title, "loss (nats)", loss),
        ("Accuracy" if linear else "Zero-shot accuracy", "top-1 (%)", accuracy),
        ("Retrieval", "R@1 (%)", retrieval),
        ("Do image-image and text-text rankings agree?", "Spearman", ranks),
    ]
    return [panel for panel in found if panel[2]]


def _style(key: str, place: int) -> dict[str, Any]:
    """Of a line: measured now and then with a marker, every few steps without."""
    if key == "loss":
        return dict(alpha=0.5)
    if key.startswith("val/"):
        return dict(marker="o", linestyle="--")
    return dict(marker="os^Dv"[place % 5], linestyle=("-", "--", ":")[place % 3]) if "/" in key else {}


def chart(lines: Sequence[Line], percent: bool = False, ylabel: str = "") -> Figure:
    """One metric, small, without a title: each line in its run's colour. percent: the values are shares."""
    figure = Figure(figsize=(3.8, 2.2), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        alone: dict[str, Any] = dict(marker="o", markersize=4) if len(line.points) == 1 else {}
        style: dict[str, Any] = dict(color=colour(line.run), linewidth=1.4, linestyle="--" if line.dashed else "-")
        axes.plot(*zip(*_thinned(line.points), strict=True), **style, **alone)
    axes.set_xlim(0, 1.02 * max(1, *(step for line in lines for step, _ in line.points)))
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
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


def intervals(panels: Mapping[str, Mapping[str, tuple[float, float]]]) -> Figure:
    """A panel a question: a dot for each contrast, its interval as a line, and a line at 0.

    Args:
      panels: title -> label -> (mean, half width).
    """
    heights = [len(named) + 1.5 for named in panels.values()]
    figure = Figure(figsize=(7, 0.3 * sum(heights)), dpi=100, layout="constrained")
    axes_R = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, named) in zip(axes_R, panels.items(), strict=True):
        means_N, halves_N = np.array(list(named.values())).T
        axes.errorbar(means_N, range(len(named)), xerr=halves_N, fmt="o", color=colour(0), markersize=4, linewidth=1.4)
        axes.axvline(0, color="0.5", linewidth=0.8)
        axes.set_yticks(range(len(named)), [printable(label) for label in named], fontsize=8)
        axes.set_ylim(len(named) - 0.4, -0.6)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.3)
    return literal(figure)


def _thinned(points):
    """At most MOST_POINTS: of equal parts of the line the lowest and the highest point, so that no spike is lost."""
    if len(points) <= MOST_POINTS:
        return points
    values, kept = np.array([value for _, value in points]), {0, len(points) - 1}
    for part in np.array_split(np.arange(len(points)), MOST_POINTS // 2 - 1):
        kept |= {part[values[part].argmin()], part[values[part].argmax()]}
    return [points[i] for i in sorted(kept)]
