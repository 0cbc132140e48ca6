"""Reads the encoded image, or the caption, of any row of a source, for use without TensorFlow."""

from collections.abc import Callable

import tensorflow as tf

from input_pipeline.bad_samples import in_words
from input_pipeline.sources import Source
from rankclip_jax.common.errors import InputError


def reader(source: Source) -> Callable[[int], bytes]:
    """Returns read(row) -> the bytes of its image, which may be called from several threads.

    read raises InputError with the reason for an unusable row, and ConnectionError where the store stopped answering.
    """
    read_image = tf.function(lambda row: source.read(row)["image"])
    graph = read_image.get_concrete_function(tf.TensorSpec((), tf.int64))  # traced once, before threads call it

    def read(row: int) -> bytes:
        try:
            return graph(tf.constant(row, tf.int64)).numpy()
        except tf.errors.OpError as error:
            try:
                if source.ahead:
                    source.ahead.check()
            except InputError as refused:
                raise ConnectionError(str(refused)) from None
            raise InputError(in_words(error)) from None

    return read


def captions(source: Source) -> Callable[[int], tuple[str, ...]]:
    """Returns captions(row) -> its captions; () for a row without a good one."""
    read = source.text.read if source.text else source.read

    def texts(row: int) -> tuple[str, ...]:
        try:
            found = tf.reshape(read(tf.constant(row, tf.int64))["caption"], [-1]).numpy()
        except tf.errors.OpError:
            return ()
        return tuple(text.decode(errors="replace").strip() for text in found)

    return texts
