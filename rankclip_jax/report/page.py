"""The page around the sections: one file with its style and script inside, nothing fetched."""

import html
from pathlib import Path

from rankclip_jax.report import sections
from rankclip_jax.report.runs import Run

# Title, anchor, section, and a word on how to read it.
_SECTIONS = (
    ("Training", "training", sections.curves, "Point at a chart to read it. A dashed line is the validation set."),
    ("Zero-shot classification", "zero-shot", sections.zero_shot, ""),
    ("Robustness", "robustness", sections.robustness,
     "Top-1 on the reference set, over the classes of the shifted set, against the shifted set."),
    ("Retrieval", "retrieval", sections.retrieval, "Among equal scores the right answer counts as last."),
    ("Linear probe", "linear-probe", sections.linear_probe, "Logistic regression on the frozen image embeddings."),
    ("Rank agreement over time", "agreement", sections.agreement,
     "Spearman's correlation of the rankings that the ranking terms compare; what two rankings share of their best."),
    ("Geometry of the embeddings", "geometry", sections.geometry, ""),
    ("Confusions", "confusions", sections.confusion, ""),
    ("Bad samples", "bad-samples", sections.bad_samples, "What training passed over."),
    ("Not evaluated", "missing", sections.missing, ""),
    ("Configuration", "configuration", sections.configuration, ""),
)  # fmt: skip


MADE = "Drawn by rankclip_jax.report"  # by which the command knows its own pages
_STYLE, _SCRIPT = ((Path(__file__).parent / name).read_text() for name in ("style.css", "script.js"))


def render(runs: list[Run]) -> str:
    """The page as HTML."""
    names = ", ".join(run.name for run in runs)
    parts = []
    links = []
    for title, anchor, section, note in _SECTIONS:
        body = section(runs)
        if body:
            links.append(f'<a href="#{anchor}">{title}</a>')
            parts.append(f'<section id="{anchor}"><h2>{title}</h2>{f"<p>{note}</p>" if note else ""}{body}</section>')
    legend = "".join(
        f'<span><i style="background:{sections.colour(number)}"></i>{html.escape(run.name)}</span>'
        for number, run in enumerate(runs)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(names)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{'Run' if len(runs) == 1 else 'Runs'}: {html.escape(names)}</h1>{sections.tiles(runs)}"
        f'{f"""<div class="legend">{legend}</div>""" if len(runs) > 1 else ""}</header>'
        f"<nav><div>{''.join(links)}</div></nav><main>{''.join(parts)}"
        f"<footer>{MADE} from the files of the runs' workdirs.</footer></main>"
        f'<div id="tip"></div><script>{_SCRIPT}</script></body></html>\n'
    )
