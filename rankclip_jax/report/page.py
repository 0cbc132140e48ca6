"""The page around the sections: one file with its style inside, nothing fetched."""

from pathlib import Path

from rankclip_jax.figures import colour
from rankclip_jax.report import results, sections, tables
from rankclip_jax.report.markup import escaped
from rankclip_jax.report.runs import Run

# Title, anchor, section, and a word on how to read it.
_SECTIONS = (
    ("Damaged files", "damaged", tables.unreadable, "What is wrong in these files is left out of this page."),
    ("Zero-shot classification", "zero-shot", sections.zero_shot, results.HOW),
    ("Retrieval", "retrieval", sections.retrieval,
     f"Among equal scores the right answer counts as last. {results.HOW}"),
    ("Linear probe", "linear-probe", lambda runs: results.results(runs, "linear_probe"),
     f"Logistic regression on the frozen image embeddings. {results.HOW}"),
    ("Robustness", "robustness", lambda runs: results.results(runs, "robustness"),
     "Top-1 on the reference set, over the classes of the shifted set, against the shifted set."),
    ("Not evaluated", "missing", tables.missing, ""),
    ("Training", "training", sections.training, "A dashed line is the validation set."),
    ("Rank agreement over time", "agreement", sections.agreement,
     "Spearman's correlation of the rankings that the ranking terms compare; what two rankings share of their best."),
    ("Geometry of the embeddings", "geometry", sections.geometry, ""),
    ("Bad samples", "bad-samples", tables.bad_samples, "What training passed over."),
    ("Configuration", "configuration", tables.configuration, ""),
)  # fmt: skip


MADE = "Drawn by rankclip_jax.report"  # by which the command knows its own pages
_STYLE = (Path(__file__).parent / "style.css").read_text()


def render(runs: list[Run]) -> str:
    """The page as HTML."""
    names = escaped(", ".join(run.name for run in runs))
    parts = []
    links = []
    for title, anchor, section, note in _SECTIONS:
        body = section(runs)
        if body:
            links.append(f'<a href="#{anchor}">{title}</a>')
            parts.append(f'<section id="{anchor}"><h2>{title}</h2>{f"<p>{note}</p>" if note else ""}{body}</section>')
    legend = "".join(
        f'<span><i style="background:{colour(number)}"></i>{escaped(run.name)}</span>'
        for number, run in enumerate(runs)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{names}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{'Run' if len(runs) == 1 else 'Runs'}: {names}</h1>{tables.cards(runs)}{tables.facts(runs)}"
        f"</header><nav><div>{''.join(links)}</div>"
        f'{f"""<div class="legend">{legend}</div>""" if len(runs) > 1 else ""}</nav><main>{"".join(parts)}'
        f"<footer>{MADE} from the files of the runs' workdirs.</footer></main></body></html>\n"
    )
