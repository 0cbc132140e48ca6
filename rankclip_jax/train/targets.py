"""Devices that this machine lacks, to compile for: their own compilers run on any CPU, ahead of time.

A GPU's needs two wheels, a TPU's one (`HOW_TO_INSTALL`). The program is then the one that runs there: memory, fusions,
collectives and attention are real. PTX is emitted but not assembled, so registers and times are not known.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import jaxlib.version

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.train.flops import ACCELERATORS

_V = jaxlib.version.__version__
HOW_TO_INSTALL = {
    "gpu": f"pip install --no-deps jax-cuda13-plugin=={_V} jax-cuda13-pjrt=={_V}",
    "tpu": "pip install libtpu",
}


@dataclasses.dataclass(frozen=True)
class Target:
    """What a program is compiled for: `kind` of flops.ACCELERATORS, `platform` "gpu" or "tpu", and a TPU's topology.

    Or as many fake CPU devices: kind and platform "cpu".
    """

    kind: str
    platform: str
    count: int
    topology: str | None


def parse_target(text: str) -> Target:
    """A TPU topology ("v5e:4x4") or a number of GPUs ("8xH100").

    Raises:
      InputError: neither of the two, or no accelerator of flops.ACCELERATORS.
    """
    gpu = re.fullmatch(r"([1-9]\d*)x([A-Za-z0-9-]+)", text)
    tpu = re.fullmatch(r"(v\w+):\d+(x\d+)+", text)
    if tpu and tpu[1] in ACCELERATORS:
        count = math.prod(int(size) for size in text.partition(":")[2].split("x"))
        return Target(tpu[1], "tpu", count, text)
    if gpu and gpu[2] in ACCELERATORS and not gpu[2].startswith("v"):
        return Target(gpu[2], "gpu", int(gpu[1]), None)
    raise InputError(
        f"config.plan.target={text!r}. Expected a TPU topology such as v5e:4x4, or a number of GPUs such as 8xH100; "
        f"known are {', '.join(ACCELERATORS)}"
    )


def has_compiler(platform: str) -> bool:
    """Whether the compiler for "gpu" or "tpu" is installed here; False for "cpu", whose devices are fake ones."""
    names = {"gpu": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "tpu": ("libtpu",), "cpu": ()}[platform]
    return any(_is_installed(name) for name in names)


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package that it is in
        return False


def environment(platform: str) -> dict[str, str]:
    """os.environ for a process that compiles for "gpu", "tpu" or "cpu" and asks no accelerator of this machine."""
    extra = {}
    if platform == "gpu":
        # Both choose kernels by running them, which takes a GPU.
        extra = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"}
    elif platform == "tpu":
        # libtpu neither looks for a TPU's neighbours nor minds other compilations. At its usual level it takes ten
        # times as long, for a better schedule, and gives some operations -1 s. Flags for other devices end its process.
        extra = {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "JAX_OPTIMIZATION_LEVEL": "O1",
            "XLA_FLAGS": "",
        }
    return os.environ | {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"} | extra


def devices(target: Target) -> list:
    """Compile-only devices, for meshes, shardings and jit(...).lower(...).compile(); in a process with `environment`.

    Raises:
      InputError: the compiler is not installed, or does not know the target.
    """
    from jax.experimental import topologies

    name = target.topology or f"{target.count}x{target.kind}"
    if not has_compiler(target.platform):
        raise InputError(f"{name}: its compiler is not installed. Run: {HOW_TO_INSTALL[target.platform]}")
    if target.platform == "gpu":
        per_host = min(8, target.count)
        hosts, rest = divmod(target.count, per_host)
        if rest:
            raise InputError(f"{name}: expected at most 8 GPUs, or a multiple of 8, which is a host")
        given = dict(platform="cuda", topology_name=target.kind.lower(), topology=f"1x{hosts}x{per_host}")
        given["target_config"] = gpu_description(target.kind)
    else:
        given = dict(platform="tpu", topology_name=target.topology)
    try:
        return list(topologies.get_topology_desc(**given).devices)
    except Exception as error:  # jaxlib raises several kinds
        raise InputError(f"{name}: {one_line(error)}") from None


@contextlib.contextmanager
def cudnn_assumed() -> Iterator[None]:
    """cuDNN attention traces without cuDNN: jax asks for the version of the local library, which is not the target's.

    The one place that reaches into jax for it; jax._src.cudnn is private.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    asked = fused.check_cudnn_version
    fused.check_cudnn_version = lambda: 91000
    try:
        yield
    finally:
        fused.check_cudnn_version = asked


class _Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units of one
    threads: int  # of one, at most
    shared_memory: int  # bytes of one; a block can have 1,024 fewer
    memory: int  # bytes
    bandwidth: int  # bytes a second
    l2: int  # bytes
    ghz: float


# As XLA publishes them (xla/backends/gpu/target_config/specs); T4 and L4 by NVIDIA's data sheets and the CUDA
# programming guide's table of compute capabilities 7.5 and 8.9.
_GPUS = {
    "T4": _Gpu("Tesla T4", (7, 5), 40, 64, 1024, 65536, 15828320256, 320064000000, 4194304, 1.59),
    "L4": _Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 102400, 23609475072, 300096000000, 50331648, 2.04),
    "A100-40": _Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 167936, 42331013120, 1555200000000, 41943040, 1.41),
    "A100-80": _Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167936, 85100068864, 2039040000000, 41943040, 1.41),
    "H100": _Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233472, 84942979072, 3352320000000, 52428800, 1.98),
    "H200": _Gpu("NVIDIA H200", (9, 0), 132, 128, 2048, 233472, 151397597184, 4800000000000, 52428800, 1.98),
    "B200": _Gpu("NVIDIA B200", (10, 0), 148, 128, 2048, 233472, 191514411008, 7672320000000, 132644864, 1.965),
}


def gpu_description(kind: str) -> str:
    """XLA's GpuTargetConfigProto of a GPU of flops.ACCELERATORS, as text."""
    gpu = _GPUS[kind]
    major, minor = gpu.capability
    # A version of CUB that XLA has no table for: with one it asks a device how much memory its sort takes.
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.shared_memory - (1024 if major > 7 else 0)}
  threads_per_core_limit: {gpu.threads}
  core_count: {gpu.cores}
  fpus_per_core: {gpu.fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.ghz}
  device_memory_size: {gpu.memory}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  ecc_enabled: true
  device_interconnect_info {{ active_links: {18 if major >= 9 else 12} }}
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  name: "{gpu.name}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
  cub_version: "3.2.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "{gpu.name}"
"""
