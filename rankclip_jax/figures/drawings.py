"""Figures of runs, evaluations and embeddings, by matplotlib: for curves.png and for notebooks.

All give a matplotlib Figure that no pyplot knows of, so nothing has to be closed and no backend is chosen. The page of
`rankclip_jax.report` draws more of the same files, for a browser.
"""

import base64
import io
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.evaluation.geometry import geometry

_RIGHT, _PLAIN = "#12824c", "#c9d0da"  # frames of a right answer and of another


def curves(workdirs: Mapping[str, object]) -> Figure:
    """Loss, zero-shot accuracy and, where it was measured, rank agreement over the steps.

    Args:
      workdirs: name -> workdir. What is not there yet is not drawn: also for a run that goes on.
    """
    runs = {name: read_metrics(workdir) for name, workdir in workdirs.items()}
    keys = list(dict.fromkeys(key for rows in runs.values() for row in rows for key in row))
    tops = [key for key in keys if key.startswith("zero_shot/") and key.endswith("/top1")]
    ranks = [key for key in keys if key.startswith(("geometry/", "val/")) and key.endswith("spearman_in_modal")]
    figure = Figure(figsize=(15 if ranks else 11, 4), dpi=120, layout="constrained")
    loss, top, *rank = figure.subplots(1, 3 if ranks else 2)
    for number, (name, rows) in enumerate(runs.items()):
        colour = dict(color=f"C{number}") if len(runs) > 1 else {}

        def line(axes, key, label, factor=1.0, rows=rows, name=name, colour=colour, **style):
            points = [(row["step"], factor * row[key]) for row in rows if key in row]
            if points:
                label = f"{name}, {label}" if len(runs) > 1 else label
                axes.plot(*zip(*points, strict=True), label=label, **colour, **style)

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
            axes.legend(fontsize=9)
    return figure


