"""Tables of what was measured: each share with its 95 % interval, what guessing reaches, and how much it rests on."""

import math
from collections.abc import Mapping, Sequence

from scipy.stats import binomtest

from rankclip_jax.figures import names
from rankclip_jax.report.markup import escaped, named, percent, table
from rankclip_jax.report.runs import Run

HOW = (
    "In small: 95 % interval (Wilson). In bold: the best run, where no other run's interval overlaps its own. "
    "Chance: what guessing would reach."
)
_COLUMNS = {
    "zero_shot": ("top1", "top3", "top5", "top10", "mean_per_class"),
    "linear_probe": ("top1", "mean_per_class", "l2"),
    "robustness": ("reference", "shifted", "drop", "effective"),
    "retrieval": tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)),
}
_COUNTS = {"n": "images", "images": "images", "texts": "captions", "classes": "classes"}


def interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's, 95 %, of a share of n."""
    found = binomtest(round(share * n), n).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def trials(key: str, row: Mapping) -> int | None:
    """Of how many a number of eval.json is a share; None where it is none, or that is not known."""
    if key.startswith("top"):
        return row.get("n")
    return row.get({"image": "images", "text": "texts"}.get(key.split("_to_")[0], "")) if "_to_" in key else None


def chance(key: str, row: Mapping) -> float | None:
    """What guessing reaches; None where that is not known."""
    digits = key.lstrip("abcdefghijklmnopqrstuvwxyz_")
    if key.startswith(("top", "mean_per_class")):
        classes = row.get("classes")
        return min(1.0, int(digits or 1) / classes) if classes else None
    if "_to_" not in key or not {"images", "texts"} <= row.keys():
        return None
    images, texts, k = row["images"], row["texts"], int(digits)
    if key.startswith("text"):
        return min(1.0, k / images)
    own = texts / images  # captions an image
    misses = [max(0.0, 1 - own / (texts - place)) for place in range(min(k, texts))]
    return 1 - math.prod(misses)


def headline(run: Run) -> list[tuple[str, str, str]]:
    """(name, number, interval) of what says most, for the top of the page: at most four."""
    found = []
    for kind, keys in (("zero_shot", ("top1",)), ("retrieval", ("image_to_text_r1", "text_to_image_r1"))):
        for name, row in run.results.get(kind, {}).items():
            for key in keys:
                if key in row:
                    n = trials(key, row)
                    within = "{:.1f} to {:.1f} %".format(*(100 * end for end in interval(row[key], n))) if n else ""
                    found.append((f"{name}: {names.result(key).title}", percent(row[key]), within))
    return found[:4]


def results(runs: Sequence[Run], kind: str) -> str:
    """A row a set and run, and one for chance. Empty where nothing of the kind was measured."""
    sets = dict.fromkeys(name for run in runs for name in run.results.get(kind, {}))
    found = [row for run in runs for row in run.results.get(kind, {}).values()]
    columns = [key for key in _COLUMNS[kind] if any(key in row for row in found)]
    counts = [key for key in _COUNTS if any(key in row for row in found)]
    several = len(runs) > 1
    lines = []
    for name in sets:
        rows = [(number, run.results.get(kind, {}).get(name, {})) for number, run in enumerate(runs)]
        rows = [(number, row) for number, row in rows if row]
        best = {key: _best(key, [row for _, row in rows]) for key in columns}
        for place, (number, row) in enumerate(rows):
            cells = [escaped(name) if place == 0 else "", *([named(number, runs[number])] if several else [])]
            cells += [_cell(key, row, row is best[key]) for key in columns]
            lines.append([*cells, *(f"{row[key]:,}" if key in row else "" for key in counts)])
        guessed = [{share for _, row in rows if (share := chance(key, row)) is not None} for key in columns]
        if any(guessed):
            said = [" or ".join(map(percent, sorted(shares))) for shares in guessed]
            cells = ["", *([""] if several else []), *said, *("" for _ in counts)]
            cells[1 if several else 0] = "chance"
            lines.append([f'<span class="chance">{cell}</span>' for cell in cells])
    head = ["set", *(["run"] if several else [])]
    head += [escaped(names.result(key).title) for key in columns] + [_COUNTS[key] for key in counts]
    return table(head, lines, "runs" if several else "") if lines and columns else ""


def _best(key: str, rows: list[dict]) -> dict | None:
    """The row whose interval lies above those of all others."""
    known = [(row, n) for row in rows if key in row and (n := trials(key, row))]
    if len(known) < 2:
        return None
    (first, n), *others = sorted(known, key=lambda pair: -pair[0][key])
    above = all(interval(first[key], n)[0] > interval(row[key], m)[1] for row, m in others)
    return first if above else None


def _cell(key: str, row: dict, best: bool) -> str:
    if key not in row:
        return ""
    if not names.result(key).share:
        return f"{row[key]:.3g}"
    n = trials(key, row)
    ends = " to ".join(f"{100 * end:.1f}" for end in interval(row[key], n)) if n else ""
    shown = f"<b>{percent(row[key])}</b>" if best else percent(row[key])
    return f"{shown}<small>{ends}</small>" if ends else shown
