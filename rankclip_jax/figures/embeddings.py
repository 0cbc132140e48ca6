"""How embeddings lie: on two axes, by their cosines, and by the rankings that these give."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rankclip_jax.figures.curves import colour, plain
from rankclip_jax.figures.words import literal, printable


def projection(image_Nx2: np.ndarray, text_Nx2: np.ndarray, explained_2: np.ndarray) -> Figure:
    """Pairs on two axes with one scale, so that distances mean the same in all directions; a line from each image to
    its text. The markers have the gids "images" and "texts", by which `svg` labels them.

    Args:
      explained_2: share of the variance along each axis.
    """
    figure = Figure(figsize=(3.8, 3.9), layout="constrained")
    axes = figure.subplots()
    pairs_3Nx2 = np.stack([image_Nx2, text_Nx2, np.full_like(image_Nx2, np.nan)], axis=1).reshape(-1, 2)
    axes.plot(*pairs_3Nx2.T, color="0.6", linewidth=0.5)
    for number, (name, marker, points_Nx2) in enumerate((("images", "o", image_Nx2), ("texts", "s", text_Nx2))):
        style: dict[str, Any] = dict(color=colour(number), alpha=0.75, markersize=3.5, markeredgewidth=0)
        axes.plot(*points_Nx2.T, marker, label=name, gid=name, **style)
    axes.set(xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    labels = [f"principal axis {axis}: {share:.0%} of variance" for axis, share in enumerate(explained_2, 1)]
    axes.set_xlabel(labels[0], fontsize=8)
    axes.set_ylabel(labels[1], fontsize=8)
    axes.spines[:].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return literal(figure)


def cosines(edges: np.ndarray, positive: np.ndarray, negative: np.ndarray) -> Figure:
    """Histograms of the cosines of pairs and of all others, each a share of its own; bins that are used, and one more.

    Args:
      edges: (bins + 1,); positive, negative: counts, (bins,).
    """
    figure = Figure(figsize=(3.8, 2.4), layout="constrained")
    axes = figure.subplots()
    used = np.flatnonzero(positive + negative)
    low, high = (max(used[0] - 1, 0), min(used[-1] + 2, len(edges) - 1)) if len(used) else (0, len(edges) - 1)
    for number, (label, counts) in enumerate((("pairs", positive), ("all others", negative))):
        share = counts[low:high] / max(counts.sum(), 1)
        style: dict[str, Any] = dict(facecolor=(colour(number), 0.25), edgecolor=colour(number), linewidth=1.2)
        axes.stairs(share, edges[low : high + 1], label=label, fill=True, **style)
    axes.set(xlim=(edges[low], edges[high]), ylim=(0, None))
    plain(axes, percent=True)
    axes.set_xlabel("cosine", fontsize=8)
    axes.set_ylabel("share", fontsize=8)
    figure.legend(loc="outside upper left", ncols=2, fontsize=8, frameon=False)
    return literal(figure)


def similarities(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]], numbers: Mapping[str, Mapping[str, float]]
) -> Figure:
    """The cosines of one batch, a row a model, and how far the rankings that they give agree.

    The last two columns count, over all rows of the batch, an item's place in one ranking against its place in the
    other: all on the diagonal where they agree, spread evenly where they have nothing to do with each other.

    Args:
      models: name -> image and text embeddings of the batch, float32 (B, D) of unit length each, B at least 3. Sort
        the batch by what it shows, so that likes stand together.
      numbers: name -> spearman_in_modal and spearman_cross_modal, as evaluation.geometry.geometry gives them.
    """
    figure = Figure(figsize=(14, 2.9 * len(models)), dpi=80, layout="constrained")
    for axes_5, (name, (z_img_BxD, z_txt_BxD)) in zip(
        figure.subplots(len(models), 5, squeeze=False), models.items(), strict=True
    ):
        ii, tt, it = z_img_BxD @ z_img_BxD.T, z_txt_BxD @ z_txt_BxD.T, z_img_BxD @ z_txt_BxD.T
        titles = ("image - image", "text - text", "image - text")
        for axes, title, scores_BxB in zip(axes_5, titles, (ii, tt, it), strict=False):
            shown = axes.imshow(scores_BxB, cmap="viridis", interpolation="nearest")
            axes.set(xticks=[], yticks=[], title=title)
            figure.colorbar(shown, ax=axes, shrink=0.75)
        axes_5[0].set_ylabel(printable(name), fontsize=13)
        apart = ~np.eye(len(ii), dtype=bool)  # an item is the first of its own in-modal list, whatever the model
        in_modal, cross_modal = (_places(ii)[apart], _places(tt)[apart]), (_places(it).ravel(), _places(it.T).ravel())
        _ranks_against(axes_5[3], *in_modal, "among images, of an image", "among texts, of its text")
        _ranks_against(axes_5[4], *cross_modal, "among texts, of an image", "among images, of its text")
        axes_5[3].set_title(f"in-modal places:\nSpearman {numbers[name]['spearman_in_modal']:.2f}")
        axes_5[4].set_title(f"cross-modal places:\nSpearman {numbers[name]['spearman_cross_modal']:.2f}")
    return literal(figure)


def _places(scores_NxN):
    return np.argsort(np.argsort(-scores_NxN, axis=1, kind="stable"), axis=1)


def _ranks_against(axes, a, b, label_a, label_b):
    axes.hist2d(a, b, bins=16, cmap="magma")
    axes.set(xlabel=label_a, ylabel=label_b, aspect="equal")
