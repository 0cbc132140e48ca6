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


@pytest.mark.parametrize(
    "room, may",
    [
        ("rankclip_jax/losses", ("rankclip_jax.losses",)),
        ("rankclip_jax/models", ("rankclip_jax.models",)),
        ("configs", ()),
        (
            "input_pipeline",
            (
                "input_pipeline",
                *(
                    f"rankclip_jax.{name}"
                    for name in ("tokenizer", "errors", "config", "progress", "files", "ownership")
                ),
            ),
        ),
    ],
)
def test_arrows_go_one_way(room, may):
    for path in (REPO / room).rglob("*.py"):
        ours = [name for name in imports(path) if name.startswith(("rankclip_jax", "input_pipeline", "configs"))]
        assert all(name.startswith(may) for name in ours), (path, ours)


def test_nobody_imports_the_command_line():
    for path in REPO.glob("rankclip_jax/**/*.py"):
        assert "rankclip_jax.train" not in list(imports(path)), path
