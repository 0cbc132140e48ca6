"""The sections that draw. Each takes the runs and gives HTML, or nothing where no run has what it shows."""

from collections.abc import Mapping

import numpy as np

from rankclip_jax import figures
from rankclip_jax.common.errors import InputError
from rankclip_jax.report.markup import escaped, figure, fold, grid, of, percent, table
from rankclip_jax.report.runs import Run
from rankclip_jax.report.tables import geometry_numbers, recalls

_CURVES = {
    "loss": "Loss",
    "clip": "CLIP term (nats)",
    "siglip": "SigLIP term",
    "rank_in_modal": "Ranking term, in-modal (nats)",
    "rank_cross_modal": "Ranking term, cross-modal (nats)",
    "cyclic_in_modal": "CyCLIP's term, in-modal",
    "cyclic_cross_modal": "CyCLIP's term, cross-modal",
    "rank_weight": "Weight of the ranking terms",
    "logit_scale": "Logit scale",
    "logit_bias": "Logit bias",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "images_per_second": "Images per second",
    "images_read_per_second": "Images read per second, a process",
    "data_wait": "Share of time without data",
    "tflops_per_device": "TFLOP/s a device",
    "mfu": "Model FLOPs utilisation",
}
_SHARES = ("data_wait", "mfu")
_AGREEMENT = ("spearman", "overlap", "gradient_cosine")
_MOST_PAIRS = 400  # of a projection; more are thinned evenly


def training(runs: list[Run]) -> str:
    """Everything of metrics.jsonl over the steps; the validation set's line is dashed."""
    keys: list[str] = list(dict.fromkeys(key for run in runs for row in run.rows for key in row if key != "step"))
    plain = [key for key in keys if "/" not in key]
    shown = [key for key in _CURVES if key in plain] + [key for key in plain if key not in _CURVES]
    charts = [_chart(_CURVES.get(key, key), "training", runs, key, f"val/{key}", key in _SHARES) for key in shown]
    tops = [key for key in keys if key.startswith("zero_shot/") and key.endswith("/top1")]
    charts += [_chart(f"Zero-shot top-1, {key.split('/')[1]}", "training", runs, key, share=True) for key in tops]
    found = [key for key in keys if key.startswith("retrieval/") and key.endswith("_r1")]
    charts += [_chart(_retrieval_title(key), "training", runs, key, share=True) for key in found]
    return grid(list(filter(None, charts)))


def agreement(runs: list[Run]) -> str:
    """Rank agreement, overlap and gradient cosine over the steps."""
    keys = dict.fromkeys(key for run in runs for row in run.rows for key in row)
    wanted = [key for key in keys if any(word in key for word in _AGREEMENT)]
    titles = {key: key.removeprefix("val/").removeprefix("geometry/").replace("_", " ") for key in wanted}
    charts = [_chart(titles[key].capitalize(), "agreement", runs, key) for key in wanted]
    return grid(list(filter(None, charts)))


def _chart(
    title: str, section: str, runs: list[Run], key: str, validation: str | None = None, share: bool = False
) -> str:
    lines = [figures.Line(run.points(key), number) for number, run in enumerate(runs)]
    if validation:
        lines += [figures.Line(run.points(validation), number, dashed=True) for number, run in enumerate(runs)]
    lines = [line for line in lines if line.points]
    return figure(title, figures.svg(figures.chart(lines, share), f"{section}/{key}")) if lines else ""


def _retrieval_title(key):
    _, name, way = key.split("/")
    return f"Retrieval R@1, {name}, {'image to text' if way.startswith('image') else 'text to image'}"


def confusion(runs: list[Run]) -> str:
    """The matrix and the most frequent confusions of every set."""
    parts = []
    for number, run in enumerate(runs):
        for name, arrays in run.confusion.items():
            drawing = figures.svg(figures.confusion({"": arrays}), f"confusion/{number}/{name}")
            words = "Rows: the class it is. Columns: the class it was taken for. In the set's order; of "
            words += f"{len(arrays['classes'])} classes, those that have an image or were said."
            matrix = f'<div class="matrix">{drawing}<p>{words}</p></div>'
            body = f'<div class="pair">{matrix}{_most_confused(arrays)}</div>'
            parts.append(fold(run, runs, escaped(name) + of(run, runs), body))
    return "".join(parts)


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
    parts = [recalls(runs)]
    for number, run in enumerate(runs):
        for name, found in run.retrieval.items():
            cards = []
            for place, asked in enumerate(found["image_to_text"] + found["text_to_image"]):
                try:
                    drawing = figures.svg(figures.query(asked), f"retrieval/{number}/{name}/{place}")
                except (OSError, ValueError) as error:
                    message = f"{run.name}: a picture in eval/retrieval_{name}.json cannot be read ({error})"
                    raise InputError(f"{message}; evaluate again with --mode=eval") from None
                cards.append(f'<div class="query">{drawing}</div>')
            title = f"{escaped(name)}{of(run, runs)}: queries evenly spaced over the set, and their five nearest"
            key = '<p class="note"><i class="right-key"></i> the right one</p>'
            parts.append(fold(run, runs, title, f'{key}<div class="queries">{"".join(cards)}</div>'))
    return "".join(parts)


def geometry(runs: list[Run]) -> str:
    """Projection, histograms of cosines, and the numbers."""
    projections, histograms = [], []
    for number, run in enumerate(runs):
        for name, arrays in run.geometry.items():
            title = f"{name}, {run.name}" if len(runs) > 1 else name
            few = slice(None, None, max(1, -(-len(arrays["image"]) // _MOST_PAIRS)))
            labels = {group: [f"{kind}: {caption}" for caption in arrays["captions"][few]]
                      for group, kind in (("images", "image"), ("texts", "text"))}  # fmt: skip
            points = figures.projection(arrays["image"][few], arrays["text"][few])
            share = 100 * arrays["explained"]
            projections.append(
                figure(
                    f"{title}: two principal axes, {share[0]:.0f} % and {share[1]:.0f} % of variance",
                    figures.svg(points, f"projection/{number}/{name}", labels),
                )
            )
            counts = figures.cosines(arrays["edges"], arrays["positive"], arrays["negative"])
            histograms.append(figure(f"{title}: cosines", figures.svg(counts, f"cosines/{number}/{name}")))
    return grid(projections + histograms) + geometry_numbers(runs)
