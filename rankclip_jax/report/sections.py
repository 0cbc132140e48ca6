"""The sections that draw. Each takes the runs and gives HTML, or nothing where no run has what it shows."""

import itertools
from collections.abc import Mapping

import numpy as np

from rankclip_jax import figures
from rankclip_jax.figures import names
from rankclip_jax.report.markup import escaped, figure, fold, grid, percent, side_by_side, table
from rankclip_jax.report.results import results
from rankclip_jax.report.runs import Run
from rankclip_jax.report.tables import geometry_numbers

_AGREEMENT = ("spearman", "overlap", "gradient_cosine")
_ONCE = ("step", "seconds", "start", "counts")  # not drawn over the steps
_MOST_PAIRS = 400  # of a projection; more are thinned evenly


def training(runs: list[Run]) -> str:
    """What was measured over the steps, results first; the validation set's line is dashed."""
    keys = list(dict.fromkeys(key for run in runs for row in run.rows for key in row if key not in _ONCE))
    measured = [key for key in keys if key.endswith(("/top1", "_to_text_r1", "_to_image_r1")) and names.split(key)]
    plain = [key for key in keys if "/" not in key]
    ordered = [key for key in names.TRAINING if key in plain] + [key for key in plain if key not in names.TRAINING]
    charts = [_chart("training", runs, key) for key in measured]
    charts += [_chart("training", runs, key, f"val/{key}") for key in ordered]
    return grid(list(filter(None, charts)))


