"""Which JAX this machine needs. Imported before anything is installed: the standard library and packaging alone."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

NVIDIA_DRIVER = "/proc/driver/nvidia/version"


def requirements() -> list[str]:
    """What the project asks for: by its installed metadata, or in a checkout by the file beside the package."""
    try:
        return importlib.metadata.requires("rankclip_jax") or []
    except importlib.metadata.PackageNotFoundError:
        lines = (Path(__file__).parents[2] / "requirements.txt").read_text().splitlines()
        return [line for line in (line.partition("#")[0].strip() for line in lines) if line]


def version(package: str) -> str | None:
    """That of an installed package, by its name on PyPI; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def driver(driver_file: str = NVIDIA_DRIVER) -> int | None:
    """The NVIDIA driver's major version; None: there is none, or it does not say (WSL)."""
    try:
        found = re.search(r"^NVRM version:.*?\s(\d+)\.\d", Path(driver_file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def extra(driver_file: str = NVIDIA_DRIVER) -> str:
    """What stands in jax[...] for this machine: "cuda13" from NVIDIA driver 580 on, otherwise "cuda12"; "tpu"; ""."""
    number = driver(driver_file)
    if number or any(Path(path).exists() for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")):
        return "cuda13" if number and number >= 580 else "cuda12"
    return "tpu" if [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")] else ""


def plugins() -> dict[str, dict[str, str]]:
    """JAX's CUDA packages that are installed: {"cuda12": {"jax-cuda12-plugin": "0.12.0", "jax-cuda12-pjrt": ...}}."""
    names = {cuda: [f"jax-{cuda}-plugin", f"jax-{cuda}-pjrt"] for cuda in ("cuda13", "cuda12")}
    found = {cuda: {name: there for name in names[cuda] if (there := version(name))} for cuda in names}
    return {cuda: versions for cuda, versions in found.items() if versions}


def pip_lines(extra: str, specifier: str = "") -> list[str]:
    """pip's arguments that install jax[extra]. Of two CUDAs JAX takes either, so the other one is removed first."""
    others = [name for cuda, versions in plugins().items() if cuda != extra for name in versions]
    remove = [f"uninstall -y {' '.join(others)}"] if others and extra.startswith("cuda") else []
    return [*remove, f"install 'jax{f'[{extra}]' if extra else ''}{specifier}'"]


def shell(pip_lines: list[str]) -> str:
    """One command of them all; "" of none."""
    return " && ".join(f"pip {line}" for line in pip_lines)


def missing(driver_file: str = NVIDIA_DRIVER, found: tuple[str, str] | None = None) -> str:
    """The command that installs JAX for this machine; "" where the one that is there is new enough and sees the device.

    Args:
      driver_file: where the NVIDIA driver says its version.
      found: JAX's version and default backend; None: a process of its own is asked, so that none is imported here.
    """
    wanted = next(each for each in map(Requirement, requirements()) if each.name == "jax")
    if found is None:
        asked = [sys.executable, "-c", "import jax; print(jax.__version__, jax.default_backend())"]
        said = subprocess.run(asked, capture_output=True, text=True).stdout.split()
        found = (said[0], said[1]) if len(said) >= 2 else ("0", "none")
    number, backend = found
    needed = extra(driver_file)
    sees = backend == {"tpu": "tpu", "": backend}.get(needed, "gpu")
    fits = wanted.specifier.contains(number, prereleases=True)
    return "" if fits and sees else shell(pip_lines(needed, str(wanted.specifier)))
