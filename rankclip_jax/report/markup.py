"""Pieces of HTML that several sections share. Whatever the files say comes through `escaped`."""

import html
from collections.abc import Iterable, Sequence

from rankclip_jax.figures import colour
from rankclip_jax.report.runs import Run


def escaped(text: object) -> str:
    """As it reads, never as markup; halves of a character, which no file can hold, as question marks."""
    return html.escape(str(text).encode(errors="replace").decode())


def percent(share: float) -> str:
    """50.00 %"""
    return f"{100 * share:.2f} %"


def table(head: Iterable[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls on its own where it is too wide.

    Args:
      head: HTML of each column's title; rows: HTML of each cell.
      kind: class of style.css: "words", "runs" or "facts".
    """
    titles = "".join(f"<th>{title}</th>" for title in head)
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}"><tr>{titles}</tr>{lines}</table></div>'


def figure(title: str, drawing: str) -> str:
    """A drawing with its title; a space of its own in the grid."""
    return f"<figure><figcaption>{escaped(title)}</figcaption>{drawing}</figure>"


def grid(figures: Sequence[str]) -> str:
    """Figures side by side."""
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def named(number: int, run: Run) -> str:
    """The run's name with the dot of its colour."""
    return f'<i class="dot" style="background:{colour(number)}"></i>{escaped(run.name)}'


def side_by_side(runs: list[Run], cells: Sequence[str]) -> str:
    """One cell a run, "" where it has none; beside each other, or below each other where there is no room."""
    if len(runs) == 1:
        return cells[0]
    parts = [
        f"<div><h4>{named(number, run)}</h4>{cell or '<p>nothing here</p>'}</div>"
        for number, (run, cell) in enumerate(zip(runs, cells, strict=True))
    ]
    return f'<div class="side" style="--runs:{len(runs)}">{"".join(parts)}</div>'


def fold(title: str, body: str) -> str:
    """A part of a section that can be folded."""
    return f'<details class="plain" open><summary>{title}</summary>{body}</details>'