def agreement(runs: list[Run]) -> str:
    """Rank agreement, overlap and gradient cosine over the steps."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    wanted = [key for key in keys if any(word in key for word in _AGREEMENT)]
    return grid(list(filter(None, (_chart("agreement", runs, key) for key in wanted))))


def _chart(section: str, runs: list[Run], key: str, validation: str | None = None) -> str:
    lines = [figures.Line(run.points(key), number) for number, run in enumerate(runs)]
    if validation:
        lines += [figures.Line(run.points(validation), number, dashed=True) for number, run in enumerate(runs)]
    lines = [line for line in lines if line.points]
    title, axis, share = names.metric(key)
    drawing = figures.svg(figures.chart(lines, share, axis), f"{section}/{key}") if lines else ""
    return figure(title, drawing) if lines else ""


def zero_shot(runs: list[Run]) -> str:
    """The table; then, for each set, pictures that were classified, and what was confused."""
    parts = [results(runs, "zero_shot")]
    sets = dict.fromkeys(name for run in runs for name in (*run.examples, *run.confusion))
    for name in sets:
        pictured = [_examples(run.examples.get(name, {})) for run in runs]
        if any(pictured):
            parts.append(fold(f"{escaped(name)}: right and wrong examples", side_by_side(runs, pictured)))
        confused = [_confusion(number, name, run.confusion.get(name)) for number, run in enumerate(runs)]
        if any(confused):
            parts.append(fold(f"{escaped(name)}: what was taken for what", side_by_side(runs, confused)))
    return "".join(parts)


def _examples(found: Mapping[str, list]) -> str:
    def shown(which, example):
        said = f"is {escaped(example['label'])}"
        said += f"<br>taken for {escaped(example['predicted'])}" if which == "wrong" else ""
        source = f"data:image/jpeg;base64,{example['picture']}"
        return f'<figure class="example {which}"><img src="{source}" alt=""><figcaption>{said}</figcaption></figure>'

    parts = []
    for which in ("right", "wrong"):
        if some := found.get(which):
            cards = "".join(shown(which, example) for example in some)
            parts.append(f'<h5>{which.capitalize()}</h5><div class="examples">{cards}</div>')
    return "".join(parts)


def _confusion(number: int, name: str, arrays: Mapping[str, np.ndarray] | None) -> str:
    if not arrays:
        return ""
    _, columns = figures.shown_classes(arrays["confusion"])
    drawing = figures.svg(figures.confusion({"": arrays}), f"confusion/{number}/{name}")
    total = len(arrays["classes"])
    occur = np.count_nonzero(arrays["confusion"].sum(axis=0) + arrays["confusion"].sum(axis=1))
    which = "have an image or were said" if len(columns) == occur else "are confused most"
    of = f" Of {total:,} classes, the {len(columns)} that {which}." if len(columns) < total else ""
    words = f"In per cent of the images of each class.{of}"
    matrix = f'<div class="matrix scroll">{drawing}</div><p class="note">{words}</p>'
    return f'<div class="pair"><div>{matrix}</div>{_most_confused(arrays)}</div>'


def _most_confused(arrays: Mapping[str, np.ndarray]) -> str:
    counts_CxC, classes = arrays["confusion"], [escaped(name) for name in arrays["classes"]]
    wrong_CxC = np.where(np.eye(len(classes), dtype=bool), 0, counts_CxC)
    rows = []
    for i in np.argsort(-wrong_CxC, axis=None, kind="stable")[:12]:
        label, said = divmod(int(i), len(classes))
        if count := wrong_CxC[label, said]:
            rows.append((classes[label], classes[said], f"{count:,}", percent(count / counts_CxC[label].sum())))
    if not rows:
        return "<p>No image was taken for another class.</p>"
    return table(("is", "taken for", "images", "of its class"), rows, "words")


def retrieval(runs: list[Run]) -> str:
    """Recalls, then queries with their five nearest; the right ones are marked."""
    parts = [results(runs, "retrieval")]
    titles = {
        "image_to_text": "pictures and their nearest captions, evenly spaced over the set",
        "image_to_text_wrong": "pictures whose nearest caption is wrong",
        "text_to_image": "captions and their nearest pictures, evenly spaced over the set",
        "text_to_image_wrong": "captions whose nearest picture is wrong",
    }
    for name in dict.fromkeys(name for run in runs for name in run.retrieval):
        for way, title in titles.items():
            columns = []
            for number, run in enumerate(runs):
                queries = enumerate(run.retrieval.get(name, {}).get(way, []))
                drawn = [figures.svg(figures.query(asked), f"{way}/{number}/{name}/{i}") for i, asked in queries]
                columns.append([f'<div class="query">{drawing}</div>' for drawing in drawn])
            if any(columns):
                rows = [side_by_side(runs, cells) for cells in itertools.zip_longest(*columns, fillvalue="")]
                key = '<p class="note"><i class="right-key"></i> the right one</p>'
                queries = f'<div class="{"queries" if len(runs) == 1 else "rows"}">{"".join(rows)}</div>'
                parts.append(fold(f"{escaped(name)}: {title}", key + queries))
    return "".join(parts)


def geometry(runs: list[Run]) -> str:
    """The numbers, projections and histograms of cosines."""
    parts = [geometry_numbers(runs)]
    for name in dict.fromkeys(name for run in runs for name in run.geometry):
        cells = [_geometry(number, name, run.geometry.get(name)) for number, run in enumerate(runs)]
        parts.append(fold(f"{escaped(name)}: where its embeddings lie", side_by_side(runs, cells)))
    return "".join(parts)


def _geometry(number: int, name: str, arrays: Mapping[str, np.ndarray] | None) -> str:
    if not arrays:
        return ""
    few = slice(None, None, max(1, -(-len(arrays["image"]) // _MOST_PAIRS)))
    labels = {group: [f"{kind}: {caption}" for caption in arrays["captions"][few]]
              for group, kind in (("images", "image"), ("texts", "text"))}  # fmt: skip
    points = figures.projection(arrays["image"][few], arrays["text"][few], arrays["explained"])
    counts = figures.cosines(arrays["edges"], arrays["positive"], arrays["negative"])
    drawn = [
        figure("Embeddings on two principal axes", figures.svg(points, f"projection/{number}/{name}", labels)),
        figure("Cosines of image and text", figures.svg(counts, f"cosines/{number}/{name}")),
    ]
    return grid(drawn)
