"""Ways in which a checkpoint's folder gets damaged, for benchmarks/faults.py and the tests."""

import json
import shutil
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
