"""Pieces of HTML that several sections share. Whatever the files say comes through `escaped`."""

import html
from collections.abc import Iterable, Sequence

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
      kind: class of style.css: "words", "runs" or "numbers".
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


def fold(run: Run, runs: list[Run], title: str, body: str) -> str:
    """A part of a section that can be folded; open for the first run only, so that a page of many runs stays short."""
    opened = " open" if run is runs[0] else ""
    return f'<details class="plain"{opened}><summary>{title}</summary>{body}</details>'


def of(run: Run, runs: list[Run]) -> str:
    """The run's name in small, where there are several."""
    return f" <small>{escaped(run.name)}</small>" if len(runs) > 1 else ""
