"""What any exception says in one line, and that nobody makes such a line otherwise."""

import ast
from pathlib import Path

import pytest

from rankclip_jax.common.errors import InputError, one_line

REPO = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "error, line, with_kind",
    [
        (ValueError("no room"), "no room", "ValueError: no room"),
        (ValueError("\n\n  two \t words\r\nand\u2028more\n"), "two words and more", "ValueError: two words and more"),
        (ValueError(), "ValueError", "ValueError"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (RuntimeError(" \n\t"), "RuntimeError", "RuntimeError"),
        (KeyError("text"), "'text'", "KeyError: 'text'"),
        (AssertionError(), "AssertionError", "AssertionError"),
        (InputError("gone.csv: no such file"), "gone.csv: no such file", "InputError: gone.csv: no such file"),
        (FileNotFoundError(2, "No such file", "a b"), "[Errno 2] No such file: 'a b'",
         "FileNotFoundError: [Errno 2] No such file: 'a b'"),
        (RecursionError("stack overflow"), "nested too deeply", "RecursionError: stack overflow"),
        (ValueError({"not": "a str"}), "{'not': 'a str'}", "ValueError: {'not': 'a str'}"),
    ],
)  # fmt: skip
def test_a_line_is_what_the_exception_says(error, line, with_kind):
    assert one_line(error) == line
    assert one_line(error, kind=True) == with_kind


@pytest.mark.parametrize("kind", [False, True])
def test_a_line_has_a_length(kind):
    long = ValueError("word " * 10**6)
    assert len(one_line(long, kind=kind)) == 300 and len(one_line(long, 50, kind=kind)) == 50
    assert one_line(long, 50, kind=kind).endswith("...")
    exact = ValueError("x" * 300)
    assert one_line(exact) == "x" * 300  # what fits is whole


def test_there_is_no_other_way_to_a_line():
    """splitlines() and split() of str(error) or error.message stand in common/errors.py alone."""
    for path in [*(REPO / "rankclip_jax").rglob("*.py"), *(REPO / "input_pipeline").rglob("*.py")]:
        if path.name in ("errors.py", "tfds.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("split", "splitlines"):
                whose = ast.unparse(node.value)
                assert "str(error)" not in whose and "error.message" not in whose, f"{path}:{node.lineno}"
