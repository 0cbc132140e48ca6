"""How the two modalities' embeddings lie: the gap between them, their spread, whether their rankings agree."""

import jax
import numpy as np

from rankclip_jax.losses import embedding_diagnostics

BINS = 60
_diagnostics = jax.jit(embedding_diagnostics, static_argnames="sample")


def geometry(z_img_NxD: np.ndarray, z_txt_NxD: np.ndarray) -> dict[str, float]:
    """The numbers of `losses.embedding_diagnostics` over all N pairs given (N^2 memory), and n.

    Args:
      z_img_NxD, z_txt_NxD: float32 of unit norm, row i of one paired with row i of the other; at least 3.
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
    """Both modalities on the two principal axes of all 2 N points.

    Returns image and text, float32 (N, 2) each, and explained, float64 (2,): the axes' shares of the variance.
    """
    points = np.concatenate([z_img_NxD, z_txt_NxD]).astype(np.float64)
    points -= points.mean(axis=0)
    _, singular, axes_KxD = np.linalg.svd(points, full_matrices=False)
    # A singular vector's sign is arbitrary: its largest entry is made positive, so that runs can be compared.
    signs = np.sign(axes_KxD[np.arange(2), np.abs(axes_KxD[:2]).argmax(axis=1)])
    flat = (points @ (axes_KxD[:2] * signs[:, None]).T).astype(np.float32)
    share = singular**2 / max((singular**2).sum(), np.finfo(float).tiny)
    return {"image": flat[: len(z_img_NxD)], "text": flat[len(z_img_NxD) :], "explained": share[:2]}
