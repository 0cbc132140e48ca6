"""Writes docs/config.md from keys.py and fields.py of rankclip_jax/config: python docs/config_page.py > docs/config.md

The comments next to the keys are the documentation. A test compares the page with them.
"""

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "rankclip_jax" / "config"
SOURCE = "".join((FOLDER / name).read_text() for name in ("keys.py", "fields.py"))
HEAD = """# Every key of the configuration

Generated from the comments in `rankclip_jax/config/keys.py` and `fields.py`:
`python docs/config_page.py > docs/config.md`.

Set a key on the command line, `--config.optim.lr=1e-3`, or in a file like those in `configs/`, which contains only the
changed keys. A value is a Python literal; anything else is read as a string. An unknown key is an error that names the
closest existing key, and so is a key that means nothing beside the others, such as `init_towers` without `init_from`.
The exception is `loss`: what an objective does not use is passed over, so that one file serves several objectives.

A resumed run may change only these keys:
{may_change}.
`epochs` and `steps` only where the schedule allows it, and also `data.train` and `data.val`, if the data there are the
same ([reliability.md](reliability.md)).

Sources: [p] RankCLIP, arXiv 2404.09387; [c] the code that its authors released; [o] CLIP, arXiv 2103.00020;
[s] SigLIP, arXiv 2303.15343; [y] CyCLIP, arXiv 2205.14459. A value after a source is the source's value, if it differs
from the default. A default without a source was chosen for this project. `configs/cc3m.py` has the published values for
CC3M.
"""
SETS = {  # constant -> (heading, what it is)
    "MIXTURE_PART": ("config.data.train.NAME", "One source of a mixture, also `config.data.val.NAME`."),
    "PARAMETER_RULE": (
        "config.optim.rules",
        "What a rule says of parameters. It has at least one of these, and what it lacks is as for all.",
    ),
    "ZERO_SHOT_SET": ("config.eval.zero_shot.NAME", "A labelled set for zero-shot classification."),
    "LINEAR_PROBE_SET": ("config.eval.linear_probe.NAME", "The keys of a zero-shot set but those of its prompts, and:"),
    "CAPTIONED_SET": ("config.eval.retrieval.NAME", "A set of images with captions."),
    "GEOMETRY_SET": ("config.eval.geometry.NAME", "The keys of a retrieval set, and:"),
}


def comments(source: str) -> dict[int, tuple[str, bool]]:
    """Line -> (text of its comment, whether the comment stands alone)."""
    found = {}
    for token in tokenize.generate_tokens(iter(source.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
    return found


def keys(call: ast.Call, source: str, prefix: str = "") -> Iterator[tuple[str, str | None, str]]:
    """(key, its default as written or None for a group, its comment) of `dict(...)`, groups before their keys."""
    beside = comments(source)
    for keyword in call.keywords:
        lines = [beside[keyword.lineno][0]] if keyword.lineno in beside else []
        above = keyword.lineno - 1
        while above > call.lineno and above in beside and beside[above][1]:  # alone above a key: it belongs to it
            lines.insert(0, beside[above][0])
            above -= 1
        called = keyword.value.func.id if isinstance(keyword.value, ast.Call) else ""
        group = called == "dict"
        # A key is declared as `integer(256, 1)`: its default comes first.
        value = keyword.value.args[0] if called and not group else keyword.value
        default = None if group else ast.get_source_segment(source, value)
        yield prefix + keyword.arg, default, " ".join(lines)
        if group:
            yield from keys(keyword.value, source, f"{prefix}{keyword.arg}.")


def _dict_call(node: ast.AST) -> ast.Call:
    """The `dict(...)` that holds a table, behind `OTHER |` in some assignments."""
    calls = (n for n in ast.walk(node) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "dict")
    return next(calls)


def _table(rows: list[tuple[str, str | None, str]]) -> Iterator[str]:
    yield "| key | default | meaning | source |\n| --- | --- | --- | --- |"
    for key, default, comment in rows:
        if default is None and not comment:
            continue  # a group within the group: its keys follow
        default = default or "{}"  # of a group that also takes other fields
        meaning, *source = re.split(r" (?=\[[pcosy]\])", comment.replace("|", r"\|"), maxsplit=1)
        for name, (title, _) in SETS.items():
            meaning = re.sub(rf"\b{name}\b", f"[{title}](#{title.replace('.', '').lower()})", meaning)
        yield f"| `{key}` | `{default}` | {meaning.rstrip('.')} | {''.join(source)} |"


def tables(source: str) -> dict[str, list[tuple[str, str | None, str]]]:
    """Name of the constant -> the rows of its keys."""
    found = {}
    for node in ast.parse(source).body:
        name = getattr(getattr(node, "targets", [None])[0], "id", None)
        if name == "KEYS" or name in SETS:
            found[name] = list(keys(_dict_call(node), source))
    return found


def page() -> str:
    """The whole of docs/config.md."""
    found = tables(SOURCE)
    may_change = " ".join(re.findall(r"^MAY_CHANGE \+?= \((.*)\)", SOURCE, re.MULTILINE))
    names = [name for name in re.findall(r'"([\w.]+)"', may_change) if name not in ("epochs", "steps")]
    groups = ", ".join(f"`{name}`" for name in names)
    out = [HEAD.format(may_change=groups), "## The run", ""]
    rows = found["KEYS"]
    tops = [row for row in rows if "." not in row[0]]
    at_top = [row for row in tops if row[1] is not None]
    out += [*_table([(f"config.{key}", *rest) for key, *rest in at_top]), ""]
    for group, default, comment in tops:
        if default is None:
            members = [(f"config.{key}", *rest) for key, *rest in rows if key.startswith(f"{group}.")]
            out += [f"## config.{group}", "", *([comment[0].upper() + comment[1:] + ".", ""] if comment else [])]
            out += [*_table(members), ""]
    for name, (title, what) in SETS.items():
        out += [f"## {title}", "", what, "", *_table(found[name]), ""]
    return "\n".join(out).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
