"""Losses: pure functions of arrays, float32 in log space whatever comes in. Start with reference.py."""

from rankclip_jax.losses.diagnostics import embedding_diagnostics, gradient_cosine, term_gradients
from rankclip_jax.losses.objectives import (
    RankTerms,
    clip_loss,
    objective_loss,
    rank_consistency,
    rank_weight,
    siglip_loss,
    weighted_loss,
)
from rankclip_jax.losses.plackett_luce import plackett_luce_nll
from rankclip_jax.losses.spec import OBJECTIVES, RANKING, LossSpec

__all__ = [
    "OBJECTIVES",
    "RANKING",
    "LossSpec",
    "RankTerms",
    "clip_loss",
    "embedding_diagnostics",
    "gradient_cosine",
    "objective_loss",
    "plackett_luce_nll",
    "rank_consistency",
    "rank_weight",
    "siglip_loss",
    "term_gradients",
    "weighted_loss",
]
