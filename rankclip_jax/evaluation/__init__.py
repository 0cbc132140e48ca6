"""Evaluations of a trained model, shared by the trainer and --mode=eval."""

from rankclip_jax.evaluation.run import KINDS, Encoder, due, evaluate
from rankclip_jax.evaluation.tables import flat, text

__all__ = ["KINDS", "Encoder", "due", "evaluate", "flat", "text"]
