"""ClipConfig from weights or from another library's config, and back.

OpenAI's code, open_clip's default and Hugging Face's older files pool a text at its highest id, ours at its end token.
Both are the same where texts have no id above the end token's. So `highest_id` is that of the tokenizer's texts
(Tokenizer.highest_id); None: the last of the vocabulary.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from rankclip_jax.models import PRESETS, ClipConfig, ResNetConfig, TextConfig, VitConfig
from rankclip_jax.models.presets import Activation


def from_ours(fields: Mapping) -> ClipConfig:
    """The inverse of `dataclasses.asdict(config)`."""
    vision = (ResNetConfig if "stem" in fields["vision"] else VitConfig)(**fields["vision"])
    return ClipConfig(**{**fields, "vision": vision, "text": TextConfig(**fields["text"])})


def from_weights(
    state: Mapping[str, np.ndarray], activation: Activation = "quick_gelu", highest_id: int | None = None
) -> ClipConfig:
    """The architecture of an OpenAI state dict, inferred from its shapes.

    Everything else is assumed to be as in all OpenAI models: heads of 64 channels (in an image tower of a preset's
    sizes as many heads as there: ViT-H, g and bigG have wider ones), the highest id as end-of-text, and the given
    activation. Raises ValueError if the state dict is not a CLIP.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        found = state[name].shape if name in state else None
        if found is None or len(found) != ndim:
            what = "is missing" if found is None else f"has shape {found}, expected {ndim} sizes"
            raise ValueError(f"{name} {what}; these are not the weights of a CLIP")
        return found

    def count(pattern: str) -> int:
        return len({m[1] for k in state if (m := re.match(pattern, k))})

    if "visual.proj" in state:
        width, _, _, patch = shape("visual.conv1.weight", 4)
        grid = math.isqrt(shape("visual.positional_embedding", 2)[0] - 1)
        layers = count(r"visual\.transformer\.resblocks\.(\d+)\.")
        mlp = _mlp(width, shape("visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0])
        towers = [preset.vision for preset in PRESETS.values() if isinstance(preset.vision, VitConfig)]
        heads = {of.heads for of in towers if (of.width, of.layers, of.mlp_width) == (width, layers, mlp)}
        vision = VitConfig(
            image_size=grid * patch,
            patch_size=patch,
            width=width,
            layers=layers,
            heads=heads.pop() if len(heads) == 1 else _heads("visual.conv1.weight", width),
            mlp_width=mlp,
        )
    else:
        stem: Literal["imagenet", "small"] = "imagenet" if "visual.conv2.weight" in state else "small"
        stages = count(r"visual\.layer(\d+)\.")
        cells = math.isqrt(shape("visual.attnpool.positional_embedding", 2)[0] - 1)
        vision = ResNetConfig(
            image_size=cells * (4 if stem == "imagenet" else 1) * 2 ** (stages - 1),
            layers=tuple(count(rf"visual\.layer{s + 1}\.(\d+)\.") for s in range(stages)),
            width=shape("visual.layer1.0.conv1.weight", 4)[0],
            stem=stem,
        )
    vocab_size, width = shape("token_embedding.weight", 2)
    text = TextConfig(
        width=width,
        heads=_heads("token_embedding.weight", width),
        layers=count(r"transformer\.resblocks\.(\d+)\."),
        context_length=shape("positional_embedding", 2)[0],
        vocab_size=vocab_size,
        eot_id=vocab_size - 1 if highest_id is None else highest_id,
        mlp_width=_mlp(width, shape("transformer.resblocks.0.mlp.c_fc.weight", 2)[0]),
    )
    return ClipConfig(shape("text_projection", 2)[1], vision, text, activation)


def _heads(name: str, width: int) -> int:
    if width % 64:
        raise ValueError(
            f"{name}: width {width} is not a multiple of 64, so the number of heads cannot be inferred; "
            "provide a config next to the weights"
        )
    return width // 64


def _mlp(width: int, mlp_width: int) -> int | None:
    return None if mlp_width == 4 * width else mlp_width


_TANH = {"approximate": "tanh"}  # of torch's GELU, as open_clip's act_kwargs
# Fields of an open_clip config that do not change the model, with their allowed values (None: any). Dropout acts only
# in training, where the trainer decides.
_OPEN_CLIP_NEUTRAL = {
    "patch_dropout": None,
    "output_tokens": None,
    "tokenizer_kwargs": None,
    "tokenizer_mode": None,
    "hf_tokenizer_name": None,
    "pad_id": None,
    "eos_id": None,
    "attn_pooler_queries": None,
    "attn_pooler_heads": None,
    "final_ln_after_pool": (False,),
    "embed_cls": (False,),
    "proj_bias": (False,),
    "no_causal_mask": (False,),
    "no_ln_pre": (False,),
    "attentional_pool": (False,),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "pool_type": ("tok", "argmax", "eos"),
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    "norm_kwargs": (None, {}),
    "act_kwargs": (None, {}, _TANH),
}


def from_open_clip(model_cfg: Mapping, highest_id: int | None = None) -> ClipConfig:
    """The architecture of 'model_cfg' in open_clip's `open_clip_config.json`.

    Raises ValueError naming the first field that differs from CLIP's own two towers.
    """
    model_cfg = {k: v for k, v in model_cfg.items() if v not in (None, False)}
    for key in model_cfg.keys() - {
        "embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias"
    }:  # fmt: skip
        raise ValueError(f"open_clip's {key} = {model_cfg[key]!r} is not supported")
    vision, text = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    size_keys = {"layers", "width", "heads", "head_width", "mlp_ratio", "patch_size", "image_size"}
    for key, value in (*vision.items(), *text.items()):
        if key in size_keys or key in ("context_length", "vocab_size"):
            continue
        allowed = _OPEN_CLIP_NEUTRAL.get(key, (None, False))
        if allowed is not None and value not in allowed:
            raise ValueError(f"open_clip's {key} = {value!r} is not supported")
    size = vision.get("image_size", 224)
    if isinstance(size, list | tuple):
        if len(set(size)) > 1:
            raise ValueError(f"open_clip's image_size = {size!r}: only square images are supported")
        size = size[0]
    width = vision.get("width", 768)
    layers = vision.get("layers", 12)
    if isinstance(layers, list | tuple):
        vision_config = ResNetConfig(size, tuple(layers), width)
    else:
        mlp = int(width * vision.get("mlp_ratio", 4.0))
        heads = width // vision.get("head_width", 64)
        vision_config = VitConfig(size, vision.get("patch_size", 16), width, layers, heads, _mlp(width, mlp))
    towers = [text] if isinstance(vision_config, ResNetConfig) else [vision, text]
    tanh = [tower.get("act_kwargs") == _TANH for tower in towers]
    if any(tanh) and (model_cfg.get("quick_gelu") or not all(tanh)):
        raise ValueError(f"open_clip's act_kwargs = {_TANH} of one tower alone, or of quick_gelu, is not supported")
    vocab_size, text_width = text.get("vocab_size", 49408), text.get("width", 512)
    highest_id = vocab_size - 1 if highest_id is None else highest_id
    return ClipConfig(
        model_cfg["embed_dim"],
        vision_config,
        TextConfig(
            text_width,
            text.get("heads", 8),
            text.get("layers", 12),
            text.get("context_length", 77),
            vocab_size,
            text.get("eos_id", 2) if text.get("pool_type") == "eos" else highest_id,
            _mlp(text_width, int(text_width * text.get("mlp_ratio", 4.0))),
        ),
        "gelu_tanh" if any(tanh) else "quick_gelu" if model_cfg.get("quick_gelu") else "gelu",
    )


def to_open_clip(config: ClipConfig) -> dict | None:
    """open_clip's 'model_cfg'; None for a ResNet that it cannot describe (stem 'small', or not 4 stages).

    Raises ValueError for SigLIP's towers: open_clip takes its pictures' from timm, under other names.
    """
    vision, text = config.vision, config.text
    if not text.causal or (isinstance(vision, VitConfig) and vision.pool == "map"):
        raise ValueError("open_clip has SigLIP's towers under other names; use --to hf")
    if isinstance(vision, ResNetConfig):
        if vision.stem != "imagenet" or len(vision.layers) != 4:
            return None
        vision_cfg = {"layers": list(vision.layers), "width": vision.width, "patch_size": None}
    else:
        vision_cfg = {
            "layers": vision.layers,
            "width": vision.width,
            "patch_size": vision.patch_size,
            "head_width": vision.width // vision.heads,
            "mlp_ratio": _ratio(vision.width, vision.mlp_width),
        }
    text_cfg: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.heads,
        "layers": text.layers,
        "mlp_ratio": _ratio(text.width, text.mlp_width),
    }
    if text.eot_id != text.vocab_size - 1:
        # open_clip pools at the highest id by default, which here is another token.
        text_cfg |= {"pool_type": "eos", "eos_id": text.eot_id}
    if config.activation == "gelu_tanh":
        text_cfg["act_kwargs"] = _TANH
        vision_cfg |= {"act_kwargs": _TANH} if isinstance(vision, VitConfig) else {}
    return {
        "embed_dim": config.embed_dim,
        "quick_gelu": config.activation == "quick_gelu",
        "vision_cfg": {"image_size": vision.image_size, **vision_cfg},
        "text_cfg": text_cfg,
    }


def _ratio(width: int, mlp_width: int | None) -> float:
    # open_clip computes int(width * ratio); the added half keeps rounding from going below.
    return 4.0 if mlp_width is None else (mlp_width + 0.5) / width


# transformers' defaults for fields missing in config.json.
_HF_VISION = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_HF_TEXT = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407,
    "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
_HF_SIGLIP: dict[str, dict] = {
    "vision_config": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "text_config": {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "vocab_size": 32000,
        "max_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
    },
}  # fmt: skip
_OF_HF: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh"}
_TO_HF = {"gelu_tanh": "gelu_pytorch_tanh"}
SIGLIP_EOS = 1  # </s> of SigLIP, <eos> of SigLIP 2


def from_hugging_face(config: Mapping, highest_id: int | None = None) -> ClipConfig:
    """The architecture of the `config.json` of a Hugging Face CLIP or SigLIP folder.

    Raises ValueError for another model type, or naming a field whose value is not supported.
    """
    kind = config.get("model_type")
    if kind == "siglip2":
        raise ValueError(
            "a NaFlex checkpoint of SigLIP 2 (model_type 'siglip2') is not supported: its pictures have any ratio; use "
            "one of fixed resolution, such as google/siglip2-base-patch16-256"
        )
    if kind not in ("clip", "siglip"):
        raise ValueError(f"unsupported model_type {kind!r}; expected 'clip' or 'siglip'")
    siglip = kind == "siglip"
    # Old files have their changes in *_config_dict, which takes precedence.
    vision, text = (
        defaults | (_HF_SIGLIP[tower] if siglip else {}) | config.get(tower, {}) | (config.get(f"{tower}_dict") or {})
        for tower, defaults in (("vision_config", _HF_VISION), ("text_config", _HF_TEXT))
    )
    eps = 1e-6 if siglip else 1e-5
    for tower in (vision, text):
        if tower["layer_norm_eps"] != eps:
            raise ValueError(f"unsupported layer_norm_eps {tower['layer_norm_eps']}; expected {eps:g}")
    if vision.get("num_channels", 3) != 3:
        raise ValueError(f"unsupported num_channels {vision['num_channels']}; expected 3")
    if vision["hidden_act"] != text["hidden_act"]:
        raise ValueError(f"unsupported: different activations, {vision['hidden_act']!r} and {text['hidden_act']!r}")
    if siglip and not vision.get("vision_use_head", True):
        raise ValueError("unsupported vision_use_head False; expected True")
    eot_id = text["eos_token_id"]
    if siglip:
        eot_id = SIGLIP_EOS  # which no tower looks for; config.json has CLIP's
    elif eot_id == 2:  # old versions write 2 for any tokenizer; transformers then pools at the highest id
        eot_id = text["vocab_size"] - 1 if highest_id is None else highest_id
    return ClipConfig(
        (text.get("projection_size") or text["hidden_size"]) if siglip else config.get("projection_dim", 512),
        VitConfig(
            vision["image_size"],
            vision["patch_size"],
            vision["hidden_size"],
            vision["num_hidden_layers"],
            vision["num_attention_heads"],
            _mlp(vision["hidden_size"], vision["intermediate_size"]),
            "map" if siglip else "class",
        ),
        TextConfig(
            text["hidden_size"],
            text["num_attention_heads"],
            text["num_hidden_layers"],
            text["max_position_embeddings"],
            text["vocab_size"],
            eot_id,
            _mlp(text["hidden_size"], text["intermediate_size"]),
            "last" if siglip else "eot",
        ),
        _OF_HF.get(text["hidden_act"], text["hidden_act"]),
    )


def to_hugging_face(config: ClipConfig, bos_id: int | None = None, pad_id: int | None = None) -> dict:
    """The contents of `config.json`.

    Raises ValueError for a model that neither `transformers.CLIPModel` nor `SiglipModel` can represent.
    """
    vision, text = config.vision, config.text
    if isinstance(vision, ResNetConfig):
        raise ValueError("Hugging Face's CLIP has no ResNet tower; write the openai layout instead")
    if config.siglip:
        kind, name, top, both = "siglip", "SiglipModel", {}, {}
        of_text = {"projection_size": config.embed_dim} | ({} if pad_id is None else {"pad_token_id": pad_id})
    elif vision.pool == "map" or not text.causal:
        raise ValueError("one tower is SigLIP's and one CLIP's, which transformers has no model for; use --to orbax")
    elif text.eot_id == 2 and text.vocab_size > 3:
        raise ValueError("with an end-of-text id of 2 transformers pools at the highest id; use another id")
    else:
        kind, name, of_text, both = "clip", "CLIPModel", {}, {"projection_dim": config.embed_dim}
        top = both | {"logit_scale_init_value": math.log(1 / 0.07)}
    shared = {"hidden_act": _TO_HF.get(config.activation, config.activation), "layer_norm_eps": text.norm_eps} | both
    return {
        "architectures": [name],
        "model_type": kind,
        **top,
        "dtype": "float32",
        "vision_config": {
            "model_type": f"{kind}_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.mlp_width or 4 * vision.width,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            **shared,
        },
        "text_config": {
            "model_type": f"{kind}_text_model",
            "hidden_size": text.width,
            "intermediate_size": text.mlp_width or 4 * text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "bos_token_id": bos_id if bos_id is not None else max(text.eot_id - 1, 0),
            "eos_token_id": text.eot_id,
            **shared,
            **of_text,
        },
    }
