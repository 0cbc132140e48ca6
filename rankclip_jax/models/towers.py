"""The transformer towers: patches in, or token ids in; one embedding out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rankclip_jax.common.packing import Packed
from rankclip_jax.models.attention import attend
from rankclip_jax.models.layers import LayerNorm, Linear, drawn, normal, symmetric_uniform
from rankclip_jax.models.presets import TextConfig, VitConfig
from rankclip_jax.models.transformer import Mlp, Transformer


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
        init = normal(width**-0.5)
        b = images_BxHxWx3.shape[0]

        # conv1's stride is its size, so it is one matrix product over flattened patches.
        pooled_by_class = cfg.pool == "class"
        kernel, *bias = PatchKernel(p, width, with_bias=not pooled_by_class, name="conv1")()
        patches = images_BxHxWx3[:, : g * p, : g * p].astype(self.dtype).reshape(b, g, p, g, p, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, g * g, p * p * 3)
        if patches_BxK is not None:
            patches = jnp.take_along_axis(patches, patches_BxK[..., None], axis=1)
        x = patches.reshape(-1, p * p * 3) @ kernel.reshape(p * p * 3, width).astype(self.dtype)

        if pooled_by_class:  # parameters are drawn in the order in which they are named
            class_embedding = self.param("class_embedding", init, (width,)).astype(self.dtype)
        positions = self.param("positional_embedding", init, (g * g + pooled_by_class, width))
        if patches_BxK is not None:  # in float32, in which the gradient then adds up
            positions = positions[jnp.pad(patches_BxK + 1, ((0, 0), (1, 0))) if pooled_by_class else patches_BxK]
        positions = positions.astype(self.dtype)
        if pooled_by_class:
            classes = jnp.broadcast_to(class_embedding, (b, 1, width))
            x = jnp.concatenate([classes, x.reshape(b, -1, width)], axis=1) + positions
            x = LayerNorm(self.dtype, name="ln_pre")(x)
        else:
            x = (x + bias[0].astype(self.dtype)).reshape(b, -1, width) + positions
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
            norm_eps=cfg.norm_eps,
            name="transformer",
        )(x)
        if pooled_by_class:
            x_BxD = LayerNorm(self.dtype, cfg.norm_eps, name="ln_post")(x[:, 0])
            return x_BxD @ self.param("proj", init, (width, self.embed_dim)).astype(self.dtype)
        x_BxLxD = LayerNorm(self.dtype, cfg.norm_eps, name="ln_post")(x)
        return AttentionPool(cfg, self.activation, self.dtype, name="attnpool")(x_BxLxD)


class PatchKernel(nn.Module):
    """Holds conv1's weight, (p, p, 3, width), and SigLIP's its bias, (width,)."""

    patch_size: int
    width: int
    with_bias: bool

    @nn.compact
    def __call__(self) -> list[jax.Array]:
        p = self.patch_size
        kernel = self.param("kernel", symmetric_uniform((3 * p * p) ** -0.5), (p, p, 3, self.width))
        return [kernel] + ([self.param("bias", nn.initializers.zeros, (self.width,))] if self.with_bias else [])


class AttentionPool(nn.Module):
    """SigLIP's head ("MAP"), (B, L, D) -> (B, D): a learned probe attends over the tokens, then x + mlp(norm(x))."""

    config: VitConfig
    activation: str
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        cfg, (b, length, d) = self.config, x_BxLxD.shape

        def linear(name):
            bound = (6 / (2 * d)) ** 0.5  # Xavier's
            return Linear(d, bound=bound, zero_bias=True, dtype=self.dtype, name=name)

        probe_1x1xD = self.param("probe", drawn(nn.initializers.xavier_uniform()), (1, 1, d))
        q_1xD = linear("q_proj")(probe_1x1xD[0])
        k, v = (linear(name)(x_BxLxD.reshape(-1, d)).reshape(b, length, d) for name in ("k_proj", "v_proj"))
        y_Bx1xD = attend(jnp.broadcast_to(q_1xD, (b, 1, d)), k, v, cfg.heads)
        x_BxD = linear("c_proj")(y_Bx1xD[:, 0])
        h_BxD = LayerNorm(self.dtype, cfg.norm_eps, name="ln")(x_BxD)
        return x_BxD + Mlp(cfg.mlp_width or 4 * d, self.activation, None, self.dtype, name="mlp")(h_BxD)


class TextTransformer(nn.Module):
    """(B, L) token ids, L at most the context length -> (B, embed_dim), not yet of unit length.

    SigLIP's attends both ways and pools the last position, whatever token is there.

    CLIP's is causal and pools the first token equal to `eot_id`. OpenAI's code takes the argmax of the ids, which is
    the same for its own tokenizer (end-of-text has the highest id) and wrong for others. A row without the token pools
    its first position, as `transformers` does; tokenizers must keep the token when they truncate. It also takes
    captions laid one behind the other (common/packing.py), (U, R, L) -> (U * c, embed_dim): the same embeddings.
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
            embedding_init=normal(0.02),
            name="token_embedding",
        )
        positions = self.param("positional_embedding", normal(0.01), (cfg.context_length, cfg.width))
        positions = positions[:length] if places_BxL is None else positions[places_BxL]
        x = embedding(tokens_BxL) + positions.astype(self.dtype)
        x = Transformer(
            cfg.layers,
            cfg.heads,
            cfg.mlp_width,
            self.activation,
            causal=cfg.causal,
            scaled_init=True,
            dtype=self.dtype,
            scan_layers=self.scan_layers,
            remat=self.remat,
            attention=self.attention,
            norm_eps=cfg.norm_eps,
            name="transformer",
        )(x, places_BxL)
        if not cfg.causal:
            x_BxD = LayerNorm(self.dtype, cfg.norm_eps, name="ln_final")(x[:, -1])
            std = cfg.width**-0.5
            return Linear(self.embed_dim, std=std, zero_bias=True, dtype=self.dtype, name="head")(x_BxD)
        if isinstance(tokens, Packed):  # each unit's ends are its own, so no row leaves its device
            x_UxTxD = x.reshape(tokens.tokens.shape[0], -1, cfg.width)
            x_BxD = jnp.take_along_axis(x_UxTxD, tokens.ends[..., None], axis=1).reshape(-1, cfg.width)
        else:
            eot_B = jnp.argmax(tokens_BxL == cfg.eot_id, axis=1)
            x_BxD = jnp.take_along_axis(x, eot_B[:, None, None], axis=1)[:, 0]
        # The norm acts on each token alone, so only the pooled one needs it.
        x_BxD = LayerNorm(self.dtype, name="ln_final")(x_BxD)
        projection = self.param("text_projection", normal(cfg.width**-0.5), (cfg.width, self.embed_dim))
        return x_BxD @ projection.astype(self.dtype)
