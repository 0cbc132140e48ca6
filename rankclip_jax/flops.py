"""How many operations a training step takes, and how many the devices could do: model FLOPs utilisation."""

import re

import jax

from rankclip_jax.models import CLIP

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


def step_flops(model: CLIP, batch: int, views: int = 1) -> float:
    """Floating-point operations of the towers, forward and backward, as XLA counts them unrolled, and of the loss.

    Those of one pair, times the batch and the views of each; recomputation under remat or accumulation is not counted,
    as is the custom.
    """
    plain = CLIP(model.config, model.dtype)
    images, tokens = plain.example_inputs(2)
    variables = jax.eval_shape(plain.init, jax.random.key(0), images, tokens)

    def towers(variables):
        z_img, z_txt, _ = plain.apply(variables, images, tokens)
        return z_img.sum() + z_txt.sum()

    pair = jax.jit(jax.grad(towers)).lower(variables).cost_analysis()["flops"] / 2
    return batch * views * pair + 24.0 * batch**2 * model.config.embed_dim


def utilisation(tflop_per_second: float) -> dict[str, float]:
    """{"tflops_per_device", "mfu"} at so many TFLOP/s over all devices; "mfu", the share of the devices' bfloat16 peak,
    only where that is known."""
    each = tflop_per_second / jax.device_count()
    peak = peak_tflops(jax.devices()[0].device_kind)
    return {"tflops_per_device": round(each, 4)} | ({"mfu": round(each / peak, 4)} if peak else {})
