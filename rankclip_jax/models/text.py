"""The text transformer: token ids in, the end-of-text token's embedding out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from rankclip_jax.models.layers import LayerNorm
from rankclip_jax.models.presets import TextConfig
from rankclip_jax.models.transformer import Transformer


class TextTransformer(nn.Module):
    """(B, L) token ids, L at most the context length -> (B, embed_dim), not yet of unit length.

    Pools the first token equal to `eot_id`. OpenAI's code takes the argmax of the ids, which is the same for
    its own tokenizer (end-of-text has the highest id) and wrong for others. A row without the token pools its
    first position, as `transformers` does; tokenizers must keep the token when they truncate.
    """

    config: TextConfig
    embed_dim: int
    activation: str
    dtype: DTypeLike = jnp.float32
    scan_layers: bool = False
    remat: bool | str = False
    attention: str = "xla"

    @nn.compact
    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        cfg, length = self.config, tokens_BxL.shape[1]
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
        x = embedding(tokens_BxL) + positions[:length].astype(self.dtype)
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
        )(x)
        eot_B = jnp.argmax(tokens_BxL == cfg.eot_id, axis=1)
        x_BxD = jnp.take_along_axis(x, eot_B[:, None, None], axis=1)[:, 0]
        # The norm acts on each token alone, so only the pooled one needs it.
        x_BxD = LayerNorm(self.dtype, name="ln_final")(x_BxD)
        projection = self.param(
            "text_projection", nn.initializers.normal(cfg.width**-0.5), (cfg.width, self.embed_dim)
        )
        return x_BxD @ projection.astype(self.dtype)
