"""Means over seeds with 95 % confidence intervals by Student's t."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Estimate(NamedTuple):
    """A mean of n values with the half width of its interval (None: one value, which has none)."""

    mean: float
    half: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, half width t(0.975, n - 1) s / sqrt(n)."""
    n = len(values)
    half = float(scipy.stats.t.ppf(0.975, n - 1) * scipy.stats.sem(values)) if n > 1 else None
    return Estimate(float(np.mean(values)), half, n)


def paired(values: dict[int, float], reference: dict[int, float]) -> Estimate | None:
    """The mean difference over the seeds that both have, whose common luck cancels; None without one."""
    seeds = sorted(values.keys() & reference.keys())
    return estimate([values[seed] - reference[seed] for seed in seeds]) if seeds else None
