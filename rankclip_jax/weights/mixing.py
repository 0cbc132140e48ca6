"""A model between two of one architecture (WiSE-FT: Wortsman et al. 2022, arXiv 2109.01903)."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import flatten
from rankclip_jax.weights.pretrained import Pretrained


def check(a: Pretrained, b: Pretrained) -> None:
    """Raises InputError where no model lies between the two: another architecture, tokenizer or view."""
    fields = [flatten(dataclasses.asdict(model.config)) for model in (a, b)]
    unlike = [key for key in fields[0] | fields[1] if fields[0].get(key) != fields[1].get(key)]
    if unlike:
        said = [f"{key} is {fields[0].get(key)} and {fields[1].get(key)}" for key in unlike]
        more = f" and {len(said) - 4} more" if len(said) > 4 else ""
        raise InputError(f"{a.path} and {b.path} are not of one architecture: {', '.join(said[:4])}{more}")
    if a.tokenizer and b.tokenizer and a.tokenizer.vocabulary() != b.tokenizer.vocabulary():
        raise InputError(
            f"{a.path} and {b.path} have different tokenizers, so their text towers read different ids. Expected one "
            "model and what was fine-tuned from it"
        )
    if a.view != b.view:
        raise InputError(f"{a.path} and {b.path} prepare images differently: {a.view} and {b.view}")


def between(a: Pretrained, b: Pretrained, alpha: float) -> Pretrained:
    """(1 - alpha) A + alpha B of every parameter, the logit scale and running statistics too; computed in float64.

    0 is A and 1 is B, to the bit. Raises as `check`.
    """
    check(a, b)

    def mixed(x, y):
        return ((1 - alpha) * np.asarray(x, np.float64) + alpha * np.asarray(y, np.float64)).astype(np.float32)

    return dataclasses.replace(
        a,
        path=Path(f"{a.path.name} and {b.path.name}"),
        # At the ends no 0 times infinity, and no -0 that becomes 0.
        variables={0.0: a.variables, 1.0: b.variables}.get(alpha) or jax.tree.map(mixed, a.variables, b.variables),
        tokenizer=a.tokenizer or b.tokenizer,
        run=None,
        step=None,
        origin=f"Every weight is {1 - alpha:g} times that of `{a.path.name}` and {alpha:g} times that of "
        f"`{b.path.name}` (WiSE-FT, arXiv 2109.01903).",
    )
