"""The transformer towers: patches and a class token in, or token ids in; one embedding out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rankclip_jax.common.packing import Packed
from rankclip_jax.models.layers import LayerNorm, symmetric_uniform
from rankclip_jax.models.presets import TextConfig, VitConfig
from rankclip_jax.models.transformer import Transformer


class VisionTransformer(nn.Module):
    """(B, H, W, 3) normalised images -> (B, embed_dim), not yet of unit length.

    patches_BxK: the only patches that are looked at, by number; the class token stays. None: all.
    """

    config: VitConfig
    embed_dim: int
    activation: str
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: bool | str = False
    attention: str = "xla"

    @nn.compact
    def __call__(
        self, images_BxHxWx3: jax.Array, train: bool = False, patches_BxK: jax.Array | None = None
    ) -> jax.Array:
        cfg, width, p, g = self.config, self.config.width, self.config.patch_size, self.config.grid
        normal = nn.initializers.normal(width**-0.5)
        b = images_BxHxWx3.shape[0]

        # conv1's stride is its size, so it is one matrix product over flattened patches.
        kernel = PatchKernel(p, width, name="conv1")()
        patches = images_BxHxWx3.astype(self.dtype).reshape(b, g, p, g, p, 3).transpose(0, 1, 3, 2, 4, 5)
        patches = patches.reshape(b, g * g, p * p * 3)
        if patches_BxK is not None:
            patches = jnp.take_along_axis(patches, patches_BxK[..., None], axis=1)
        x = patches.reshape(-1, p * p * 3) @ kernel.reshape(p * p * 3, width).astype(self.dtype)

        class_embedding = self.param("class_embedding", normal, (width,)).astype(self.dtype)
        positions = self.param("positional_embedding", normal, (g * g + 1, width))
        if patches_BxK is not None:  # in float32, in which the gradient then adds up
            positions = positions[jnp.pad(patches_BxK + 1, ((0, 0), (1, 0)))]
        classes = jnp.broadcast_to(class_embedding, (b, 1, width))
        x = jnp.concatenate([classes, x.reshape(b, -1, width)], axis=1) + positions.astype(self.dtype)
        x = LayerNorm(self.dtype, name="ln_pre")(x)
        x = Transformer(
            cfg.layers,
            cfg.heads,
            cfg.mlp_width,
            self.activation,
            causal=False,
            scaled_init=False,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            attention=self.attention,
            name="transformer",
        )(x)
        x_BxD = LayerNorm(self.dtype, name="ln_post")(x[:, 0])
        return x_BxD @ self.param("proj", normal, (width, self.embed_dim)).astype(self.dtype)


class PatchKernel(nn.Module):
    """Holds conv1's weight, (p, p, 3, width)."""

    patch_size: int
    width: int

    @nn.compact
    def __call__(self) -> jax.Array:
        p = self.patch_size
        return self.param("kernel", symmetric_uniform((3 * p * p) ** -0.5), (p, p, 3, self.width))


class TextTransformer(nn.Module):
    """(B, L) token ids, L at most the context length -> (B, embed_dim), not yet of unit length.

    Pools the first token equal to `eot_id`. OpenAI's code takes the argmax of the ids, which is the same for
    its own tokenizer (end-of-text has the highest id) and wrong for others. A row without the token pools its
    first position, as `transformers` does; tokenizers must keep the token when they truncate.

    Or captions laid one behind the other (common/packing.py), (U, R, L) -> (U * c, embed_dim): the same embeddings.
    """

    config: TextConfig
    embed_dim: int
    activation: str
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: bool | str = False
    attention: str = "xla"

    @nn.compact
    def __call__(self, tokens: jax.Array | Packed) -> jax.Array:
        cfg = self.config
        if isinstance(tokens, Packed):
            tokens_BxL, places_BxL = (x.reshape(-1, x.shape[-1]) for x in (tokens.tokens, tokens.positions))
        else:
            tokens_BxL, places_BxL = tokens, None
        length = tokens_BxL.shape[1]
        embedding = nn.Embed(
            cfg.vocab_size,
            cfg.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(0.02),
            name="token_embedding",
        )
        positions = self.param(
            "positional_embedding", nn.initializers.normal(0.01), (cfg.context_length, cfg.width)
        )
        positions = positions[:length] if places_BxL is None else positions[places_BxL]
        x = embedding(tokens_BxL) + positions.astype(self.dtype)
        x = Transformer(
            cfg.layers,
            cfg.heads,
            cfg.mlp_width,
            self.activation,
            causal=True,
            scaled_init=True,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            attention=self.attention,
            name="transformer",
        )(x, places_BxL)
        if isinstance(tokens, Packed):  # each unit's ends are its own, so no row leaves its device
            x_UxTxD = x.reshape(tokens.tokens.shape[0], -1, cfg.width)
            x_BxD = jnp.take_along_axis(x_UxTxD, tokens.ends[..., None], axis=1).reshape(-1, cfg.width)
        else:
            eot_B = jnp.argmax(tokens_BxL == cfg.eot_id, axis=1)
            x_BxD = jnp.take_along_axis(x, eot_B[:, None, None], axis=1)[:, 0]
        # The norm acts on each token alone, so only the pooled one needs it.
        x_BxD = LayerNorm(self.dtype, name="ln_final")(x_BxD)
        projection = self.param(
            "text_projection", nn.initializers.normal(cfg.width**-0.5), (cfg.width, self.embed_dim)
        )
        return x_BxD @ projection.astype(self.dtype)