def confusion(matrices: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Confusion matrices side by side, in per cent of each row; only rows and columns with something in them.

    Args:
      matrices: name -> {"classes": (C,) str, "confusion": (C, C) int, [label, class that came first]}, as
        WORKDIR/eval/zero_shot_NAME.npz holds them.
    """
    shown = {}
    for name, arrays in matrices.items():
        counts_CxC = arrays["confusion"]
        rows = np.flatnonzero(counts_CxC.sum(axis=1))
        columns = [*rows, *np.setdiff1d(np.flatnonzero(counts_CxC.sum(axis=0)), rows)]
        percent = 100 * counts_CxC[rows] / counts_CxC[rows].sum(axis=1, keepdims=True)
        shown[name] = percent[:, columns], arrays["classes"][rows], arrays["classes"][columns]
    widths = [max(len(columns), 4) for _, _, columns in shown.values()]
    tallest = max(len(rows) for _, rows, _ in shown.values())
    cell = min(0.42, 7 / max(tallest, max(widths)))  # inches
    size = (sum(widths) * cell + 2.0 * len(shown), max(tallest * cell, 1.5) + 2.4)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(shown), width_ratios=widths))
    for axes, (name, (percent_RxC, rows, columns)) in zip(panels, shown.items(), strict=True):
        axes.imshow(percent_RxC, cmap="Blues", vmin=0, vmax=100, aspect="equal")
        named = cell > 0.15  # below it, names would run into each other
        axes.set_xticks(range(len(columns)) if named else [], columns if named else [], rotation=90, fontsize=8)
        axes.set_yticks(range(len(rows)) if named else [], rows if named else [], fontsize=8)
        if cell > 0.3:
            for (row, column), value in np.ndenumerate(percent_RxC):
                if value >= 0.5:
                    colour = "white" if value > 50 else "black"
                    axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set(xlabel="taken for", ylabel="is", title=name)
    return figure


def gallery(found: Mapping[str, Sequence[Mapping]], queries: int = 4) -> Figure:
    """What is nearest to some pictures among all captions, and to some captions among all pictures.

    Args:
      found: what WORKDIR/eval/retrieval_NAME.json holds.
      queries: how many of each kind are shown, from the first.
    """
    from_images, from_texts = found["image_to_text"][:queries], found["text_to_image"][:queries]
    most = max((len(query["answers"]) for query in from_texts), default=1)
    figure = Figure(figsize=(13, 1.5 * max(len(from_images), len(from_texts)) + 0.4), dpi=80, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(5, 6))
    left.suptitle("Picture to captions")
    right.suptitle("Caption to pictures")
    for (picture, words), query in zip(_grid(left, len(from_images), 2, (1, 3)), from_images, strict=True):
        _picture(picture, query["picture"])
        for place, answer in enumerate(query["answers"]):
            text = textwrap.shorten(answer["caption"], 58, placeholder=" ...")
            style = dict(color=_RIGHT, weight="bold") if answer["right"] else {}
            words.text(0, 0.9 - 0.2 * place, f"{place + 1}. {text}", va="center", fontsize=9, parse_math=False, **style)
    for (words, *pictures), query in zip(_grid(right, len(from_texts), most + 1, None), from_texts, strict=True):
        lines = textwrap.wrap(query["caption"], 20, max_lines=5, placeholder=" ...")
        words.text(1, 0.5, "\n".join(lines), ha="right", va="center", fontsize=9, parse_math=False)
        for axes, answer in zip(pictures, query["answers"], strict=False):
            _picture(axes, answer["picture"], _RIGHT if answer["right"] else _PLAIN)
    return figure


def _grid(figure, rows, columns, ratios):
    axes_RxC = figure.subplots(max(rows, 1), columns, squeeze=False, width_ratios=ratios)
    for axes in axes_RxC.flat:
        axes.axis("off")
    return axes_RxC[:rows]


def _picture(axes, data: str, frame: str | None = None) -> None:
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    axes.imshow(pixels, interpolation="antialiased")
    if frame:
        axes.axis("on")
        axes.set(xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=frame, linewidth=4 if frame == _RIGHT else 1)


def similarities(models: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """The cosines of one batch, a row a model, and how far the rankings that they give agree.

    The last two columns count, over all rows of the batch, an item's place in one ranking against its place in the
    other: all on the diagonal where they agree, spread evenly where they have nothing to do with each other.

    Args:
      models: name -> image and text embeddings of the batch, float32 (B, D) of unit length each, B at least 3. Sort
        the batch by what it shows, so that likes stand together.
    """
    figure = Figure(figsize=(14, 2.9 * len(models)), dpi=80, layout="constrained")
    for axes_5, (name, (z_img_BxD, z_txt_BxD)) in zip(
        figure.subplots(len(models), 5, squeeze=False), models.items(), strict=True
    ):
        agreement = geometry(z_img_BxD, z_txt_BxD)
        ii, tt, it = z_img_BxD @ z_img_BxD.T, z_txt_BxD @ z_txt_BxD.T, z_img_BxD @ z_txt_BxD.T
        titles = ("image - image", "text - text", "image - text")
        for axes, title, scores_BxB in zip(axes_5, titles, (ii, tt, it), strict=False):
            shown = axes.imshow(scores_BxB, cmap="viridis", interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=title)
            figure.colorbar(shown, ax=axes, shrink=0.75)
        axes_5[0].set_ylabel(name, fontsize=13)
        apart = ~np.eye(len(ii), dtype=bool)  # an item is the first of its own in-modal list, whatever the model
        _ranks_against(
            axes_5[3], _places(ii)[apart], _places(tt)[apart], "among images, of an image", "among texts, of its text"
        )
        axes_5[3].set_title(f"in-modal places:\nSpearman {agreement['spearman_in_modal']:.2f}")
        _ranks_against(
            axes_5[4],
            _places(it).ravel(),
            _places(it.T).ravel(),
            "among texts, of an image",
            "among images, of its text",
        )
        axes_5[4].set_title(f"cross-modal places:\nSpearman {agreement['spearman_cross_modal']:.2f}")
    return figure


def _places(scores_NxN):
    return np.argsort(np.argsort(-scores_NxN, axis=1, kind="stable"), axis=1)


def _ranks_against(axes, a, b, label_a, label_b):
    axes.hist2d(a, b, bins=16, cmap="magma")
    axes.set(xlabel=label_a, ylabel=label_b, aspect="equal")


def choices(image: Image.Image, classnames: Sequence[str], probabilities: np.ndarray, most: int = 5) -> Figure:
    """A picture and the classes that came first. probabilities: (classes,), as a row of Model.zero_shot."""
    order = np.argsort(-probabilities)[:most]
    figure = Figure(figsize=(8, 2.6), dpi=80, layout="constrained")
    picture, bars = figure.subplots(1, 2, width_ratios=(1, 2))
    picture.imshow(np.asarray(image.convert("RGB")))
    picture.axis("off")
    percent = 100 * probabilities[order]
    drawn = bars.barh(range(len(order)), percent)
    bars.bar_label(drawn, [f"{value:.1f} %" for value in percent], padding=3)
    bars.set_yticks(range(len(order)), [classnames[i] for i in order])
    bars.invert_yaxis()
    bars.set(xlim=(0, 118), xticks=[])
    bars.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
