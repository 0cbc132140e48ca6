"""Robustness to distribution shift: accuracy on shifted sets compared with the reference set.

The reference accuracy of a row uses only the images and names of the shifted set's classes (ImageNet-A and -R have 200
of the 1,000), as in Hendrycks et al. (2021). Effective robustness (Taori et al., 2020, arXiv 2007.00644) is the
accuracy above that of models trained on the reference set with the same reference accuracy:

    effective = shifted - beta(reference),    logit(beta(x)) = a + b logit(x)

with a and b the least-squares line through the baseline models' (reference, shifted) accuracies on logit axes.
"""

import json
from pathlib import Path

import numpy as np

from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError, one_line


def shared_classes(reference_keys: list[str], shifted_keys: list[str]) -> np.ndarray | None:
    """Index in the reference set of each class of the shifted set, int64, in the latter's order; None if ambiguous."""
    if reference_keys == shifted_keys:
        return np.arange(len(reference_keys))
    if any(reference_keys.count(key) != 1 for key in shifted_keys):
        return None
    return np.array([reference_keys.index(key) for key in shifted_keys])


def fit_baseline(points_Nx2: np.ndarray) -> tuple[float, float]:
    """(a, b) of logit(shifted) = a + b logit(reference).

    Args:
      points_Nx2: (reference, shifted) accuracies of baseline models, 0 to 1.

    Raises:
      ValueError: fewer than two different reference accuracies, or an accuracy outside (0, 1).
    """
    points = np.asarray(points_Nx2, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(np.unique(points[:, 0])) < 2:
        raise ValueError("expected [reference, shifted] of at least two models with different reference accuracies")
    if not ((points > 0) & (points < 1)).all():
        raise ValueError("baseline accuracies must be greater than 0 and less than 1")
    b, a = np.polyfit(_logit(points[:, 0]), _logit(points[:, 1]), 1)
    return float(a), float(b)


def table_row(shifted: float, reference: float, baseline: tuple[float, float] | None = None) -> dict[str, float]:
    """`reference` and `shifted` accuracy, their difference `drop`, and with a baseline the `effective` robustness."""
    row = {"reference": reference, "shifted": shifted, "drop": reference - shifted}
    if baseline is not None and 0 < reference < 1:
        a, b = baseline
        row["effective"] = shifted - float(1 / (1 + np.exp(-(a + b * _logit(reference)))))
    return row


def read_baselines(path: str | Path) -> dict[str, tuple[float, float]]:
    """Fits the baseline (a, b) of each set in a JSON file {"set": [[reference, shifted], ...]}, accuracies 0 to 1.

    Raises:
      InputError: no such file, invalid JSON, or too few models for a fit.
    """
    if not storage.exists(str(path)):
        raise InputError(f"config.eval.robustness.baselines: no such file: {path}")
    try:
        return {name: fit_baseline(points) for name, points in json.loads(storage.read(str(path))).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"config.eval.robustness.baselines: {path}: {one_line(error)}") from None


def _logit(x):
    return np.log(x) - np.log1p(-x)
