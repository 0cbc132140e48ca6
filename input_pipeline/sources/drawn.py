"""The built-in demo set, drawn on the fly (input_pipeline/shapes.py)."""

import numpy as np

from input_pipeline import graded, shapes
from input_pipeline.graph import from_python
from input_pipeline.sources.source import Reading, Source
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError


def open_drawn(path: str | int, side: int, split: str) -> Source:
    """Scenes of `side` pixels.

    `path`: a number of them, from `split`; graded:COUNT or stated:COUNT, the same with the captions of graded.py; or a
    labelled set: seen, held_out:800.
    """
    name, colon, count = str(path).partition(":")
    size = int(count) if count.isascii() and count.isdigit() else 0
    say = {"graded": graded.caption, "stated": graded.statement}.get(name)
    if name in ("seen", "held_out"):
        split, size = name, size if colon else 16 * len(shapes.SPLITS[name][1])
    elif say is None:
        size = path if isinstance(path, int) else 0
    if size < 1:
        known = "a number of scenes, graded:COUNT, stated:COUNT, seen, held_out or seen:COUNT"
        raise InputError(f"shapes: got {path!r}, expected {known}")

    def read(row):
        def draw(row):
            image, caption, label = shapes.draw(split, int(row), side)
            return image, (say(split, int(row)) if say else caption).encode(), np.int32(label)

        image, caption, label = tf.numpy_function(draw, [row], (tf.uint8, tf.string, tf.int32))
        sample = {"image": image, "caption": caption, "label": label}
        known = {"image": (side, side, 3), "caption": (), "label": ()}
        return {key: tf.ensure_shape(value, known[key]) for key, value in sample.items()}

    told = say or shapes.caption
    text = lambda row: from_python(lambda row: told(split, int(row)).encode(), row)  # noqa: E731
    return Source(
        size,
        read,
        where=lambda row: f"shapes {split} scene {row}",
        text=Reading(lambda row: {"caption": text(row)}),
        captions=lambda: (told(split, row) for row in range(min(size, 10_000))),
        index=lambda: [f"shapes {split}", name] if say else [f"shapes {split}"],
    )
