"""How much of its accuracy a model keeps when the pictures change: accuracy on shifted sets against the reference set.

The reference accuracy of a row is over the classes of the shifted set alone (ImageNet-A and -R have 200 of the 1,000):
only their images and only their names, as Hendrycks et al. (2021) count. Effective robustness (Taori et al., 2020,
arXiv 2007.00644) is the accuracy beyond what models trained on the reference set have at the same reference accuracy:

    effective = shifted - beta(reference),    logit(beta(x)) = a + b logit(x)

with a and b the least-squares line through the baseline models' (reference, shifted) accuracies on logit axes.
"""

import json
from pathlib import Path

import numpy as np

from rankclip_jax.common.errors import InputError


def shared_classes(reference_keys: list[str], shifted_keys: list[str]) -> np.ndarray | None:
    """Classes of the reference set that the shifted set has, int64 in its order; None where that is not clear."""
    if reference_keys == shifted_keys:
        return np.arange(len(reference_keys))
    if any(reference_keys.count(key) != 1 for key in shifted_keys):
        return None
    return np.array([reference_keys.index(key) for key in shifted_keys])


def fit_baseline(points_Nx2: np.ndarray) -> tuple[float, float]:
    """(a, b) of logit(shifted) = a + b logit(reference).

    Args:
      points_Nx2: accuracies of baseline models, 0 to 1, reference and shifted.

    Raises:
      ValueError: fewer than two different reference accuracies, or one that is not between 0 and 1.
    """
    points = np.asarray(points_Nx2, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or len(np.unique(points[:, 0])) < 2:
        raise ValueError("a baseline needs [reference, shifted] accuracies of at least two models")
    if not ((points > 0) & (points < 1)).all():
        raise ValueError("baseline accuracies must lie between 0 and 1, both excluded")
    b, a = np.polyfit(_logit(points[:, 0]), _logit(points[:, 1]), 1)
    return float(a), float(b)


def table_row(shifted: float, reference: float, baseline: tuple[float, float] | None = None) -> dict[str, float]:
    """reference and shifted accuracy, their difference `drop`, and `effective` robustness where there is a baseline."""
    row = {"reference": reference, "shifted": shifted, "drop": reference - shifted}
    if baseline is not None and 0 < reference < 1:
        a, b = baseline
        row["effective"] = shifted - float(1 / (1 + np.exp(-(a + b * _logit(reference)))))
    return row


def read_baselines(path: str | Path) -> dict[str, tuple[float, float]]:
    """Lines of a JSON file {"set": [[reference, shifted], ...]}, accuracies 0 to 1.

    Raises:
      InputError: no such file, no JSON, or too few models for a line.
    """
    if not Path(path).is_file():
        raise InputError(f"config.eval.robustness.baselines: no file {path}")
    try:
        return {name: fit_baseline(points) for name, points in json.loads(Path(path).read_text()).items()}
    except (ValueError, AttributeError) as error:
        raise InputError(f"config.eval.robustness.baselines: {path}: {error}") from None


def _logit(x):
    return np.log(x) - np.log1p(-x)
