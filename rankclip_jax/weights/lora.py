"""LoRA (Hu et al., 2021, arXiv 2106.09685): a frozen matrix W (in, out) is used as W + ALPHA / r * a @ b.

The adapters a (in, r) and b (r, out) of the towers' attention and MLP matrices stand beside the towers, in
params["lora"], where a matrix's `kernel` has `a` and `b` instead. Of scanned blocks all have a leading axis.
"""

import dataclasses
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import by_name, nested

ALPHA = 16.0
# The names of what is adapted.
MATRICES = re.compile(r"^(visual|text)/(.*/)?(attn|attnpool|mlp)/[^/]+/kernel$")


def matrix(name: str) -> str:
    """The name of the matrix that an adapter belongs to; any other name as it is."""
    return re.sub(r"/[ab]$", "/kernel", name.removeprefix("lora/")) if name.startswith("lora/") else name


def adapters(params: Mapping, rank: int, key: jax.Array) -> dict:
    """Fresh adapters of `params`, float32: a uniform in +-in^-0.5, b zero, so that the model is the one without them.

    Raises:
      InputError: `rank` is not below the sides of a matrix.
    """
    found = {}
    for name, kernel in by_name(params).items():
        if MATRICES.search(name):
            *stack, rows, columns = kernel.shape
            if rank >= min(rows, columns):
                raise InputError(f"config.optim.lora={rank}. Expected less than the sides of {name}: {rows}, {columns}")
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            module, bound = name.removesuffix("/kernel"), rows**-0.5
            found[f"{module}/a"] = jax.random.uniform(own, (*stack, rows, rank), jnp.float32, -bound, bound)
            found[f"{module}/b"] = jnp.zeros((*stack, rank, columns), jnp.float32)
    return nested(found)


def merged(params: Mapping) -> dict:
    """The model's own parameters, with what the adapters add to them; without adapters `params` as they are."""
    if "lora" not in params:
        return dict(params)
    own = by_name({name: tree for name, tree in params.items() if name != "lora"})
    added = by_name(params["lora"])
    for name in added:
        if name.endswith("/a"):
            a, b, kernel = added[name], added[name[:-1] + "b"], matrix(f"lora/{name}")
            # Not in the accelerators' TF32 or bfloat16, so that the export is the model that was trained.
            product = a @ b if isinstance(a, np.ndarray) else jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            own[kernel] = own[kernel] + ALPHA / a.shape[-1] * product
    return nested(own)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with adapters of a rank among its parameters. It is used as models.CLIP is."""

    model: models.CLIP
    rank: int

    @property
    def config(self) -> models.ClipConfig:
        return self.model.config

    @property
    def attention(self) -> str:
        return self.model.attention

    def example_inputs(self, batch: int = 1) -> tuple[jax.Array, jax.Array]:
        return self.model.example_inputs(batch)

    def init(self, key: jax.Array, *inputs: Any) -> dict:
        variables = self.model.init(key, *inputs)
        params = variables["params"]
        return {**variables, "params": {**params, "lora": adapters(params, self.rank, key)}}

    def apply(self, variables: Mapping, *args: Any, **named: Any) -> Any:
        return self.model.apply({**variables, "params": merged(variables["params"])}, *args, **named)
