"""What an objective is: everything about a loss that stays the same through a run, in one record."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

# Which pair of score matrices a term compares: i image, t text, so "it" is image-text.
MATRICES = {
    "clip": ("it", "ti"),
    "siglip": ("it", "ti"),
    "cross_modal": ("it", "ti"),
    "in_modal": ("ii", "tt"),
    "cyclic_cross_modal": ("it", "ti"),
    "cyclic_in_modal": ("ii", "tt"),
}
RANK_TERMS = ("in_modal", "cross_modal")
# The terms of each objective beside the ranking terms, with their weights: CLIP (Radford et al., 2021), SigLIP
# (Zhai et al., 2023) and CyCLIP (Goel et al., 2022). RANKING are the objectives that have the ranking terms too.
OBJECTIVES = {
    "clip": {"clip": 1.0},
    "rankclip": {"clip": 1.0},
    "rank": {},
    "siglip": {"siglip": 1.0},
    "cyclip": {"clip": 1.0, "cyclic_in_modal": 0.25, "cyclic_cross_modal": 0.25},
}
RANKING = ("rankclip", "rank")
SCHEDULES = ("ramp", "constant")


@dataclasses.dataclass(frozen=True)
class LossSpec:
    """The objective of a run; the fields are the keys of config.loss, and hashable, so that jit can take it.

    Attributes:
      objective: a key of OBJECTIVES.
      terms: (term, weight, schedule) each: terms of MATRICES to add to the objective, or in place of its own.
      lambda_in, lambda_cross: weights of the ranking terms.
      schedule: "ramp" or "constant", of the weight that both ranking terms share (`objectives.rank_weight`).
      ramp_epochs: epochs of that ramp; None: those of the run.
      decay, top_k: as in `plackett_luce_nll`; with top_k the mean is over the k positions kept.
      list_size: items of a list of the ranking terms, which are computed within groups of so many consecutive rows of
        the batch, which it must divide; None: the whole batch. The other terms see the whole batch.
      keep_self: keep item i in its own in-modal lists, as the authors do, or leave it out.
      form: "exact", or "released": float32 log(sum of exponentials + 1e-10) with its gradient, as the authors'
        code has it, to compare what that does to training.
    """

    objective: str = "rankclip"
    terms: tuple[tuple[str, float, str], ...] = ()
    lambda_in: float = 1 / 16
    lambda_cross: float = 1 / 16
    schedule: str = "ramp"
    ramp_epochs: int | None = None
    decay: str | None = None
    top_k: int | None = None
    list_size: int | None = None
    keep_self: bool = True
    form: str = "exact"

    def __post_init__(self) -> None:
        for field, choices in (("objective", OBJECTIVES), ("schedule", SCHEDULES), ("form", ("exact", "released"))):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}={getattr(self, field)!r}. Expected one of {', '.join(choices)}")
        if self.decay not in (None, "log"):
            raise ValueError(f'decay={self.decay!r}. Expected None or "log"')
        if self.ramp_epochs is not None and self.ramp_epochs < 1:
            raise ValueError(f"ramp_epochs={self.ramp_epochs}. Expected at least 1, or None for those of the run")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}. Expected at least 1, or None for whole lists")
        if self.list_size is not None and self.list_size < 2:
            raise ValueError(f"list_size={self.list_size}. Expected at least 2, or None for the whole batch")
        object.__setattr__(self, "terms", _listed(self.terms))
        for term, _, schedule in self.terms:
            if term not in MATRICES:
                raise ValueError(f"terms: no term {term!r}. Expected one of {', '.join(MATRICES)}")
            if schedule not in SCHEDULES:
                raise ValueError(f"terms: {term} has schedule={schedule!r}. Expected one of {', '.join(SCHEDULES)}")

    def weights(self, ramp: jax.Array | float = 1.0) -> dict[str, jax.Array | float]:
        """{term: weight} where the ramp has the value `ramp`, a scalar that may be traced.

        A weight that is 0 in the configuration drops its term; one that `ramp` makes 0 keeps it, for the metrics.

        Raises:
          ValueError: no term is left.
        """
        at = {"ramp": ramp, "constant": 1.0}
        wanted = {term: (weight, "constant") for term, weight in OBJECTIVES[self.objective].items()}
        if self.objective in RANKING:
            wanted |= {"in_modal": (self.lambda_in, self.schedule), "cross_modal": (self.lambda_cross, self.schedule)}
        wanted |= {term: (weight, schedule) for term, weight, schedule in self.terms}
        weights = {term: weight * at[schedule] for term, (weight, schedule) in wanted.items() if weight != 0}
        if not weights:
            raise ValueError(f"objective={self.objective!r}: every weight is zero")
        return weights

    def ramped(self) -> list[str]:
        """The terms that the ramp leaves out in the first epoch. Raises as `weights`."""
        return [term for term, weight in self.weights(0.0).items() if weight == 0]


def _listed(terms: Any) -> tuple:
    """Terms as config.loss.terms has them, {name: weight or {"weight", "schedule"}}, or as LossSpec stores them."""
    if not isinstance(terms, Mapping):
        return tuple(terms)
    scheduled = {k: v if isinstance(v, Mapping) else {"weight": v, "schedule": "constant"} for k, v in terms.items()}
    return tuple((term, value["weight"], value["schedule"]) for term, value in scheduled.items())
