"""The pre-norm transformer of both towers, and its two parameter layouts: unrolled and scanned."""

import re
from collections.abc import Callable, Iterable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from rankclip_jax.models.attention import attend, attend_fused
from rankclip_jax.models.layers import LayerNorm, Linear, activate


class Attention(nn.Module):
    """Self-attention. q, k and v have a weight each: one fused product would only be split again."""

    heads: int
    causal: bool
    layers: int | None
    dtype: DTypeLike
    attention: str

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, positions_BxL: jax.Array | None) -> jax.Array:
        b, length, d = x_BxLxD.shape
        if self.layers is None:
            # nn.MultiheadAttention's: Xavier uniform over the fused (3D, D) weight; the output uniform.
            qkv, out = {"bound": (6 / (4 * d)) ** 0.5}, {}
        else:
            qkv, out = {"std": d**-0.5}, {"std": d**-0.5 * (2 * self.layers) ** -0.5}
        x_NxD = x_BxLxD.reshape(b * length, d)
        q, k, v = (
            Linear(d, **qkv, zero_bias=True, dtype=self.dtype, name=f"{n}_proj")(x_NxD).reshape(b, length, d)
            for n in "qkv"
        )
        if positions_BxL is not None:
            y_BxLxD = attend(q, k, v, self.heads, positions_BxL=positions_BxL)
        else:
            attention = attend_fused if self.attention == "cudnn" else attend
            y_BxLxD = attention(q, k, v, self.heads, self.causal)
        y_NxD = y_BxLxD.reshape(b * length, d)
        return Linear(d, **out, zero_bias=True, dtype=self.dtype, name="out_proj")(y_NxD).reshape(
            b, length, d
        )


# What rematerialisation may keep (True: nothing): names of jax.checkpoint_policies.
REMAT_POLICIES = ("dots_saveable", "dots_with_no_batch_dims_saveable")


def remat_policy(remat: bool | str) -> Callable | None:
    """What jax.checkpoint takes as its policy: None, to keep nothing, or the named one."""
    return getattr(jax.checkpoint_policies, remat) if isinstance(remat, str) else None


class Mlp(nn.Module):
    """Linear, activation, linear, on (N, D)."""

    width: int
    activation: str
    layers: int | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_NxD: jax.Array) -> jax.Array:
        d = x_NxD.shape[-1]
        fc, proj = (
            (None, None) if self.layers is None else ((2 * d) ** -0.5, d**-0.5 * (2 * self.layers) ** -0.5)
        )
        h = activate(Linear(self.width, std=fc, dtype=self.dtype, name="c_fc")(x_NxD), self.activation)
        return Linear(d, std=proj, dtype=self.dtype, name="c_proj")(h)


class ResidualAttentionBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    mlp_width: int
    activation: str
    causal: bool
    layers: int | None
    dtype: DTypeLike
    attention: str
    norm_eps: float

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, positions_BxL: jax.Array | None) -> jax.Array:
        attn = Attention(self.heads, self.causal, self.layers, self.dtype, self.attention, name="attn")
        x = x_BxLxD + attn(LayerNorm(self.dtype, self.norm_eps, name="ln_1")(x_BxLxD), positions_BxL)
        mlp = Mlp(self.mlp_width, self.activation, self.layers, self.dtype, name="mlp")
        h_NxD = LayerNorm(self.dtype, self.norm_eps, name="ln_2")(x).reshape(-1, x.shape[-1])
        return x + mlp(h_NxD).reshape(x.shape)


