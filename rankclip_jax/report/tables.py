"""The sections of tables and words. Each takes the runs and gives HTML, or nothing where no run has what it shows."""

import json
from collections.abc import Sequence
from typing import Any

from rankclip_jax.figures import colour
from rankclip_jax.report.markup import escaped, of, percent, table
from rankclip_jax.report.runs import Run, differences

_GEOMETRY = {
    "spearman_in_modal": "Spearman, image-image with text-text rankings",
    "spearman_cross_modal": "Spearman, image-text with text-image rankings",
    "overlap_in_modal": "shared among the 10 nearest, in-modal",
    "overlap_cross_modal": "shared among the 10 nearest, cross-modal",
    "similarity_positive": "mean cosine of pairs",
    "similarity_negative": "mean cosine of all others",
    "modality_gap": "modality gap",
    "alignment": "alignment (lower: pairs nearer)",
    "uniformity_image": "uniformity, images (lower: more even)",
    "uniformity_text": "uniformity, texts",
}


def tiles(runs: list[Run]) -> str:
    """What each run reached, at a glance."""
    cards = []
    for number, run in enumerate(runs):
        facts = []
        if run.rows:
            facts.append(("steps", f"{max(row['step'] for row in run.rows):,}"))
        for name, row in list(run.results.get("zero_shot", {}).items())[:3]:
            facts.append((f"{name}, top-1", percent(row["top1"])))
        if not run.results:
            last = {k: v for row in run.rows for k, v in row.items() if k.endswith("/top1")}
            facts += [(f"{key.split('/')[1]}, top-1", percent(value)) for key, value in list(last.items())[:3]]
        if run.bad:
            facts.append(("bad samples", f"{sum(count for count, _ in run.bad.values()):,}"))
        cells = "".join(f"<div><b>{escaped(value)}</b><span>{escaped(name)}</span></div>" for name, value in facts)
        model = run.config.get("model", {}).get("name", "")
        objective = run.config.get("loss", {}).get("objective", "")
        cards.append(
            f'<div class="card" style="border-top-color:{colour(number)}"><h3>{escaped(run.name)}</h3>'
            f"<p>{escaped(' · '.join(part for part in (model, objective) if part))}</p>"
            f'<div class="facts">{cells}</div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def zero_shot(runs: list[Run]) -> str:
    """A row a set, the columns of all runs beside each other."""
    columns = {f"top{k}": f"top-{k}" for k in (1, 3, 5, 10)} | {"mean_per_class": "per class"}
    return _results(runs, "zero_shot", columns)


def linear_probe(runs: list[Run]) -> str:
    """Likewise."""
    return _results(runs, "linear_probe", {"top1": "top-1", "mean_per_class": "per class", "l2": "L2"}, plain=("l2",))


def robustness(runs: list[Run]) -> str:
    """Likewise, with the differences."""
    columns = {"reference": "reference", "shifted": "shifted", "drop": "drop", "effective": "effective"}
    return _results(runs, "robustness", columns)


def recalls(runs: list[Run]) -> str:
    """Likewise, of retrieval."""
    ways = (("image_to_text", "img→txt"), ("text_to_image", "txt→img"))
    return _results(runs, "retrieval", {f"{way}_r{k}": f"{short} R@{k}" for way, short in ways for k in (1, 5, 10)})


def geometry_numbers(runs: list[Run]) -> str:
    """A row a number, a column a set and run."""
    columns = [(run, name, row) for run in runs for name, row in run.results.get("geometry", {}).items()]
    if not columns:
        return ""
    head = ["", *(escaped(name) + of(run, runs) for run, name, _ in columns)]
    rows = [
        [escaped(label), *(f"{row[key]:.3f}" if key in row else "" for _, _, row in columns)]
        for key, label in _GEOMETRY.items()
    ]
    return table(head, rows, "numbers")


def missing(runs: list[Run]) -> str:
    """Sets that could not be evaluated, and why."""
    items = [
        f"<li><b>{escaped(name)}</b>{of(run, runs)}: {escaped(reason)}</li>"
        for run in runs
        for name, reason in run.results.get("missing", {}).items()
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def bad_samples(runs: list[Run]) -> str:
    """Counts by reason, with the first places."""
    rows = [
        (escaped(run.name), escaped(reason), f"{count:,}", escaped("; ".join(places)))
        for run in runs
        for reason, (count, places) in run.bad.items()
    ]
    return table(("run", "reason", "samples", "the first"), rows, "words") if rows else ""


def configuration(runs: list[Run]) -> str:
    """What differs between the runs, then each configuration whole."""
    parts = []
    different = differences(runs) if len(runs) > 1 else []
    if different:
        head = ["differs", *(escaped(run.name) for run in runs)]
        rows = [[f"<code>{escaped(cell)}</code>" for cell in (key, *map(_value, values))] for key, values in different]
        parts.append(table(head, rows, "words"))
    elif len(runs) > 1:
        parts.append("<p>The configurations are the same.</p>")
    parts += [
        f"<details><summary>{escaped(run.name)}: config.json</summary>"
        f"<pre>{escaped(json.dumps(run.config, indent=2))}</pre></details>"
        for run in runs
        if run.config
    ]
    return "".join(parts)


def _results(runs: Sequence[Run], kind: str, columns: dict[str, str], plain: tuple = ()) -> str:
    """A row a set and run, the best run of a column in bold where there are several."""
    names = dict.fromkeys(name for run in runs for name in run.results.get(kind, {}))
    if not names:
        return ""
    found = [row for run in runs for row in run.results.get(kind, {}).values()]
    columns = {key: label for key, label in columns.items() if any(key in row for row in found)}
    counts = [key for key in ("n", "images", "texts") if any(key in row for row in found)]
    lines = []
    for name in names:
        rows = [(number, run.results.get(kind, {}).get(name)) for number, run in enumerate(runs)]
        rows = [(number, row) for number, row in rows if row]
        for place, (number, row) in enumerate(rows):
            cells = [escaped(name) if place == 0 else ""]
            if len(runs) > 1:
                cells.append(f'<i class="dot" style="background:{colour(number)}"></i>{escaped(runs[number].name)}')
            for key in columns:
                values = [other[key] for _, other in rows if key in other]
                best = len(values) > 1 and row.get(key) == max(values) > min(values) and key not in ("drop", *plain)
                shown = "" if key not in row else f"{row[key]:.3g}" if key in plain else percent(row[key])
                cells.append(f"<b>{shown}</b>" if best else shown)
            lines.append([*cells, *(f"{row[key]:,}" if key in row else "" for key in counts)])
    several = len(runs) > 1
    head = map(escaped, ["set", *(["run"] if several else []), *columns.values(), *counts])
    return table(head, lines, "runs" if several else "")


def _value(value: Any) -> str:
    return "—" if value is None else json.dumps(value)
