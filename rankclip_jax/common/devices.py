"""What a program may know of the devices that it is for. It is read off the mesh, never off the local machine."""

import dataclasses
from collections.abc import Sequence

import jax

from rankclip_jax.common.tasks import cores


@dataclasses.dataclass(frozen=True)
class Devices:
    """A kind of device, and how many of them run one program together.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      kind: as JAX calls it (jax.Device.device_kind): "NVIDIA H100 80GB HBM3", "TPU v5 lite", "cpu".
      capability: CUDA compute capability, 9.0 for an H100; None on anything but an NVIDIA GPU.
      count: devices of all processes.
    """

    platform: str
    kind: str
    capability: float | None
    count: int

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies bfloat16 in hardware: not a GPU before Ampere, such as Colab's T4."""
        return self.capability is None or self.capability >= 8.0

    def __str__(self) -> str:
        of_host = f" ({cores()} cores)" if self.platform == "cpu" else ""
        return f"{self.count} x {self.kind}{of_host}"


def host_device() -> jax.Device | None:
    """The first CPU device; None where JAX_PLATFORMS leaves the CPU out, for which JAX takes its default."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def devices_of(devices: jax.sharding.Mesh | Sequence[jax.Device]) -> Devices:
    """The record of a mesh, or of a list of devices; all of them are of one kind."""
    devices = list(devices.devices.flat if isinstance(devices, jax.sharding.Mesh) else devices)
    try:
        capability = float(devices[0].compute_capability)
    except (AttributeError, TypeError, ValueError):  # no GPU, or AMD's "gfx942"
        capability = None
    return Devices(devices[0].platform, devices[0].device_kind, capability, len(devices))
