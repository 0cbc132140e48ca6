"""The sections of the page. Each takes the runs and gives HTML, or nothing where no run has what it shows."""

import html
import json

import numpy as np

from rankclip_jax.report import charts
from rankclip_jax.report.runs import Run, differences

IMAGE, TEXT = "var(--image)", "var(--text-point)"
_CURVES = {
    "loss": "Loss",
    "clip": "CLIP term (nats)",
    "siglip": "SigLIP term",
    "rank_in_modal": "Ranking term, in-modal (nats)",
    "rank_cross_modal": "Ranking term, cross-modal (nats)",
    "rank_weight": "Weight of the ranking terms",
    "logit_scale": "Logit scale",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images per second",
}
_AGREEMENT = ("spearman", "overlap", "gradient_cosine")
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


def colour(number: int) -> str:
    """Of the run of this number."""
    return f"var(--run{number % 6})"


def tiles(runs: list[Run]) -> str:
    """What each run reached, at a glance."""
    cards = []
    for number, run in enumerate(runs):
        facts = []
        if run.rows:
            facts.append(("steps", f"{max(row['step'] for row in run.rows):,}"))
        for name, row in list(run.results.get("zero_shot", {}).items())[:3]:
            facts.append((f"{name}, top-1", _percent(row["top1"])))
        if not run.results:
            last = {k: v for row in run.rows for k, v in row.items() if k.endswith("/top1")}
            facts += [(f"{key.split('/')[1]}, top-1", _percent(value)) for key, value in list(last.items())[:3]]
        if run.bad:
            facts.append(("bad samples", f"{sum(count for count, _ in run.bad.values()):,}"))
        cells = "".join(f"<div><b>{_e(value)}</b><span>{_e(name)}</span></div>" for name, value in facts)
        model = run.config.get("model", {}).get("name", "")
        objective = run.config.get("loss", {}).get("objective", "")
        cards.append(
            f'<div class="card" style="border-top-color:{colour(number)}"><h3>{_e(run.name)}</h3>'
            f"<p>{_e(' · '.join(part for part in (model, objective) if part))}</p>"
            f'<div class="facts">{cells}</div></div>'
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def curves(runs: list[Run]) -> str:
    """Everything of metrics.jsonl over the steps; the validation set's line is dashed."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row if key != "step")
    plain = [key for key in keys if "/" not in key]
    shown = [key for key in _CURVES if key in plain] + [key for key in plain if key not in _CURVES]
    figures = [
        charts.line_chart(
            _CURVES.get(key, key),
            _series(runs, key) + _series(runs, f"val/{key}", ", validation", dashed=True),
        )
        for key in shown
    ]
    tops = [key for key in keys if key.startswith("zero_shot/") and key.endswith("/top1")]
    figures += [
        charts.line_chart(f"Zero-shot top-1, {key.split('/')[1]}", _series(runs, key), percent=True) for key in tops
    ]
    recalls = [key for key in keys if key.startswith("retrieval/") and key.endswith("_r1")]
    figures += [charts.line_chart(_retrieval_title(key), _series(runs, key), percent=True) for key in recalls]
    return _grid(figures)


def agreement(runs: list[Run]) -> str:
    """Rank agreement, overlap and gradient cosine over the steps."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    wanted = [key for key in keys if any(word in key for word in _AGREEMENT)]
    titles = {key: key.removeprefix("val/").removeprefix("geometry/").replace("_", " ") for key in wanted}
    return _grid([charts.line_chart(titles[key].capitalize(), _series(runs, key)) for key in wanted])


def zero_shot(runs: list[Run]) -> str:
    """A row a set, the columns of all runs beside each other."""
    return _table(runs, "zero_shot", {f"top{k}": f"top-{k}" for k in (1, 3, 5, 10)} | {"mean_per_class": "per class"})


def linear_probe(runs: list[Run]) -> str:
    """Likewise."""
    return _table(runs, "linear_probe", {"top1": "top-1", "mean_per_class": "per class", "l2": "L2"}, plain=("l2",))


def robustness(runs: list[Run]) -> str:
    """Likewise, with the differences."""
    columns = {"reference": "reference", "shifted": "shifted", "drop": "drop", "effective": "effective"}
    return _table(runs, "robustness", columns)


def confusion(runs: list[Run]) -> str:
    """The matrix and the most frequent confusions of every set."""
    parts = []
    for run in runs:
        for name, arrays in run.confusion.items():
            matrix, classes = arrays["confusion"], [str(c) for c in arrays["classes"]]
            wrong = np.where(np.eye(len(classes), dtype=bool), 0, matrix)
            order = np.argsort(-wrong, axis=None, kind="stable")[:12]
            rows = [(divmod(int(i), len(classes)), int(wrong.flat[i])) for i in order if wrong.flat[i] > 0]
            lines = "".join(
                f"<tr><td>{_e(classes[label])}</td><td>{_e(classes[said])}</td><td>{count:,}</td>"
                f"<td>{_percent(count / matrix[label].sum())}</td></tr>"
                for (label, said), count in rows
            )
            listed = (
                '<div class="scroll"><table class="words"><tr><th>is</th><th>taken for</th><th>images</th>'
                "<th>of its class</th></tr>"
                f"{lines}</table></div>" if lines else "<p>No image was taken for another class.</p>"
            )  # fmt: skip
            legend = _heat_labels(classes)
            parts.append(
                f"{_fold(run, runs)}<summary>{_e(name)}{_of(run, runs)}</summary>"
                f'<div class="pair"><div>{charts.heatmap(matrix)}'
                f"<p>Rows: the class it is. Columns: the class it was taken for. {legend}</p></div>"
                f"{listed}</div></details>"
            )
    return "".join(parts)


def _heat_labels(classes):
    if len(classes) > 20:
        return f"{len(classes)} classes, in the set's order."
    return "In order: " + _e(", ".join(classes)) + "."


def retrieval(runs: list[Run]) -> str:
    """Recalls, then queries with their five nearest; the right ones are marked."""
    columns = {f"{way}_r{k}": f"{short} R@{k}" for way, short in
               (("image_to_text", "img→txt"), ("text_to_image", "txt→img")) for k in (1, 5, 10)}  # fmt: skip
    parts = [_table(runs, "retrieval", columns)]
    for run in runs:
        for name, found in run.retrieval.items():
            galleries = []
            for query in found["image_to_text"]:
                items = "".join(
                    f'<li class="{_mark(a)}">{_e(a["caption"])}</li>' for a in query["answers"]
                )
                galleries.append(f'<div class="query">{_picture(query["picture"])}<ol>{items}</ol></div>')
            for query in found["text_to_image"]:
                items = "".join(f'<span class="{_mark(a)}">{_picture(a["picture"])}</span>' for a in query["answers"])
                galleries.append(f'<div class="query wide"><p>“{_e(query["caption"])}”</p><div>{items}</div></div>')
            parts.append(
                f"{_fold(run, runs)}<summary>{_e(name)}{_of(run, runs)}: queries evenly spaced over the set, and their "
                "five nearest</summary>"
                '<p class="note"><i class="right-key"></i> the right one</p>'
                f'<div class="queries">{"".join(galleries)}</div></details>'
            )
    return "".join(parts)


def geometry(runs: list[Run]) -> str:
    """Projection, histograms of cosines, and the numbers."""
    figures, histograms = [], []
    for run in runs:
        for name, arrays in run.geometry.items():
            share = 100 * arrays["explained"]
            figures.append(
                charts.scatter(
                    f"{_title(name, run, runs)}: two principal axes, {share[0]:.0f} % and {share[1]:.0f} % of variance",
                    arrays["image"], arrays["text"], arrays["captions"], (IMAGE, TEXT),
                )
            )  # fmt: skip
            groups = [("pairs", IMAGE, arrays["positive"]), ("all others", TEXT, arrays["negative"])]
            histograms.append(charts.histogram(f"{_title(name, run, runs)}: cosines", arrays["edges"], groups))
    return _grid(figures + histograms) + _numbers(runs)


def _numbers(runs):
    columns = [(run, name, row) for run in runs for name, row in run.results.get("geometry", {}).items()]
    if not columns:
        return ""
    head = "".join(f"<th>{_e(name)}{_of(run, runs)}</th>" for run, name, _ in columns)
    body = ""
    for key, label in _GEOMETRY.items():
        cells = "".join(f"<td>{row[key]:.3f}</td>" if key in row else "<td></td>" for _, _, row in columns)
        body += f"<tr><td>{_e(label)}</td>{cells}</tr>"
    return f'<div class="scroll"><table class="numbers"><tr><th></th>{head}</tr>{body}</table></div>'


def missing(runs: list[Run]) -> str:
    """Sets that could not be evaluated, and why."""
    items = [
        f"<li><b>{_e(name)}</b>{_of(run, runs)}: {_e(reason)}</li>"
        for run in runs
        for name, reason in run.results.get("missing", {}).items()
    ]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def bad_samples(runs: list[Run]) -> str:
    """Counts by reason, with the first places."""
    rows = "".join(
        f"<tr><td>{_e(run.name)}</td><td>{_e(reason)}</td><td>{count:,}</td><td>{_e('; '.join(places))}</td></tr>"
        for run in runs
        for reason, (count, places) in run.bad.items()
    )
    if not rows:
        return ""
    head = "<tr><th>run</th><th>reason</th><th>samples</th><th>the first</th></tr>"
    return f'<div class="scroll"><table class="words">{head}{rows}</table></div>'


def configuration(runs: list[Run]) -> str:
    """What differs between the runs, then each configuration whole."""
    parts = []
    rows = differences(runs) if len(runs) > 1 else []
    if rows:
        head = "".join(f"<th>{_e(run.name)}</th>" for run in runs)
        body = "".join(
            f"<tr><td><code>{_e(key)}</code></td>" + "".join(f"<td><code>{_e(_value(v))}</code></td>" for v in values)
            + "</tr>" for key, values in rows
        )  # fmt: skip
        parts.append(
            f'<div class="scroll"><table class="words"><tr><th>differs</th>{head}</tr>{body}</table></div>'
        )
    elif len(runs) > 1:
        parts.append("<p>The configurations are the same.</p>")
    parts += [
        f"<details><summary>{_e(run.name)}: config.json</summary><pre>{_e(json.dumps(run.config, indent=2))}</pre>"
        "</details>"
        for run in runs
        if run.config
    ]
    return "".join(parts)


def _series(runs, key, suffix="", dashed=False) -> list[dict]:
    return [
        {"label": run.name + suffix, "colour": colour(number), "points": run.points(key), "dashed": dashed}
        for number, run in enumerate(runs)
    ]


def _grid(figures) -> str:
    figures = [figure for figure in figures if figure]
    return f'<div class="grid">{"".join(figures)}</div>' if figures else ""


def _table(runs, kind, columns: dict[str, str], plain: tuple = ()) -> str:
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
            cells = [f"<td>{_e(name) if place == 0 else ''}</td>"]
            if len(runs) > 1:
                cells.append(f'<td><i class="dot" style="background:{colour(number)}"></i>{_e(runs[number].name)}</td>')
            for key in columns:
                values = [other[key] for _, other in rows if key in other]
                best = len(values) > 1 and row.get(key) == max(values) > min(values) and key not in ("drop", *plain)
                shown = "" if key not in row else f"{row[key]:.3g}" if key in plain else _percent(row[key])
                cells.append(f"<td>{'<b>' if best else ''}{shown}{'</b>' if best else ''}</td>")
            cells += [f"<td>{row[key]:,}</td>" if key in row else "<td></td>" for key in counts]
            lines.append(f"<tr>{''.join(cells)}</tr>")
    head = ["set", *(["run"] if len(runs) > 1 else []), *columns.values(), *counts]
    titles = "".join(f"<th>{_e(title)}</th>" for title in head)
    words = " runs" if len(runs) > 1 else ""
    return f'<div class="scroll"><table class="{words.strip()}"><tr>{titles}</tr>{"".join(lines)}</table></div>'


def _retrieval_title(key):
    _, name, way = key.split("/")
    return f"Retrieval R@1, {name}, {'image to text' if way.startswith('image') else 'text to image'}"


def _picture(data: str) -> str:
    # The file could come from anywhere: only what base64 may hold gets into the attribute.
    return f'<img alt="" src="data:image/jpeg;base64,{html.escape(data, quote=True)}">'


def _mark(answer) -> str:
    return "right" if answer["right"] else ""


def _of(run, runs) -> str:
    return f" <small>{_e(run.name)}</small>" if len(runs) > 1 else ""


def _fold(run, runs) -> str:
    """Opens a <details>, unfolded for the first run only: the page of many runs stays short."""
    return '<details class="plain" open>' if run is runs[0] else '<details class="plain">'


def _title(name, run, runs) -> str:
    return f"{name}, {run.name}" if len(runs) > 1 else name


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _value(value) -> str:
    return "—" if value is None else json.dumps(value)


def _e(text) -> str:
    return html.escape(str(text))
