"""The built-in demo set, drawn on the fly (input_pipeline/shapes.py)."""

import numpy as np
import tensorflow as tf

from input_pipeline import shapes
from input_pipeline.sources.source import Source
from rankclip_jax.common.errors import InputError


def open_drawn(path: str | int, side: int, split: str) -> Source:
    """Scenes of `side` pixels: `path` is a number of them, from `split`, or a labelled set: seen, held_out:800."""
    name, colon, count = str(path).partition(":")
    if name in ("seen", "held_out"):
        split, size = name, 16 * len(shapes.SPLITS[name][1])
        if colon:
            size = int(count) if count.isascii() and count.isdigit() else 0
    else:
        size = path if isinstance(path, int) else 0
    if size < 1:
        raise InputError(f"shapes: give a number of scenes, or seen, held_out, seen:COUNT; got {path!r}")

    def read(row):
        def draw(row):
            image, caption, label = shapes.draw(split, int(row), side)
            return image, caption.encode(), np.int32(label)

        image, caption, label = tf.numpy_function(draw, [row], (tf.uint8, tf.string, tf.int32))
        sample = {"image": image, "caption": caption, "label": label}
        known = {"image": (side, side, 3), "caption": (), "label": ()}
        return {key: tf.ensure_shape(value, known[key]) for key, value in sample.items()}

    return Source(
        size,
        read,
        where=lambda row: f"shapes {split} scene {row}",
        captions=lambda: (shapes.draw(split, row, 8)[1] for row in range(min(size, 10_000))),
        index=lambda: [f"shapes {split}"],
    )
