"""Evaluation results as text for the console, and as flat numbers for metrics.jsonl."""

_TITLES = {
    "zero_shot": "zero-shot",
    "robustness": "robustness",
    "retrieval": "retrieval",
    "linear_probe": "linear probe",
    "geometry": "geometry",
}
# Of a kind, what a training's console shows.
_LOSSES = ("clip", "siglip", "rank_in_modal", "rank_cross_modal")
_SHOWN = {
    "zero_shot": ("top1", "top5"),
    "retrieval": ("image_to_text_r1", "text_to_image_r1"),
    "linear_probe": ("top1",),
    "geometry": ("spearman_cross_modal", "modality_gap"),
}
_COUNTS = ("n", "images", "texts", "classes")


def text(results: dict) -> str:
    """One table per kind of evaluation with results, then the missing sets; ends with a newline."""
    parts = []
    for kind, title in _TITLES.items():
        rows = results.get(kind)
        if rows and kind == "geometry":  # one row per metric: there are ten metrics and few sets
            turned = {key: {name: row[key] for name, row in rows.items()} for key in next(iter(rows.values()))}
            parts.append(table(turned, title, percent=False))
        elif rows and kind == "retrieval":
            shortened = {name: {short(key): value for key, value in row.items()} for name, row in rows.items()}
            parts.append(table(shortened, title))
        elif rows:
            parts.append(table(rows, title))
    parts += [f"missing: {name}: {reason}" for name, reason in results.get("missing", {}).items()]
    return "".join(part + "\n" for part in parts)


def lines(results: dict, validation: dict[str, float]) -> str:
    """A line of at most 80 columns for each set, with the numbers that say most; then the missing sets.

    Args:
      validation: numbers of the validation, {"val/clip": ...}; or none.
    """
    losses = [f"{key[4:]} {value:.4g}" for key, value in validation.items() if key[4:] in _LOSSES]
    shown = [("validation", "  ".join(losses))] if losses else []
    for kind, keys in _SHOWN.items():
        for name, row in results.get(kind, {}).items():
            form = "{:.3f}" if kind == "geometry" else "{:.2%}"
            said = [f"{short(key)} {form.format(row[key])}" for key in keys if key in row]
            shown.append((name, "  ".join(said)))
    width = max((len(name) for name, _ in shown), default=0)
    parts = [f"  {name.ljust(width)}  {said}" for name, said in shown]
    parts += [f"missing: {name}: {reason}" for name, reason in results.get("missing", {}).items()]
    return "".join(part + "\n" for part in parts)


def short(key: str) -> str:
    """A number's name, for a column."""
    return key.replace("image_to_text_r", "i2t R@").replace("text_to_image_r", "t2i R@").replace("_", " ")


def flat(results: dict) -> dict[str, float]:
    """{"zero_shot/cifar10/top1": ...}: the numbers of all kinds, without counts."""
    return {
        f"{kind}/{name}/{key}": value
        for kind in _TITLES
        for name, row in results.get(kind, {}).items()
        for key, value in row.items()
        if key not in _COUNTS
    }


def counts(results: dict) -> dict[str, dict[str, int]]:
    """{"zero_shot/cifar10": {"n": 10000, "classes": 10}}: how much each set's numbers rest on."""
    found = {
        f"{kind}/{name}": {key: row[key] for key in _COUNTS if key in row}
        for kind in _TITLES
        for name, row in results.get(kind, {}).items()
    }
    return {name: row for name, row in found.items() if row}


def table(results: dict[str, dict[str, float]], title: str = "zero-shot", percent: bool = True) -> str:
    """One row per set. Counts (int) stay as they are; other values are in per cent, or have four significant digits."""
    columns = list(dict.fromkeys(key for row in results.values() for key in row if key != "classes"))
    first = max(12, len(title) + 2, *(len(name) + 2 for name in results))
    widths = [max(11, len(column) + 2) for column in columns]
    lines = [title.ljust(first) + "".join(c.rjust(w) for c, w in zip(columns, widths, strict=True))]

    def cell(row, column):
        value = row.get(column)
        if value is None or isinstance(value, int):
            return "" if value is None else f"{value:,}"
        return f"{100 * value:.2f} %" if percent and column != "l2" else f"{value:.4g}"

    for name, row in results.items():
        lines.append(name.ljust(first) + "".join(cell(row, c).rjust(w) for c, w in zip(columns, widths, strict=True)))
    return "\n".join(lines)
