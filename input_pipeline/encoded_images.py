"""Reads the encoded image, or the caption, of any row of a source, for use without TensorFlow."""

import functools
from collections.abc import Callable

from input_pipeline.bad_samples import in_words
from input_pipeline.sources import Source
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError


def reader(source: Source) -> Callable[[int], bytes]:
    """Returns read(row) -> the bytes of its image, which may be called from several threads.

    read raises InputError with the reason for an unusable row, and ConnectionError where the store stopped answering.
    """
    graph = _traced(lambda row: source.read(row)["image"])

    def read(row: int) -> bytes:
        try:
            return graph(tf.constant(row, tf.int64)).numpy()
        except tf.errors.OpError as error:
            _check(source.ahead)
            raise InputError(in_words(error)) from None

    return read


def _traced(read):
    """Once, before threads call it."""
    return tf.function(read, autograph=False).get_concrete_function(tf.TensorSpec((), tf.int64))


def _check(ahead):
    try:
        if ahead:
            ahead.check()
    except InputError as refused:
        raise ConnectionError(str(refused)) from None


def captions(source: Source) -> Callable[[int], tuple[str, ...]]:
    """Returns captions(row) -> its captions, () for a row without a good one. Raises ConnectionError as `reader`."""
    read, ahead = source.text or (source.read, source.ahead)
    graph = functools.cache(lambda: _traced(lambda row: tf.reshape(read(row)["caption"], [-1])))  # if it is asked for

    def texts(row: int) -> tuple[str, ...]:
        try:
            found = graph()(tf.constant(row, tf.int64)).numpy()
        except tf.errors.OpError:
            _check(ahead)
            return ()
        return tuple(text.decode(errors="replace").strip() for text in found)

    return texts
