"""How many operations a training step takes, and how many the devices could do: model FLOPs utilisation."""

import re
from collections.abc import Collection

from rankclip_jax.common.devices import Devices
from rankclip_jax.models import ClipConfig, ResNetConfig, VitConfig

# name: (memory in GB of 2^30 bytes as JAX can use it at most, dense bfloat16 TFLOP/s). From the vendors' data sheets.
ACCELERATORS = {
    "v4": (32, 275),
    "v5e": (16, 197),
    "v5p": (95, 459),
    "v6e": (32, 918),
    "T4": (16, 65),
    "L4": (24, 121),
    "A100-40": (40, 312),
    "A100-80": (80, 312),
    "H100": (80, 989),
    "H200": (141, 989),
    "B200": (180, 2250),
}
# What JAX calls them (device_kind).
_KINDS = (
    (r"TPU v4$", "v4"),
    (r"TPU v5 ?(lite|e)", "v5e"),
    (r"TPU v5p?$", "v5p"),
    (r"TPU v6 ?(lite|e)", "v6e"),
    (r"A100.*80GB", "A100-80"),
    (r"A100", "A100-40"),
    (r"\bT4\b", "T4"),
    (r"\bL4\b", "L4"),
    (r"\bH100\b(?!.*PCIe)", "H100"),
    (r"\bH200\b", "H200"),
    (r"\bB200\b", "B200"),
)


def peak_tflops(device_kind: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a device by jax.Device.device_kind; None: not in the table."""
    return next((ACCELERATORS[name][1] for kind, name in _KINDS if re.search(kind, device_kind)), None)


def step_flops(
    config: ClipConfig,
    batch: int,
    views: int = 1,
    text_rows: int | None = None,
    patches: int | None = None,
    frozen: Collection[str] = (),
) -> float:
    """Floating-point operations of a training step: matrix products and convolutions of the towers, and of the loss.

    Forward and backward. Recomputation under remat or accumulation is not counted, as is the custom; nor are norms,
    activations and softmax, which are 0.2 to 1.5 % of what XLA counts. All rows count that the text tower computes:
    `text_rows` where captions are packed; None: a row for each caption, padding included. `patches`: of an image that a
    ViT looks at; None: all. `frozen`: those of "vision" and "text" that have a forward pass alone.
    """
    vision, text, d = config.vision, config.text, config.embed_dim
    first, others = _vit(vision, d, patches) if isinstance(vision, VitConfig) else _resnet(vision, d)
    picture = first + others if "vision" in frozen else 2 * first + 3 * others
    passes = 1 if "text" in frozen else 3
    row = passes * _transformer(text.layers, text.width, text.mlp_width, text.context_length)
    pairs = batch * views
    towers = pairs * (picture + passes * text.width * d) + (pairs if text_rows is None else text_rows) * row
    return 2.0 * towers + 24.0 * batch**2 * config.embed_dim


# Multiply-adds of the forward pass of a picture or text, of a picture's first layer and of the others. A layer costs it
# three times, once more for the gradient of its input and once for that of its weights; a first layer has no gradient
# of its input.


def _transformer(layers: int, width: int, mlp_width: int | None, length: int) -> int:
    weights = 4 * width**2 + 2 * width * (mlp_width or 4 * width)
    return layers * (length * weights + 2 * length**2 * width)


def _vit(config: VitConfig, embed_dim: int, patches: int | None) -> tuple[int, int]:
    tokens, width, mlp = patches or config.grid**2, config.width, config.mlp_width or 4 * config.width
    first = tokens * 3 * config.patch_size**2 * width
    if config.pool == "map":  # a probe attends; keys, values, both products of attention, its output, an MLP
        head = 2 * tokens * width**2 + 2 * tokens * width + width**2 + 2 * width * mlp
    else:
        tokens, head = tokens + 1, width * embed_dim
    return first, _transformer(config.layers, width, mlp, tokens) + head


def _resnet(config: ResNetConfig, embed_dim: int) -> tuple[int, int]:
    width, channels, total = config.width, config.width, 0
    if config.stem == "small":
        side, first = config.image_size, _conv3(config.image_size, 1) * 3 * width
    else:
        side, first = config.image_size // 2, _conv3(config.image_size, 2) * 3 * (width // 2)
        total += _conv3(side, 1) * (width // 2) * (width // 2 + width)
        side //= 2
    for stage, blocks in enumerate(config.layers):
        planes = width * 2**stage
        for block in range(blocks):
            total += side**2 * channels * planes + _conv3(side, 1) * planes**2
            side //= 2 if stage and not block else 1  # by an average pool, after the 3x3 convolution
            total += side**2 * 4 * planes * (planes + (channels if not block else 0))
            channels = 4 * planes
    tokens = side**2 + 1  # of the attention pool, one of which asks
    total += channels**2 * (1 + 2 * tokens) + 2 * tokens * channels + channels * embed_dim
    return first, total


def _conv3(side: int, stride: int) -> int:
    """Products of a 3x3 convolution, padded by 1, for each pair of channels: taps outside the picture do not count."""
    outputs = range((side - 1) // stride + 1)
    return sum(0 <= out * stride + tap < side for out in outputs for tap in (-1, 0, 1)) ** 2


def utilisation(tflop_per_second: float, devices: Devices) -> dict[str, float]:
    """{"tflops_per_device", "mfu"} at so many TFLOP/s over all devices; "mfu", the share of the devices' bfloat16 peak,
    only where that is known."""
    each = tflop_per_second / devices.count
    peak = peak_tflops(devices.kind)
    return {"tflops_per_device": round(each, 4)} | ({"mfu": round(each / peak, 4)} if peak else {})
