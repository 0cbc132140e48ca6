"""Evaluations of a trained model, shared by the trainer and --mode=eval."""

from rankclip_jax.evaluation.number_names import number_names
from rankclip_jax.evaluation.run import KINDS, Encoder, Sets, agreed, beside, due, evaluate, one_set, open_sets
from rankclip_jax.evaluation.tables import counts, flat, lines, short, table, text

__all__ = ["KINDS", "Encoder", "Sets", "agreed", "beside", "counts", "due", "evaluate", "flat", "lines", "one_set"]
__all__ += ["number_names", "open_sets", "short", "table", "text"]
