"""CLIP in flax.linen: the only room that knows a neural network library.

Parameters are plain nested dicts of float32 arrays under OpenAI CLIP's names, in two subtrees and a scalar:

    visual/...       ViT: conv1, class_embedding, positional_embedding, ln_pre, transformer, ln_post, proj
                     SigLIP: conv1 (with bias), positional_embedding, transformer, ln_post, attnpool (with mlp)
                     ResNet: conv1..3, bn1..3, layer1_0.. (stage_block), attnpool
    text/...         token_embedding, positional_embedding, transformer, ln_final, text_projection (SigLIP: head)
    logit_scale      float32 scalar, the logarithm of the multiplier
    logit_bias       float32 scalar, only of SigLIP's architecture or where SigLIP's loss asks for it

Transformer blocks are `transformer/resblocks_<n>/...`, or `transformer/resblocks/...` with a leading layer
axis when scanned; `stack_layers` and `unstack_layers` go from one to the other.
"""

from rankclip_jax.models.attention import choose_attention
from rankclip_jax.models.clip import CLIP, build
from rankclip_jax.models.presets import PRESETS, ClipConfig, ResNetConfig, TextConfig, VitConfig, configure
from rankclip_jax.models.transformer import cut_layers, part_start, stack_layers, uncut_layers, unstack_layers

__all__ = [
    "CLIP",
    "PRESETS",
    "ClipConfig",
    "ResNetConfig",
    "TextConfig",
    "VitConfig",
    "build",
    "choose_attention",
    "configure",
    "cut_layers",
    "part_start",
    "stack_layers",
    "uncut_layers",
    "unstack_layers",
]
