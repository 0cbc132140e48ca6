"""Losses: pure functions of arrays, float32 in log space whatever comes in."""

from rankclip_jax.losses.diagnostics import embedding_diagnostics, gradient_cosine, term_gradients
from rankclip_jax.losses.objective import (
    OBJECTIVES,
    RANKING,
    RankTerms,
    clip_loss,
    objective_loss,
    rank_consistency,
    rank_weight,
    siglip_loss,
)
from rankclip_jax.losses.plackett_luce import plackett_luce_nll

__all__ = [
    "OBJECTIVES",
    "RANKING",
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
]
