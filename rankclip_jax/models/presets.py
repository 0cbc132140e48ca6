"""Architectures as data: the configuration of a CLIP, the named presets, and overriding their fields."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args


def _check_multiple(size: int, unit: int, of: str) -> None:
    if size < 1 or size % unit:
        nearest = max(unit, round(size / unit) * unit)
        raise ValueError(
            f"image_size {size} is not a multiple of the vision tower's {of} {unit}; try {nearest}"
        )


def _check_heads(tower: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{tower} width {width} is not a multiple of its {heads} heads")


def _check_pool(tower: str, pool: str, known: tuple[str, ...]) -> None:
    if pool not in known:
        raise ValueError(f"{tower} pool {pool!r} is neither {known[0]!r} nor {known[1]!r}")


_MOST_LAYERS, _MOST = 512, 2**24  # far above any model: a damaged file may say more, and layers are named one by one


def _check_sizes(config: Any) -> None:
    """Every size is a whole number from 1 on, whatever file it came from."""
    for field in dataclasses.fields(config):
        value, most = getattr(config, field.name), _MOST_LAYERS if field.name == "layers" else _MOST
        no_size = field.name in ("stem", "pool", "eot_id", "vision", "text", "activation")
        if no_size or (field.name == "mlp_width" and value is None):
            continue
        sizes = value if isinstance(value, tuple) else (value,)
        if not all(type(size) is int and 1 <= size <= most for size in sizes) or not 1 <= len(sizes) <= 8:
            raise ValueError(f"{field.name} {value!r}. Expected whole numbers from 1 to {most:,}")


Activation = Literal["quick_gelu", "gelu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Vision transformer. `mlp_width` None means 4 * width, as in every OpenAI model.

    pool 'class': CLIP's: a class token, a norm before the blocks, a projection.
    pool 'map': SigLIP's: a probe attends over the patches, then an MLP; no projection, and pixels beyond the last whole
    patch are not looked at (So400m/14 has 384 = 27 * 14 + 6).
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_width: int | None = None
    pool: Literal["class", "map"] = "class"

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_pool("vision", self.pool, ("class", "map"))
        if self.pool == "class":
            _check_multiple(self.image_size, self.patch_size, "patch size")
        elif self.image_size < self.patch_size:
            raise ValueError(f"image_size {self.image_size} is less than the patch size {self.patch_size}")
        _check_heads("vision", self.width, self.heads)

    @property
    def norm_eps(self) -> float:
        """Epsilon of the tower's layer norms."""
        return 1e-6 if self.pool == "map" else 1e-5

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
    """Text transformer.

    pool 'eot': CLIP's: causal, pools the first `eot_id`, and what follows that has no effect.
    pool 'last': SigLIP's: attends both ways, padding included, pools the last position, and its head has a bias.
    """

    width: int
    heads: int
    layers: int
    context_length: int = 77
    vocab_size: int = 49408
    eot_id: int = 49407
    mlp_width: int | None = None
    pool: Literal["eot", "last"] = "eot"

    def __post_init__(self) -> None:
        _check_sizes(self)
        _check_pool("text", self.pool, ("eot", "last"))
        if type(self.eot_id) is not int or not 0 <= self.eot_id < self.vocab_size:
            # Otherwise no row would ever contain it, and every text would get the same embedding.
            raise ValueError(
                f"end-of-text id {self.eot_id} is not in a vocabulary of {self.vocab_size}; "
                "pass eot_id along with vocab_size"
            )
        _check_heads("text", self.width, self.heads)

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it, so that texts may be cut, packed and padded with anything."""
        return self.pool == "eot"

    @property
    def norm_eps(self) -> float:
        """Epsilon of the tower's layer norms."""
        return 1e-6 if self.pool == "last" else 1e-5


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """A whole dual encoder: shared embedding size, two towers, and their activation."""

    embed_dim: int
    vision: VitConfig | ResNetConfig
    text: TextConfig
    activation: Activation = "quick_gelu"

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.activation not in get_args(Activation):
            raise ValueError(f"activation={self.activation!r}. Expected one of {', '.join(get_args(Activation))}")
        if isinstance(self.vision, VitConfig) and self.vision.pool == "map" and self.vision.width != self.embed_dim:
            raise ValueError(
                f"embed_dim {self.embed_dim}: SigLIP's image tower has no projection, so it must be vision's width "
                f"{self.vision.width}"
            )

    @property
    def siglip(self) -> bool:
        """Whether both towers are SigLIP's; then the model has a logit bias, whatever the loss."""
        return isinstance(self.vision, VitConfig) and self.vision.pool == "map" and self.text.pool == "last"


