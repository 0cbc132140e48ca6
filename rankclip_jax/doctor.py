"""Looks at what a run needs of this machine, and says in one line how to fix what is wrong.

python -m rankclip_jax.doctor [--workdir DIR] [--tokenizer PATH_OR_HUB_ID]
"""

import argparse
import errno
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from rankclip_jax.common import commands, jax_install
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.tasks import cores


class Finding(NamedTuple):
    """One line of the report: `remedy` is None where all is well."""

    what: str
    found: str
    remedy: str | None = None


def packages(requirements: list[str]) -> Iterator[Finding]:
    """Compares what is installed with requirements as pip writes them ("jax>=0.10.0")."""
    for requirement in map(Requirement, requirements):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        remedy = f"pip install '{requirement.name}{requirement.specifier}'"
        if (version := jax_install.version(requirement.name)) is None:
            yield Finding(requirement.name, "not installed", remedy)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Finding(requirement.name, version, None if fits else remedy)


def jax_plugins(driver_file: str = jax_install.NVIDIA_DRIVER) -> Iterator[Finding]:
    """JAX's CUDA packages, where there are any: of one CUDA, and of jaxlib's version, for others are not used."""
    installed, jaxlib = jax_install.plugins(), jax_install.version("jaxlib")
    if not installed or not jaxlib:
        return
    extra, driver = jax_install.extra(driver_file), jax_install.driver(driver_file)
    if extra not in installed and not (driver and extra == "cuda12"):  # a new driver runs either
        extra = next(iter(installed))
    alike = [Version(it).release == Version(jaxlib).release for it in installed.get(extra, {}).values()]
    lines = jax_install.pip_lines(extra, f"=={jax_install.version('jax') or jaxlib}")
    lines = lines[:-1] if alike == [True, True] else lines
    versions = [f"{name} {version}" for each in installed.values() for name, version in each.items()]
    yield Finding("JAX's CUDA", f"{', '.join(versions)}; jaxlib {jaxlib}", jax_install.shell(lines) or None)


def devices(driver_file: str = jax_install.NVIDIA_DRIVER) -> Iterator[Finding]:
    """The devices that JAX has, and whether it overlooks a GPU; a small training step on each backend."""
    extra = jax_install.extra(driver_file)
    install = jax_install.shell(jax_install.pip_lines(extra))
    try:
        import jax

        jax.devices()
    except Exception as error:  # whatever an old, broken or mismatched jax raises
        yield Finding("devices", one_line(error, kind=True), f"pip install -r requirements.txt && {install}")
        return
    backend = jax.default_backend()
    kinds = sorted({device.device_kind for device in jax.devices()})
    idle_gpu = backend == "cpu" and extra.startswith("cuda")
    driver = jax_install.driver(driver_file) or "unknown"
    remedy = f"JAX does not use the NVIDIA GPU of this machine (driver {driver}): {install}" if idle_gpu else None
    yield Finding("devices", f"{jax.device_count()} {backend} ({', '.join(kinds)})", remedy)
    from rankclip_jax.common.devices import devices_of

    local = devices_of(jax.local_devices())
    if not local.has_bfloat16:
        said = f"not in hardware before Ampere (compute capability {local.capability})"
        yield Finding("bfloat16", f"{said}: leave config.model.dtype at float32")
    for name in dict.fromkeys((backend, "cpu")):
        try:
            loss, first, second = _small_step(jax.local_devices(backend=name)[:1])
        except Exception as error:  # the same
            remedy = f"fix the packages named above, then reinstall jax, jaxlib and the driver of {name}"
            yield Finding(f"training step on {name}", one_line(error, kind=True), remedy)
            continue
        well = 0 < loss < 100
        yield Finding(
            f"training step on {name}",
            f"loss {loss:.3f}, {1000 * second:.0f} ms after {first:.1f} s of compiling",
            None if well else f"JAX computes wrongly on {name}: reinstall jax and jaxlib, and the driver",
        )


def _small_step(where: list) -> tuple[float, float, float]:
    """Loss, seconds of the first and of the second step of a small model on the devices `where`."""
    (step, state, batch), seconds = small_program(where), []
    for _ in range(2):
        start = time.perf_counter()
        state, numbers = step(state, batch)
        loss = float(numbers["loss"])
        seconds.append(time.perf_counter() - start)
    return loss, seconds[0], seconds[1]


