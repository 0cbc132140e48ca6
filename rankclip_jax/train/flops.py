"""How many operations a training step takes, and how many the devices could do: model FLOPs utilisation."""

import re
from collections.abc import Collection, Sequence

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
    trained: Collection[str] | None = None,
) -> float:
    """Floating-point operations of a training step: matrix products and convolutions of the towers, and of the loss.

    Forward and backward. Recomputation under remat or accumulation is not counted, as is the custom; nor are norms,
    activations and softmax, which are 0.2 to 1.5 % of what XLA counts. All rows count that the text tower computes:
    `text_rows` where captions are packed; None: a row for each caption, padding included. `patches`: of an image that a
    ViT looks at; None: all.

    A layer counts once forward, once for the gradient of its weights if they are trained, and once for that of its
    input if anything before it in its tower is trained; a frozen tower so counts its forward pass alone. `trained`:
    names of trained parameters, blocks unrolled (rules.trained_names); None: all. A matrix with adapters (LoRA) is a
    trained one, since its gradient is computed; the adapters' own products are not counted.
    """
    image, text = (_Tower(name, trained) for name in ("visual", "text"))
    if isinstance(config.vision, VitConfig):
        _vit(image, config.vision, config.embed_dim, patches)
    else:
        _resnet(image, config.vision, config.embed_dim)
    own = config.text
    text.uses("token_embedding", "positional_embedding")
    _transformer(text, own.layers, own.width, own.mlp_width, own.context_length)
    row, text.total = text.total, 0
    text.uses("ln_final")
    text.layer("text_projection" if own.causal else "head", own.width * config.embed_dim)
    pairs = batch * views
    towers = pairs * (image.total + text.total) + (pairs if text_rows is None else text_rows) * row
    return 2.0 * towers + 24.0 * batch**2 * config.embed_dim


class _Tower:
    """Adds up, layer by layer, the multiply-adds of a tower for a picture or text: forward and backward.

    Attributes:
      live: whether what was computed so far depends on trained parameters.
    """

    def __init__(self, name: str, trained: Collection[str] | None):
        self.total, self.live = 0, False
        self._trained = None if trained is None else {x.removeprefix(f"{name}/") for x in trained}

    def uses(self, *names: str) -> None:
        """Parameters, or modules with some, without products that count."""
        trained = self._trained
        ends = tuple(f"{name}/" for name in names)
        self.live = self.live or trained is None or any(x in names or x.startswith(ends) for x in trained)

    def layers(self, names: Sequence[str], products: int) -> None:
        """Layers of so many products each, with the same input."""
        live = self.live
        for name in names:
            weights = self._trained is None or not self._trained.isdisjoint((name, f"{name}/kernel"))
            self.total += products * (1 + weights + live)
        self.uses(*names)

    def layer(self, name: str, products: int) -> None:
        self.layers([name], products)

    def attention(self, products: int) -> None:
        """Products of activations, both of which have gradients."""
        self.total += products * (1 + 2 * self.live)


def _transformer(tower: _Tower, layers: int, width: int, mlp_width: int | None, length: int) -> None:
    mlp = mlp_width or 4 * width
    for i in range(layers):
        block = f"transformer/resblocks_{i}"
        tower.uses(f"{block}/ln_1")
        tower.layers([f"{block}/attn/{x}_proj" for x in "qkv"], length * width**2)
        tower.attention(2 * length**2 * width)
        tower.layer(f"{block}/attn/out_proj", length * width**2)
        tower.uses(f"{block}/ln_2")
        tower.layer(f"{block}/mlp/c_fc", length * width * mlp)
        tower.layer(f"{block}/mlp/c_proj", length * width * mlp)


def _vit(tower: _Tower, config: VitConfig, embed_dim: int, patches: int | None) -> None:
    tokens, width, mlp = patches or config.grid**2, config.width, config.mlp_width or 4 * config.width
    tower.layer("conv1", tokens * 3 * config.patch_size**2 * width)
    tower.uses("class_embedding", "positional_embedding", "ln_pre")
    length = tokens + (config.pool == "class")
    _transformer(tower, config.layers, width, config.mlp_width, length)
    tower.uses("ln_post")
    if config.pool == "class":
        tower.layer("proj", width * embed_dim)
        return
    tower.layers(["attnpool/k_proj", "attnpool/v_proj"], tokens * width**2)  # a probe attends over all tokens
    tower.uses("attnpool/probe", "attnpool/q_proj")
    tower.attention(2 * tokens * width)
    tower.layer("attnpool/c_proj", width**2)
    tower.uses("attnpool/ln")
    tower.layer("attnpool/mlp/c_fc", width * mlp)
    tower.layer("attnpool/mlp/c_proj", width * mlp)


def _resnet(tower: _Tower, config: ResNetConfig, embed_dim: int) -> None:
    width, channels, side = config.width, config.width, config.image_size

    def conv(name, norm, products):
        tower.layer(name, products)
        tower.uses(norm)

    if config.stem == "small":
        conv("conv1", "bn1", _conv3(side, 1) * 3 * width)
    else:
        conv("conv1", "bn1", _conv3(side, 2) * 3 * (width // 2))
        side //= 2
        conv("conv2", "bn2", _conv3(side, 1) * (width // 2) ** 2)
        conv("conv3", "bn3", _conv3(side, 1) * (width // 2) * width)
        side //= 2
    for stage, blocks in enumerate(config.layers):
        planes = width * 2**stage
        for block in range(blocks):
            of, before = f"layer{stage + 1}_{block}", tower.live
            conv(f"{of}/conv1", f"{of}/bn1", side**2 * channels * planes)
            conv(f"{of}/conv2", f"{of}/bn2", _conv3(side, 1) * planes**2)
            side //= 2 if stage and not block else 1  # by an average pool, after the 3x3 convolution
            conv(f"{of}/conv3", f"{of}/bn3", side**2 * planes * 4 * planes)
            if not block:
                after, tower.live = tower.live, before  # the shortcut has the block's input
                conv(f"{of}/downsample_0", f"{of}/downsample_1", side**2 * channels * 4 * planes)
                tower.live = tower.live or after
            channels = 4 * planes
    tokens, live = side**2 + 1, tower.live  # of the attention pool, one of which asks
    tower.uses("attnpool/positional_embedding")
    tower.layer("attnpool/q_proj", channels**2)
    tower.live, asked = live, tower.live
    tower.uses("attnpool/positional_embedding")
    tower.layers(["attnpool/k_proj", "attnpool/v_proj"], tokens * channels**2)
    tower.live = tower.live or asked
    tower.attention(2 * tokens * channels)
    tower.layer("attnpool/c_proj", channels * embed_dim)


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