# The OpenAI models: Radford et al. 2021 (arXiv 2103.00020), tables 19 and 20. ViT-S/16: open_clip's sizes.
# ViT-tiny and RN-tiny are ours, for training in minutes on two CPU cores.
PRESETS: dict[str, ClipConfig] = {
    "ViT-B/32": ClipConfig(512, VitConfig(224, 32, 768, 12, 12), TextConfig(512, 8, 12)),
    "ViT-B/16": ClipConfig(512, VitConfig(224, 16, 768, 12, 12), TextConfig(512, 8, 12)),
    "ViT-L/14": ClipConfig(768, VitConfig(224, 14, 1024, 24, 16), TextConfig(768, 12, 12)),
    "RN50": ClipConfig(1024, ResNetConfig(224, (3, 4, 6, 3), 64), TextConfig(512, 8, 12)),
    "RN101": ClipConfig(512, ResNetConfig(224, (3, 4, 23, 3), 64), TextConfig(512, 8, 12)),
    "RN50x4": ClipConfig(640, ResNetConfig(288, (4, 6, 10, 6), 80), TextConfig(640, 10, 12)),
    "ViT-S/16": ClipConfig(384, VitConfig(224, 16, 384, 12, 6), TextConfig(384, 6, 12)),
    "ViT-tiny": ClipConfig(128, VitConfig(64, 8, 192, 6, 3), TextConfig(128, 4, 3, context_length=32)),
    "RN-tiny": ClipConfig(
        128, ResNetConfig(32, (1, 1, 1, 1), 16, "small"), TextConfig(128, 4, 3, context_length=32)
    ),
}

# SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2 (Tschannen et al. 2025, arXiv 2502.14786), the fixed
# resolutions that were published: width, layers, heads and MLP of each tower. The giant has So400m's text tower.
_SIGLIP = {
    "B": (768, 12, 12, None),
    "L": (1024, 24, 16, None),
    "So400m": (1152, 27, 16, 4304),
    "g-opt": (1536, 40, 16, None),
}
_RESOLUTIONS = {
    "B/32": (256,),
    "B/16": (224, 256, 384, 512),
    "L/16": (256, 384, 512),
    "So400m/14": (224, 384),
    "So400m/16": (256, 384, 512),
    "g-opt/16": (256, 384),
}
_ONLY_SIGLIP2 = ("B/32", "So400m/16", "g-opt/16")


def _siglip(kind: str, side: int) -> ClipConfig:
    size, patch = kind.split("/")
    width, layers, heads, mlp = _SIGLIP[size]
    text_width, text_layers, text_heads, text_mlp = _SIGLIP["So400m" if size == "g-opt" else size]
    vocabulary = 256_000 if kind in _ONLY_SIGLIP2 else 32_000
    text = TextConfig(text_width, text_heads, text_layers, 64, vocabulary, 1, text_mlp, "last")
    return ClipConfig(width, VitConfig(side, int(patch), width, layers, heads, mlp, "map"), text, "gelu_tanh")


PRESETS |= {  # "SigLIP-B/16" is the lowest resolution, "SigLIP-B/16@384" another
    f"SigLIP-{kind}" + (f"@{side}" if side != sides[0] else ""): _siglip(kind, side)
    for kind, sides in _RESOLUTIONS.items()
    for side in sides
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
