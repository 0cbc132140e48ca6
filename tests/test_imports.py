"""Model, losses, step and inference work where TensorFlow is not installed; the arrows of docs/architecture.md hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "keras"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""
FREE = [
    str(path.relative_to(REPO).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in sorted((REPO / "rankclip_jax").rglob("*.py"))
]


def test_everything_but_the_pipeline_imports_without_tensorflow():
    script = BLOCK + "\n".join(f"import {name}" for name in FREE)
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    blocked = subprocess.run(
        [sys.executable, "-c", BLOCK + "import input_pipeline.pipeline"], cwd=REPO, capture_output=True, text=True
    )
    assert "tensorflow is blocked" in blocked.stderr  # the block works


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# A room -> those that it may import. The commands, which stand loose beside the rooms, start any.
ARROWS = {
    "common": "",
    "models": "common",
    "losses": "common",
    "config": "common",
    "parallel": "common",
    "figures": "common evaluation.geometry",
    "weights": "models parallel config common",
    "evaluation": "losses config common figures input_pipeline",
    "inference": "weights models parallel evaluation.zero_shot figures config common input_pipeline",
    "train": "weights models parallel evaluation figures losses config common input_pipeline",
    "report": "evaluation figures common",
    "study": "train evaluation weights models parallel losses figures config common input_pipeline.shapes",
}


def _full(room):
    return room if room.startswith("input_pipeline") else f"rankclip_jax.{room}"


@pytest.mark.parametrize(
    "room, may",
    [
        ("configs", ()),
        ("input_pipeline", ("input_pipeline", "rankclip_jax.common", "rankclip_jax.config")),
        *((f"rankclip_jax/{room}", tuple(_full(it) for it in [room, *may.split()])) for room, may in ARROWS.items()),
    ],
)
def test_arrows_go_one_way(room, may):
    for path in (REPO / room).rglob("*.py"):
        ours = [name for name in imports(path) if name.startswith(("rankclip_jax", "input_pipeline", "configs"))]
        assert all(name.startswith(may) for name in ours), (path, ours)


def test_nobody_imports_a_command():
    commands = {f"rankclip_jax.{path.stem}" for path in REPO.glob("rankclip_jax/[!_]*.py")}
    commands |= {"input_pipeline.prepare", "input_pipeline.download"}
    for path in [*REPO.glob("rankclip_jax/**/*.py"), *REPO.glob("input_pipeline/**/*.py")]:
        for name in imports(path):
            assert name not in commands and "__main__" not in name, (path, name)
