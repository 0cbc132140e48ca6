"""The house of docs/architecture.md: which room may import which; no circle, no loose module."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# What a room may import, other than itself. What stands in LATE may be imported inside functions.
MAY = {
    "common": (),
    "models": ("common",),
    "losses": ("common",),
    "config": ("common",),
    "parallel": ("common",),
    "figures": ("common",),
    "weights": ("models", "parallel", "config", "common"),
    "input_pipeline": ("common", "config"),
    "evaluation": ("losses", "parallel", "config", "common", "figures"),
    "inference": ("weights", "models", "parallel", "evaluation", "figures", "config", "common"),
    "train": ("evaluation", "weights", "figures", "parallel", "models", "losses", "config", "common"),
    "report": ("evaluation", "figures", "config", "common"),
    "study": ("train", "evaluation", "weights", "figures", "parallel", "models", "losses", "config", "common"),
}
LATE = dict.fromkeys(("evaluation", "inference", "train", "study"), "input_pipeline")
COMMANDS = {"__init__", "cli", "convert", "doctor", "embed"}  # modules that may stand loose
FILES = [*(REPO / "rankclip_jax").rglob("*.py"), *(REPO / "input_pipeline").rglob("*.py")]


def room(name: str) -> str | None:
    """The room of a dotted module; None: a command, or not ours."""
    parts = name.split(".")
    if parts[0] == "input_pipeline":
        return "input_pipeline"
    return parts[1] if parts[0] == "rankclip_jax" and len(parts) > 1 and parts[1] in MAY else None


def module(path: Path) -> str:
    return str(path.relative_to(REPO).with_suffix("")).replace("/", ".").removesuffix(".__init__")


@functools.cache
def imports(path: Path, late: bool) -> list[str]:
    """Dotted names of ours that a file imports: at its top, or `late`, inside functions."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if (id(node) in inside) != late:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("rankclip_jax", "input_pipeline", "configs")]


@pytest.mark.parametrize("path", FILES, ids=module)
def test_arrows_point_down(path):
    here = room(module(path))
    if here is None:
        return
    allowed = {here, *MAY[here]}
    for late in (False, True):
        for name in imports(path, late):
            there = room(name)
            assert there in allowed or (late and there == LATE.get(here)), f"{module(path)} imports {name}"


def test_no_circle_of_rooms_and_none_of_modules():
    order = list(MAY)
    for here, others in MAY.items():
        assert all(order.index(there) < order.index(here) for there in others), here
    known = {module(path): path for path in FILES}
    graph = {}
    for name, path in known.items():
        wanted = [w if w in known else w.rpartition(".")[0] for w in imports(path, late=False)]
        graph[name] = {w for w in wanted if w in known and w != name}
    done, waiting = set(), dict(graph)
    while ready := [name for name, needs in waiting.items() if needs <= done]:
        done |= set(ready)
        waiting = {name: needs for name, needs in waiting.items() if name not in done}
    # A package's __init__ offers what its modules define, and these may import each other by way of it.
    packages = {name for name, path in known.items() if path.name == "__init__.py"}
    assert not [name for name in waiting if name not in packages and not waiting[name] & packages]


def test_no_module_stands_loose():
    assert {path.stem for path in (REPO / "rankclip_jax").glob("*.py")} == COMMANDS
    rooms = {path.name for path in (REPO / "rankclip_jax").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(MAY) - {"input_pipeline"}
    assert not [path for path in FILES if path.name == "utils.py"]


def test_nobody_imports_a_command_line():
    names = ("__main__", *COMMANDS - {"__init__"})
    commands = [REPO / "rankclip_jax" / f"{name}.py" for name in COMMANDS]
    for path in [path for path in FILES if path not in commands and path.name != "__main__.py"]:
        for name in imports(path, False) + imports(path, True):
            assert name.split(".")[-1] not in names or name.split(".")[0] != "rankclip_jax", (path, name)


def test_the_page_draws_every_room_and_every_file():
    page = (REPO / "docs/architecture.md").read_text()
    for path in FILES:
        if path.name != "__init__.py":
            assert path.stem in page or path.name == "__main__.py", f"docs/architecture.md lacks {path}"


def test_configs_import_nothing_of_ours():
    assert not [name for path in (REPO / "configs").glob("*.py") for name in imports(path, False) + imports(path, True)]


@pytest.mark.parametrize("path", sorted((REPO / "input_pipeline").rglob("*.py")), ids=module)
def test_no_function_is_rewritten_by_autograph(path):
    for call in [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]:
        of_data = isinstance(call.func, ast.Attribute) and call.func.attr in ("map", "flat_map", "interleave", "filter")
        if of_data and not re.match(r"(pool|threads|texts|paths)\.", text := ast.unparse(call)):
            assert ast.unparse(call.args[0]).startswith("as_written("), text


@pytest.mark.parametrize("path", sorted((REPO / "input_pipeline").rglob("*.py")), ids=module)
def test_no_iterator_has_tensorflows_thread_for_which_its_end_may_wait(path):
    made = re.findall(r"\.as_numpy_iterator\(|\biter\(data|\bin data:", path.read_text())
    assert len(made) == (path.name == "graph.py"), made


BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "keras"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Block())
"""


def test_everything_but_the_pipeline_imports_without_tensorflow():
    names = [module(path) for path in FILES if module(path).startswith("rankclip_jax")]
    script = BLOCK + "\n".join(f"import {name}" for name in names)
    result = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    blocked = subprocess.run(
        [sys.executable, "-c", BLOCK + "import input_pipeline.pipeline"], cwd=REPO, capture_output=True, text=True
    )
    assert "tensorflow is blocked" in blocked.stderr  # the block works