def small_program(where: Sequence) -> tuple:
    """A training step of a small model, its state and a batch on the devices `where`."""
    import numpy as np

    from rankclip_jax import config as configs
    from rankclip_jax import models
    from rankclip_jax.parallel.mesh import make_mesh, to_devices
    from rankclip_jax.train import optim
    from rankclip_jax.train import step as steps

    config = configs.complete({"loss": {"schedule": "constant"}, "optim": {"warmup_steps": 0}})
    model = models.build("ViT-tiny", image_size=32, context_length=8, vocab_size=64, eot_id=63, scan_layers=True)
    mesh = make_mesh({"data": 1}, where)
    tx = optim.make_optimizer(config.optim, 10)
    state = steps.Fresh(model, tx, 0, mesh, None).state()
    step = steps.make_train_step(model, tx, config, mesh, total_steps=10, steps_per_epoch=10)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 32, 32, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 64, (8, 8)).astype(np.int32),
    }
    return step, state, to_devices(batch, mesh)


def pipeline(pictures: int = 400) -> Iterator[Finding]:
    """Whether TensorFlow keeps off the accelerators, how fast it decodes, and whether TensorBoard can be written."""
    off = "pip uninstall -y tensorflow && pip install --force-reinstall tensorflow-cpu"
    try:
        from input_pipeline import health

        gpus = health.gpus_of_tensorflow()
    except InputError as error:  # TensorFlow was at work before, and holds the GPUs already
        remedy = "call input_pipeline.cpu_only() before TensorFlow does anything; in a notebook restart it first"
        yield Finding("TensorFlow's devices", one_line(error.__cause__ or error, kind=True), remedy)
        return
    except Exception as error:  # absent, or one of its own packages is, or does not match
        said = f"cannot be imported: {one_line(error, kind=True)}"
        yield Finding("TensorFlow", said, "pip install -r requirements.txt")
        return
    found = f"{gpus} GPU(s), whose memory it will take" if gpus else "the CPU alone"
    yield Finding("TensorFlow's devices", found, off if gpus else None)
    rate = health.jpegs_per_second(pictures)
    yield Finding("decoding", f"{rate:,.0f} JPEGs of 400 x 300 a second on {cores()} cores")
    try:
        from clu import metric_writers  # noqa: F401 -- what the trainer imports
    except Exception as error:  # tensorboard absent, or one of its own packages is
        asked = [f"'{line}'" for line in jax_install.requirements() if Requirement(line).name in ("clu", "tensorboard")]
        remedy = f"pip install --force-reinstall {' '.join(asked)}"
        yield Finding("TensorBoard events", f"cannot be written: {one_line(error, kind=True)}", remedy)


def places(workdir: str, tokenizer: str | None) -> Iterator[Finding]:
    """Whether the workdir can be written, has room, and the tokenizer is there."""
    folder = Path(os.path.expanduser(workdir)).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # Path.exists may raise
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
        yield Finding("workdir", f"{workdir} can be written")
    except OSError as error:
        denied = error.errno in (errno.EACCES, errno.EPERM)
        remedy = "give another --workdir" + (f", or: sudo chown $USER {there}" if denied else "")
        remedy = remedy if there.is_dir() else f"{there} is a file: give another --workdir"
        yield Finding("workdir", f"{there}: {error.strerror}", remedy)
    free = shutil.disk_usage(there).free / 2**30
    remedy = f"free some space below {there}: two checkpoints of ViT-B/32 take 3.5 GiB" if free < 5 else None
    yield Finding("free disk", f"{free:,.1f} GiB", remedy)
    if tokenizer:
        from rankclip_jax.common.tokenizer import Tokenizer

        try:
            yield Finding("tokenizer", f"{tokenizer}: {Tokenizer.load(tokenizer).vocab_size:,} tokens")
        except InputError as error:
            yield Finding("tokenizer", str(error), "give the path of a tokenizer.json, or none to train one")


def findings(workdir: str, tokenizer: str | None) -> Iterator[Finding]:
    """All of them, as they are found."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", version, None if sys.version_info >= (3, 11) else "use Python 3.11 or newer")
    yield from packages(jax_install.requirements())
    yield from jax_plugins()
    yield from places(workdir, tokenizer)
    yield from devices()
    yield from pipeline()


def main() -> None:
    """Prints the report. Exit code 1 when something has to be fixed; the others: common/commands.py."""
    parser = argparse.ArgumentParser(prog=commands.prog("rankclip_jax.doctor"), description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="runs", help="where runs will be written")
    parser.add_argument("--tokenizer", help="the tokenizer.json or hub id that config.tokenizer.path will name")
    flags = parser.parse_args()
    commands.quiet_tensorflow()
    faults = 0
    with commands.exit_codes():
        for what, found, remedy in findings(flags.workdir, flags.tokenizer):
            faults += remedy is not None
            print(f"{'ok ' if remedy is None else 'BAD'}  {what:26}{found}", flush=True)
            if remedy is not None:
                print(f"     {'':26}-> {remedy}", flush=True)
    print(f"\n{faults} thing(s) to fix" if faults else "\nall is well")
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
