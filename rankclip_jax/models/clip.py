"""The dual encoder: two towers, unit-length embeddings, a learned logit scale."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rankclip_jax.common.devices import Devices
from rankclip_jax.common.packing import Packed
from rankclip_jax.models.attention import choose_attention
from rankclip_jax.models.layers import l2_normalize
from rankclip_jax.models.presets import ClipConfig, VitConfig, configure
from rankclip_jax.models.resnet import ModifiedResNet
from rankclip_jax.models.towers import TextTransformer, VisionTransformer
from rankclip_jax.models.transformer import REMAT_POLICIES


class CLIP(nn.Module):
    """CLIP as OpenAI's, or SigLIP. Parameters are float32, the towers compute in `dtype`, embeddings are float32.

    variables = model.init(key, *model.example_inputs())  # 'params' and, for a ResNet, 'batch_stats'
    z_img, z_txt, scale = model.apply(variables, images, tokens)
    z_img = model.apply(variables, images, method='encode_image')
    ResNet training: (z_img, z_txt, scale), new = model.apply(..., train=True, mutable=['batch_stats'])
    """

    config: ClipConfig
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: bool | str = False
    initial_scale: float = math.log(1 / 0.07)
    initial_bias: float | None = None
    attention: str = "xla"

    def setup(self) -> None:
        cfg = self.config
        computed = self.dtype, self.scan_layers, self.remat, self.attention
        if isinstance(cfg.vision, VitConfig):
            self.visual: nn.Module = VisionTransformer(cfg.vision, cfg.embed_dim, cfg.activation, *computed)
        else:
            self.visual = ModifiedResNet(cfg.vision, cfg.embed_dim, self.dtype, self.remat)
        self.text = TextTransformer(cfg.text, cfg.embed_dim, cfg.activation, *computed)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(self.initial_scale), ())
        if self.initial_bias is not None or cfg.siglip:  # a parameter of SigLIP's loss, which no tower needs
            bias = -10.0 if self.initial_bias is None else self.initial_bias
            self.param("logit_bias", nn.initializers.constant(bias), ())

    def encode_image(self, images_BxHxWx3: jax.Array, train: bool = False) -> jax.Array:
        """Normalised float images (B, size, size, 3) -> (B, D) float32 of unit length.

        `train` uses (and, if mutable, updates) batch statistics; a ViT has none.
        Raises ValueError for images that are not of the model's size.
        """
        size = self.config.vision.image_size
        if images_BxHxWx3.shape[1:] != (size, size, 3):
            raise ValueError(f"images {images_BxHxWx3.shape} given to a model of (batch, {size}, {size}, 3)")
        return l2_normalize(self.visual(images_BxHxWx3, train))

    def encode_text(self, tokens: jax.Array | Packed) -> jax.Array:
        """Token ids (B, L) int32 -> (B, D) float32 of unit length. L may be below the context length.

        Packed captions (common/packing.py), c in each of U units -> (U * c, D).
        Raises ValueError for longer rows. Ids are not checked: inside jit they are not known.
        """
        limit, packed = self.config.text.context_length, isinstance(tokens, Packed)
        if packed and not self.config.text.causal:
            raise ValueError("captions cannot be packed for a text tower that attends both ways")
        shape = tokens.tokens.shape if isinstance(tokens, Packed) else tokens.shape
        if len(shape) != 2 + packed or not 0 < shape[-1] <= limit:
            raise ValueError(f"tokens {shape} given to a model of (batch, 1..{limit})")
        return l2_normalize(self.text(tokens))

    def __call__(
        self, images_BxHxWx3: jax.Array, tokens: jax.Array | Packed, train: bool = False
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns z_img_BxD, z_txt_BxD and the logit multiplier exp(logit_scale), a float32 scalar."""
        z_img_BxD = self.encode_image(images_BxHxWx3, train)
        return z_img_BxD, self.encode_text(tokens), jnp.exp(self.logit_scale)

    def example_inputs(self, batch: int = 1) -> tuple[jax.Array, jax.Array]:
        """Zero images and tokens of the right shapes, for init and eval_shape."""
        size, length = self.config.vision.image_size, self.config.text.context_length
        return jnp.zeros((batch, size, size, 3)), jnp.zeros((batch, length), jnp.int32)


def build(
    name: str,
    *,
    dtype: str = "float32",
    scan_layers: bool = False,
    remat: bool | str = False,
    logit_scale: float | None = None,
    logit_bias: float | None = None,
    attention: str = "auto",
    devices: Devices | None = None,
    **overrides: Any,
) -> CLIP:
    """A CLIP from a preset. `overrides` are those of `presets.configure`.

    dtype: 'float32' or 'bfloat16', what the towers compute in. scan_layers: transformer blocks under one
    scan (smaller programs, stacked parameters). remat: recompute blocks in the backward pass, all of them (True) or
    what a policy of REMAT_POLICIES does not keep. logit_scale: what the learned logarithm of the multiplier starts at
    (None: CLIP's ln(1 / 0.07)). logit_bias: what a learned bias, of SigLIP's loss, starts at (None: -10 in SigLIP's
    architecture, no such parameter in another).
    attention: 'auto', 'xla' or 'cudnn', as `choose_attention` has it for `devices` (None: 'xla').
    Raises ValueError as `configure` and `choose_attention` do, and for another dtype or remat.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}. Expected 'float32' or 'bfloat16'")
    if remat not in (False, True, None, *REMAT_POLICIES):
        raise ValueError(f"remat={remat!r}. Expected False, True, or one of {', '.join(REMAT_POLICIES)}")
    start = CLIP.initial_scale if logit_scale is None else logit_scale
    config = configure(name, **overrides)
    attention = choose_attention(attention, config, dtype, devices) if devices else "xla"
    return CLIP(config, jnp.dtype(dtype), scan_layers, remat, start, logit_bias, attention)
