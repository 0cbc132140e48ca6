"""Architectures as data: the configuration of a CLIP, the named presets, and overriding their fields."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any, Literal


def _check_multiple(size: int, unit: int, of: str) -> None:
    if size < 1 or size % unit:
        nearest = max(unit, round(size / unit) * unit)
        raise ValueError(
            f"image_size {size} is not a multiple of the vision tower's {of} {unit}; try {nearest}"
        )


def _check_heads(tower: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{tower} width {width} is not a multiple of its {heads} heads")


_MOST_LAYERS, _MOST = 512, 2**24  # far above any model: a damaged file may say more, and layers are named one by one


def _check_sizes(config: Any) -> None:
    """Every size is a whole number from 1 on, whatever file it came from."""
    for field in dataclasses.fields(config):
        value, most = getattr(config, field.name), _MOST_LAYERS if field.name == "layers" else _MOST
        no_size = field.name in ("stem", "eot_id", "vision", "text", "activation")
        if no_size or (field.name == "mlp_width" and value is None):
            continue
        sizes = value if isinstance(value, tuple) else (value,)
        if not all(type(size) is int and 1 <= size <= most for size in sizes) or not 1 <= len(sizes) <= 8:
            raise ValueError(f"{field.name} {value!r}. Expected whole numbers from 1 to {most:,}")


Activation = Literal["quick_gelu", "gelu"]


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Vision transformer. `mlp_width` None means 4 * width, as in every OpenAI model."""

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_multiple(self.image_size, self.patch_size, "patch size")
        _check_heads("vision", self.width, self.heads)

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """OpenAI's ModifiedResNet: `layers` bottlenecks a stage, the first stage `width` planes, then doubling.

    stem 'imagenet': three 3x3 convolutions, the first of stride 2, and a 2x2 average pool (stride 4 in all).
    stem 'small': one 3x3 convolution of stride 1 and no pool, for pictures of about 32 pixels (ours).
    """

    image_size: int
    layers: tuple[int, ...]
    width: int
    stem: Literal["imagenet", "small"] = "imagenet"

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        _check_sizes(self)
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f"stem {self.stem!r} is neither 'imagenet' nor 'small'")
        _check_multiple(self.image_size, self.stride, "stride")

    @property
    def stride(self) -> int:
        """Pixels along one side for each cell of the last feature map: 32 in every OpenAI model."""
        return (4 if self.stem == "imagenet" else 1) * 2 ** (len(self.layers) - 1)

    @property
    def grid(self) -> int:
        """Cells along one side of the last feature map."""
        return self.image_size // self.stride

    @property
    def out_channels(self) -> int:
        """Channels of the last feature map."""
        return self.width * 4 * 2 ** (len(self.layers) - 1)

    @property
    def heads(self) -> int:
        """Heads of the attention pool: 64 channels each, as in every OpenAI model."""
        return max(1, self.out_channels // 64)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Causal text transformer. `eot_id` is the token whose first occurrence is pooled."""

    width: int
    heads: int
    layers: int
    context_length: int = 77
    vocab_size: int = 49408
    eot_id: int = 49407
    mlp_width: int | None = None

    def __post_init__(self) -> None:
        _check_sizes(self)
        if type(self.eot_id) is not int or not 0 <= self.eot_id < self.vocab_size:
            # Otherwise no row would ever contain it, and every text would get the same embedding.
            raise ValueError(
                f"end-of-text id {self.eot_id} is not in a vocabulary of {self.vocab_size}; "
                "pass eot_id along with vocab_size"
            )
        _check_heads("text", self.width, self.heads)


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A whole dual encoder: shared embedding size, two towers, and their activation."""

    embed_dim: int
    vision: VitConfig | ResNetConfig
    text: TextConfig
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.activation not in ("quick_gelu", "gelu"):
            raise ValueError(f"activation {self.activation!r} is neither 'quick_gelu' nor 'gelu'")

    def kept_patches(self, dropout: float) -> int | None:
        """Patches of an image that a step sees where it leaves out the share `dropout`, at least one.

        None: all, where the share is 0; and of a ResNet, which has none.
        """
        vision = self.vision
        return max(1, round((1 - dropout) * vision.grid**2)) if dropout and isinstance(vision, VitConfig) else None


# OpenAI's models: Radford et al. 2021 (arXiv 2103.00020), tables 19 and 20. ViT-S/16, H/14, g/14, bigG/14: open_clip's
# sizes (the last three: Cherti et al. 2022, arXiv 2212.07143). ViT-tiny and RN-tiny are ours, for training in minutes
# on two CPU cores.
PRESETS: dict[str, ClipConfig] = {
    "ViT-B/32": ClipConfig(512, VitConfig(224, 32, 768, 12, 12), TextConfig(512, 8, 12)),
    "ViT-B/16": ClipConfig(512, VitConfig(224, 16, 768, 12, 12), TextConfig(512, 8, 12)),
    "ViT-L/14": ClipConfig(768, VitConfig(224, 14, 1024, 24, 16), TextConfig(768, 12, 12)),
    "ViT-L/14@336": ClipConfig(768, VitConfig(336, 14, 1024, 24, 16), TextConfig(768, 12, 12)),
    "ViT-H/14": ClipConfig(1024, VitConfig(224, 14, 1280, 32, 16), TextConfig(1024, 16, 24), "gelu"),
    "ViT-g/14": ClipConfig(1024, VitConfig(224, 14, 1408, 40, 16, 6144), TextConfig(1024, 16, 24), "gelu"),
    "ViT-bigG/14": ClipConfig(1280, VitConfig(224, 14, 1664, 48, 16, 8192), TextConfig(1280, 20, 32), "gelu"),
    "RN50": ClipConfig(1024, ResNetConfig(224, (3, 4, 6, 3), 64), TextConfig(512, 8, 12)),
    "RN101": ClipConfig(512, ResNetConfig(224, (3, 4, 23, 3), 64), TextConfig(512, 8, 12)),
    "RN50x4": ClipConfig(640, ResNetConfig(288, (4, 6, 10, 6), 80), TextConfig(640, 10, 12)),
    "RN50x16": ClipConfig(768, ResNetConfig(384, (6, 8, 18, 8), 96), TextConfig(768, 12, 12)),
    "RN50x64": ClipConfig(1024, ResNetConfig(448, (3, 15, 36, 10), 128), TextConfig(1024, 16, 12)),
    "ViT-S/16": ClipConfig(384, VitConfig(224, 16, 384, 12, 6), TextConfig(384, 6, 12)),
    "ViT-tiny": ClipConfig(128, VitConfig(64, 8, 192, 6, 3), TextConfig(128, 4, 3, context_length=32)),
    "RN-tiny": ClipConfig(
        128, ResNetConfig(32, (1, 1, 1, 1), 16, "small"), TextConfig(128, 4, 3, context_length=32)
    ),
}


def configure(
    name: str,
    *,
    image_size: int | None = None,
    vocab_size: int | None = None,
    eot_id: int | None = None,
    context_length: int | None = None,
    activation: Activation | None = None,
    embed_dim: int | None = None,
    vision: Mapping[str, Any] = {},
    text: Mapping[str, Any] = {},
) -> ClipConfig:
    """The preset `name` with fields replaced; None keeps the preset's value.

    `vision` and `text` replace any field of the towers' configs; the named arguments are shorthands.

    Raises ValueError, one line, for an unknown preset or field (naming the nearest valid one), an image size
    that the patch or stride does not divide, and an end-of-text id outside the vocabulary.
    """
    preset = PRESETS[_known(name, PRESETS, "model")]
    given_vision = {"image_size": image_size, **vision}
    given_text = {"vocab_size": vocab_size, "eot_id": eot_id, "context_length": context_length, **text}
    top = {"activation": activation, "embed_dim": embed_dim}
    return _replace(
        preset,
        "model",
        top | {"vision": _replace(preset.vision, "vision", given_vision)}
        | {"text": _replace(preset.text, "text", given_text)},
    )  # fmt: skip


def _replace(config: Any, what: str, fields: Mapping[str, Any]) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    given = {_known(name, names, f"{what} field"): v for name, v in fields.items() if v is not None}
    return dataclasses.replace(config, **given)


def _known(name: str, valid: Collection[str], what: str) -> str:
    if name not in valid:
        (nearest,) = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.0)
        raise ValueError(f"unknown {what} {name!r}; did you mean {nearest!r}? Valid: {', '.join(valid)}")
    return name
