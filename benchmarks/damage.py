"""What benchmarks/faults.py and the tests do to a run: damaged checkpoints, a poisoned gradient, a small disk."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def _largest(folder: Path) -> Path:
    return max((path for path in (folder / "state").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def _truncate(folder):
    path = _largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(folder):
    path = _largest(folder)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def _garble(name):
    return lambda folder: next(folder.rglob(name)).write_text("{garbage")


def _move_the_position(folder):
    path = folder / "data" / "metadata"
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data | {"positions": [data["positions"][0] + 1]}))


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# What -> a function of the checkpoint's folder.
KINDS = {
    "largest file cut in half": _truncate,
    "one bit flipped in the largest file": _flip,
    "largest file missing": lambda folder: _largest(folder).unlink(),
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "no data": lambda folder: shutil.rmtree(folder / "data"),
    "garbage for the tree": _garble("_METADATA"),
    "garbage for the manifest": _garble("manifest.ocdbt"),
    "garbage for the data": _garble("metadata"),
    "another position": _move_the_position,
    "empty folder": _empty,
}


def nan_in_step(step: int) -> None:
    """From now on the gradient of `step` has a NaN among a parameter's."""
    import jax

    from rankclip_jax.train import step as steps

    make, whole = steps.make_train_step, steps.loss_and_grads

    def broken(*args):
        loss, grads = whole(*args)
        leaves, tree = jax.tree.flatten(grads)
        return loss, jax.tree.unflatten(tree, [leaves[0] * float("nan"), *leaves[1:]])

    def make_both(*args, **kwargs):
        good, bad = make(*args, **kwargs), make(*args, **kwargs)

        def train_step(state, batch):
            if int(state.step) + 1 != step:
                return good(state, batch)
            steps.loss_and_grads = broken
            return bad(state, batch)

        train_step.lower = good.lower  # type: ignore[attr-defined]  # what a run compiles ahead
        return train_step

    steps.make_train_step = make_both


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path | None]:
    """A tmpfs of `size` while the context lasts; None without root."""
    mounted = folder / "small_disk"
    mounted.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", mounted], capture_output=True)
    try:
        yield mounted if done.returncode == 0 else None
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", mounted], check=True)