class Transformer(nn.Module):
    """`layers` blocks on (B, L, D). scan and remat change memory and compile time, never the numbers.

    positions_BxL: of packed texts, as `attend` takes them; None: a row is one text or picture.

    scaled_init: OpenAI initialises the text tower's blocks by width and depth, and leaves the visual
    tower's at PyTorch's defaults (its `initialize_parameters` touches `transformer`, not `visual`).
    """

    layers: int
    heads: int
    mlp_width: int | None
    activation: str
    causal: bool
    scaled_init: bool
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: bool | str = False
    attention: str = "xla"
    norm_eps: float = 1e-5

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, positions_BxL: jax.Array | None = None) -> jax.Array:
        def block(kind, **place):
            return kind(
                heads=self.heads,
                mlp_width=self.mlp_width or 4 * x_BxLxD.shape[-1],
                activation=self.activation,
                causal=self.causal,
                layers=self.layers if self.scaled_init else None,
                dtype=self.dtype,
                attention=self.attention,
                norm_eps=self.norm_eps,
                **place,
            )

        given, x = self.variables.get("params", {}), x_BxLxD
        if self.scan_layers:
            kind = ResidualAttentionBlock
            if self.remat and not self.is_initializing():  # then common/drawing.py sees the draws
                kind = nn.remat(kind, prevent_cse=False, policy=remat_policy(self.remat))
            for name in _parts(given) or ["resblocks"]:
                scan = nn.scan(
                    lambda block, x, positions: (block(x, positions), None),
                    variable_axes={"params": 0},
                    split_rngs={"params": True},
                    in_axes=nn.broadcast,
                    length=self.layers if name == "resblocks" else len(jax.tree.leaves(given[name])[0]),
                )
                x = scan(block(kind, name=name), x, positions_BxL)[0]
            return x
        names = [f"resblocks_{i}" for i in range(self.layers)]
        if self.is_initializing() or not isinstance(x, jax.core.Tracer):  # a jit of its own would compile each time
            for name in names:
                x = block(ResidualAttentionBlock, name=name)(x, positions_BxL)
            return x
        # Jitted, the first block's trace is the others' too: two thirds of the time to trace and lower a step.
        alone = block(ResidualAttentionBlock, parent=None)

        def apply(params, x, positions_BxL):
            return alone.apply({"params": params}, x, positions_BxL)

        apply = jax.jit(jax.checkpoint(apply, policy=remat_policy(self.remat)) if self.remat else apply)
        for name in names:
            with jax.named_scope(name):
                x = apply(given[name], x, positions_BxL)
        return x


def stack_layers(tree: dict) -> dict:
    """Unrolled parameters (or optimiser moments) as scanned ones: resblocks_<n> -> one stacked resblocks."""
    if not isinstance(tree, dict):
        return tree
    blocks = {int(m[1]): v for k, v in tree.items() if (m := re.fullmatch(r"resblocks_(\d+)", k))}
    rest = {k: stack_layers(v) for k, v in tree.items() if not re.fullmatch(r"resblocks_\d+", k)}
    if blocks:
        rest["resblocks"] = jax.tree.map(_stack, *(blocks[i] for i in range(len(blocks))))
    return rest


def unstack_layers(tree: dict) -> dict:
    """The inverse of `stack_layers`."""
    if not isinstance(tree, dict):
        return tree
    out = {k: unstack_layers(v) for k, v in tree.items() if k != "resblocks"}
    if "resblocks" in tree:
        for i in range(len(jax.tree.leaves(tree["resblocks"])[0])):
            out[f"resblocks_{i}"] = jax.tree.map(lambda x, i=i: x[i], tree["resblocks"])
    return out


# A stack may be cut in parts, of which some are frozen: resblocks_from_<number of its first block>.
_PART = re.compile(r"resblocks_from_(\d+)")


def _parts(names: Iterable[str]) -> list[str]:
    """Those of the parts of a stack, in their order."""
    starts = {int(found[1]): name for name in names if (found := _PART.fullmatch(name))}
    return [starts[start] for start in sorted(starts)]


def part_start(name: str) -> int | None:
    """The first block of the part of a stack that is in a name, such as of a parameter; None: no part is."""
    found = _PART.search(name)
    return int(found[1]) if found else None


def cut_layers(tree: dict, starts: Sequence[int]) -> dict:
    """Scanned parameters with the stack cut before the blocks `starts`. A model applies them as they are."""
    if not isinstance(tree, dict):
        return tree
    out = {k: cut_layers(v, starts) for k, v in tree.items() if k != "resblocks"}
    if "resblocks" in tree:
        for begin, end in zip([0, *starts], [*starts, None], strict=True):
            out[f"resblocks_from_{begin}"] = jax.tree.map(lambda x, b=begin, e=end: x[b:e], tree["resblocks"])
    return out


def uncut_layers(tree: dict) -> dict:
    """The inverse of `cut_layers`."""
    if not isinstance(tree, dict):
        return tree
    parts = _parts(tree)
    out = {name: uncut_layers(branch) for name, branch in tree.items() if name not in parts}
    if parts:
        out["resblocks"] = jax.tree.map(lambda *x: jnp.concatenate(x), *(tree[name] for name in parts))
    return out


def _stack(*layers):
    # Host arrays stay on the host: weights being converted need not fit on the accelerator.
    return np.stack(layers) if isinstance(layers[0], np.ndarray) else jnp.stack(layers)
