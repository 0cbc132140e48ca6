"""Means over seeds and what they are worth: 95 % confidence intervals by Student's t."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Estimate(NamedTuple):
    """A mean with the half width of its 95 % interval (None: one value, which has none)."""

    mean: float
    half: float | None
    n: int

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.half is not None and abs(self.mean) > self.half


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent values, half width t(0.975, n - 1) s / sqrt(n)."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(mean, None, n)
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return Estimate(mean, float(half), n)


def paired(values: dict[int, float], reference: dict[int, float]) -> Estimate | None:
    """The mean difference over the seeds that both have; None without one.

    Runs of one seed start from the same parameters and see the same batches, so their common luck cancels.
    """
    seeds = sorted(values.keys() & reference.keys())
    return estimate([values[seed] - reference[seed] for seed in seeds]) if seeds else None
