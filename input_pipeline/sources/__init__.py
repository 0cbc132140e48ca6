"""Where samples come from: one file a format. `open_source` is the one entry, `Source` what it gives."""

import json
from pathlib import Path

from input_pipeline import shapes
from input_pipeline.sources import drawn, table
from input_pipeline.sources.source import Source
from rankclip_jax.errors import InputError

__all__ = ["Source", "open_labelled", "open_source"]


def open_source(spec, path, *, image_side: int, split: str = "train") -> Source:
    """Opens config.data's `train` or `val`, or a labelled set of config.eval.zero_shot.

    Args:
      spec: has `format`, and for csv `image_key`, `caption_key` (or `label_key`) and `delimiter`.
      path: csv: the file. shapes: the number of scenes, or the name of a labelled split.
      image_side: pixels; side of the scenes that `shapes` draws.
      split: train | val; which stream of scenes `shapes` draws from.

    Raises:
      InputError: unknown format, missing file or column, or no rows.
    """
    match spec.format:
        case "csv":
            return table.open_table(spec, path)
        case "shapes":
            return drawn.open_drawn(path, image_side, split)
    raise InputError(f"config.data.format must be csv or shapes; got {spec.format!r}")


def open_labelled(spec, *, image_side: int) -> tuple[Source, list[str], list[str] | None]:
    """A set of config.eval.zero_shot: its source, class names in label order, and prompts (None: not given).

    Raises:
      InputError: as `open_source`; or the class names are missing, or fewer than the labels need.
    """
    source = open_source(spec, spec.path, image_side=image_side)
    if spec.format == "shapes":
        return source, shapes.CLASS_NAMES, shapes.TEMPLATES
    classes = _json_list(spec.classes, "classes")
    if source.labels.min() < 0 or source.labels.max() >= len(classes):
        wrong = source.labels[(source.labels < 0) | (source.labels >= len(classes))][0]
        raise InputError(f"{spec.path} has label {wrong}, but {spec.classes} names {len(classes)} classes")
    return source, classes, _json_list(spec.templates, "templates")


def _json_list(path, key):
    if path is None and key == "templates":
        return None
    if not path or not Path(path).is_file():
        raise InputError(f"config.eval.zero_shot: {key} must be a JSON file with a list of strings; no file {path}")
    items = json.loads(Path(path).read_text())
    if not (isinstance(items, list) and items and all(isinstance(item, str) for item in items)):
        raise InputError(f"{path} must hold a JSON list of strings")
    return items
