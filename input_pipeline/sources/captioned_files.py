"""Pictures in files of their own, with captions, read in Python: many by one call.

A call from the graph takes some 150 us of a processor, and the file 15. So the small files of several rows are read
together, before the rows are needed. What is large, or cannot be read, is read alone.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from input_pipeline.graph import all_from_python, apart
from rankclip_jax.common.errors import InputError

SMALL = 1 << 18  # bytes
_BETWEEN = b"\0"  # several captions


def captioned_files(image: Callable, text: Callable, several: bool = False) -> tuple[Callable, Callable]:
    """(read, together) of a Source.

    Args:
      image, text: (row, largest number of bytes; not given: any) -> bytes, of `text` a list of them if `several`. They
        raise InputError for a bad row.
    """

    def alone(row):
        caption, encoded = all_from_python(lambda row: (text(row), image(row)), [(None,) if several else (), ()], row)
        return {"image": encoded, "caption": caption}

    def read(row, given_2=None):
        if given_2 is None:
            return alone(row)

        def given():
            caption = tf.strings.split(given_2[1], _BETWEEN) if several else given_2[1]
            return {"image": given_2[0], "caption": caption}

        return tf.cond(tf.strings.length(given_2[0]) > 0, given, apart(lambda: alone(row)))

    def packed(caption):
        if not several:
            return caption
        joined = _BETWEEN.join(caption)
        return joined if joined and joined.count(_BETWEEN) == len(caption) - 1 else None

    def together(rows_N):
        found_Nx2 = np.full((len(rows_N), 2), b"", object)
        for given_2, row in zip(found_Nx2, rows_N.tolist(), strict=True):
            try:
                caption, encoded = packed(text(row, SMALL)), image(row, SMALL)
            except InputError:  # read alone, it says why
                continue
            if caption is not None:
                given_2[:] = encoded, caption
        return found_Nx2

    return read, together
