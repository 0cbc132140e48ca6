"""Public functions say the types of what they take and give. (Of arguments the linter asks of private ones too.)"""

import ast
import importlib
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
FILES = [path.relative_to(REPO) for room in ("rankclip_jax", "input_pipeline") for path in (REPO / room).rglob("*.py")]


def public_functions(node: ast.Module | ast.ClassDef) -> Iterator[tuple[ast.FunctionDef, list[ast.arg]]]:
    """(function or method, its arguments but self)."""
    for child in node.body:
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child)
        elif isinstance(child, ast.FunctionDef) and (not child.name.startswith("_") or child.name in SPECIAL):
            taken = [*child.args.posonlyargs, *child.args.args, *child.args.kwonlyargs]
            static = any(getattr(decorator, "id", "") == "staticmethod" for decorator in child.decorator_list)
            yield child, taken[1:] if isinstance(node, ast.ClassDef) and not static else taken


SPECIAL = ("__init__", "__call__")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_public_functions_have_type_hints(path):
    lacking = []
    for function, taken in public_functions(ast.parse((REPO / path).read_text())):
        lacking += [f"{function.name}({argument.arg})" for argument in taken if argument.annotation is None]
        if function.returns is None and function.name != "__init__":
            lacking.append(f"{function.name} -> ?")
    assert not lacking, f"{path} lacks the types of {', '.join(lacking)}"


def test_hints_name_what_exists():
    pytest.importorskip("tensorflow")
    for path in FILES:
        if path.name in ("__main__.py", "img2dataset_driver.py"):  # run by themselves
            continue
        module = importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
        for thing in vars(module).values():
            if inspect.isfunction(thing) and thing.__module__ == module.__name__:
                typing.get_type_hints(thing)
