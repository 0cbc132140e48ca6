"""Pictures in files of their own, with captions, read in Python: many by one call (together.py)."""

from collections.abc import Callable

from input_pipeline.graph import all_from_python
from input_pipeline.sources import together
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError

_BETWEEN = b"\0"  # several captions


def captioned_files(image: Callable, text: Callable, several: bool = False) -> tuple[Callable, together.Together]:
    """(read, together) of a Source.

    Args:
      image, text: (row, largest number of bytes; not given: any) -> bytes, of `text` a list of them if `several`. They
        raise InputError for a bad row.
    """

    def alone(row):
        caption, encoded = all_from_python(lambda row: (text(row), image(row)), [(None,) if several else (), ()], row)
        return {"image": encoded, "caption": caption}

    def of_given(given_2):
        caption = tf.strings.split(given_2[1], _BETWEEN) if several else given_2[1]
        return {"image": given_2[0], "caption": caption}

    def read(row, given=None):
        return together.given_or_alone(given, of_given, lambda: alone(row))

    def packed(captions):
        joined = _BETWEEN.join(captions)
        if not joined or joined.count(_BETWEEN) != len(captions) - 1:
            raise InputError("captions that cannot be packed")
        return joined

    def fetch(row):
        caption = text(row, together.SMALL)
        return image(row, together.SMALL), packed(caption) if several else caption

    return read, together.row_by_row(2, fetch)
