"""Results for the console and for metrics.jsonl."""

from rankclip_jax import metrics

_TITLES = {
    "zero_shot": "zero-shot",
    "robustness": "robustness",
    "retrieval": "retrieval",
    "linear_probe": "linear probe",
    "geometry": "geometry",
}
_COUNTS = ("n", "images", "texts")


def text(results: dict) -> str:
    """A table for each kind of evaluation that has results, then what is missing; ends with a new line."""
    parts = []
    for kind, title in _TITLES.items():
        rows = results.get(kind)
        if rows and kind == "geometry":  # a row a number: there are ten of them, and few sets
            turned = {key: {name: row[key] for name, row in rows.items()} for key in next(iter(rows.values()))}
            parts.append(metrics.table(turned, title, percent=False))
        elif rows and kind == "retrieval":
            short = {name: {_short(key): value for key, value in row.items()} for name, row in rows.items()}
            parts.append(metrics.table(short, title))
        elif rows:
            parts.append(metrics.table(rows, title))
    parts += [f"missing: {name}: {reason}" for name, reason in results.get("missing", {}).items()]
    return "".join(part + "\n" for part in parts)


def _short(key: str) -> str:
    return key.replace("image_to_text_r", "i2t R@").replace("text_to_image_r", "t2i R@")


def flat(results: dict) -> dict[str, float]:
    """{"zero_shot/cifar10/top1": ...}: the numbers of all kinds but counts."""
    return {
        f"{kind}/{name}/{key}": value
        for kind in _TITLES
        for name, row in results.get(kind, {}).items()
        for key, value in row.items()
        if key not in _COUNTS
    }
