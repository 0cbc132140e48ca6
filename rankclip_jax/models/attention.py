"""Multi-head softmax attention: by matrix products anywhere, or by cuDNN's fused kernel on NVIDIA GPUs."""

from typing import Literal

import jax
import jax.numpy as jnp

from rankclip_jax.common.devices import Devices
from rankclip_jax.models.presets import ClipConfig, VitConfig

ATTENTION = ("auto", "xla", "cudnn")  # config.model.attention


def choose_attention(choice: str, config: ClipConfig, dtype: str, devices: Devices) -> str:
    """What the self-attention of both towers runs on, "xla" or "cudnn".

    "auto" takes cuDNN where it can: bfloat16 on NVIDIA GPUs from Ampere on, heads of 8, 16, ... 128 channels.

    Raises:
      ValueError: another choice, or "cudnn" where it cannot run, with the reason.
    """
    if choice not in ATTENTION:
        raise ValueError(f"attention={choice!r}. Expected one of {', '.join(ATTENTION)}")
    heads = [config.text.width // config.text.heads]
    if isinstance(config.vision, VitConfig):
        heads.append(config.vision.width // config.vision.heads)
    if devices.capability is None:
        reason = f"it needs an NVIDIA GPU, and this runs on {devices.platform}"
    elif devices.capability < 8.0:
        reason = f"it needs an Ampere GPU or newer, and {devices.kind} has compute capability {devices.capability}"
    elif dtype != "bfloat16":
        reason = f"it computes in bfloat16 and config.model.dtype is {dtype}"
    elif wrong := [width for width in heads if width % 8 or width > 128]:
        reason = f"a head must have a multiple of 8 channels, at most 128, and one has {wrong[0]}"
    else:
        return "xla" if choice == "xla" else "cudnn"
    if choice == "cudnn":
        raise ValueError(f"attention='cudnn' is not possible: {reason}. Use 'auto' or 'xla'")
    return "xla"


def attend(
    q_BxLxD: jax.Array,
    k_BxSxD: jax.Array,
    v_BxSxD: jax.Array,
    heads: int,
    causal: bool = False,
    positions_BxL: jax.Array | None = None,
) -> jax.Array:
    """Multi-head softmax attention, (B, L, D), (B, S, D), (B, S, D) -> (B, L, D).

    With `positions_BxL` it is causal within each of the texts that a row holds: a token at position p of its text
    attends to itself and the p tokens before it (common/packing.py).

    Operands are transposed to (B, H, L, Dh) first: on CPU XLA then runs batched matrix products, three times
    as fast as the contraction over (B, L, H, Dh). The softmax is in float32.
    """
    b, length, d = q_BxLxD.shape

    def split(x):
        return x.reshape(b, x.shape[1], heads, d // heads).transpose(0, 2, 1, 3)

    q, k, v = split(q_BxLxD * (d // heads) ** -0.5), split(k_BxSxD), split(v_BxSxD)
    logits_BxHxLxS = jnp.matmul(q, k.swapaxes(-1, -2)).astype(jnp.float32)
    if positions_BxL is not None:
        back_LxL = jnp.arange(length)[:, None] - jnp.arange(length)
        mask_BxLxL = (back_LxL >= 0) & (back_LxL <= positions_BxL[:, :, None])
        logits_BxHxLxS = jnp.where(mask_BxLxL[:, None], logits_BxHxLxS, -jnp.inf)
    elif causal:
        mask_LxL = jnp.tril(jnp.ones((length, length), bool))
        logits_BxHxLxS = jnp.where(mask_LxL, logits_BxHxLxS, -jnp.inf)
    weights = jax.nn.softmax(logits_BxHxLxS, axis=-1).astype(v.dtype)
    return jnp.matmul(weights, v).transpose(0, 2, 1, 3).reshape(b, length, d)


def attend_fused(
    q_BxLxD: jax.Array,
    k_BxLxD: jax.Array,
    v_BxLxD: jax.Array,
    heads: int,
    causal: bool = False,
    implementation: Literal["xla", "cudnn"] = "cudnn",
) -> jax.Array:
    """`attend` by jax.nn.dot_product_attention, which never holds the (B, H, L, L) weights when cuDNN does it.

    jax's cuDNN attention refuses odd lengths in training, and CLIP's are odd (77 tokens, 197 patches). They get one
    more row: under the causal mask no other row looks at it, and otherwise the sequence lengths leave it out.
    """
    b, length, d = q_BxLxD.shape
    odd = length % 2
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0))) for x in (q_BxLxD, k_BxLxD, v_BxLxD))
    q, k, v = (x.reshape(b, length + odd, heads, d // heads) for x in (q, k, v))
    lengths_B = jnp.full((b,), length, jnp.int32) if odd and not causal else None
    y_BxLxHxDh = jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=causal,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation=implementation,
    )
    return y_BxLxHxDh[:, :length].reshape(b, length, d)
