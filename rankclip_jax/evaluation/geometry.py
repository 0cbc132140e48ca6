"""Geometry of the two modalities' embeddings: modality gap, spread, agreement of their rankings."""

import jax
import numpy as np

from rankclip_jax.losses import embedding_diagnostics

BINS = 60
_diagnostics = jax.jit(embedding_diagnostics, static_argnames="sample")


def geometry(z_img_NxD: np.ndarray, z_txt_NxD: np.ndarray) -> dict[str, float]:
    """The metrics of `losses.embedding_diagnostics` over all N pairs (N^2 memory), and n.

    Args:
      z_img_NxD, z_txt_NxD: float32 of unit norm, at least 3 rows; row i of one is paired with row i of the other.
    """
    with jax.default_matmul_precision("float32"):
        numbers = _diagnostics(z_img_NxD, z_txt_NxD, sample=len(z_img_NxD))
    return {key: float(value) for key, value in numbers.items()} | {"n": len(z_img_NxD)}


def similarity_histograms(z_img_NxD: np.ndarray, z_txt_NxD: np.ndarray) -> dict[str, np.ndarray]:
    """Counts of cosines: `edges` float64 (BINS + 1,) from -1 to 1, `positive` and `negative` int64 (BINS,)."""
    edges = np.linspace(-1, 1, BINS + 1)
    scores_NxN = np.clip(z_img_NxD @ z_txt_NxD.T, -1, 1)
    positive, _ = np.histogram(np.diagonal(scores_NxN), edges)
    everything, _ = np.histogram(scores_NxN, edges)
    return {"edges": edges, "positive": positive, "negative": everything - positive}


def project(z_img_NxD: np.ndarray, z_txt_NxD: np.ndarray) -> dict[str, np.ndarray]:
    """Projects both modalities onto the two principal axes of all 2 N points.

    Returns image and text, each float32 (N, 2), and explained, float64 (2,): each axis's share of the variance.
    """
    points = np.concatenate([z_img_NxD, z_txt_NxD]).astype(np.float64)
    points -= points.mean(axis=0)
    _, singular, axes_KxD = np.linalg.svd(points, full_matrices=False)
    # The sign of a singular vector is arbitrary. Its largest entry is made positive, so that runs are comparable.
    signs = np.sign(axes_KxD[np.arange(2), np.abs(axes_KxD[:2]).argmax(axis=1)])
    flat = (points @ (axes_KxD[:2] * signs[:, None]).T).astype(np.float32)
    share = singular**2 / max((singular**2).sum(), np.finfo(float).tiny)
    return {"image": flat[: len(z_img_NxD)], "text": flat[len(z_img_NxD) :], "explained": share[:2]}
