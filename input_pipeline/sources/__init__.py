"""Where samples come from: one file a format. `open_source` is the one entry, `Source` what it gives."""

from input_pipeline.sources import drawn, table
from input_pipeline.sources.source import Source
from rankclip_jax.errors import InputError

__all__ = ["Source", "open_source"]


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
