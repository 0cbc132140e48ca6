"""Which row stands at which place of the training stream: a function of the place, without a list of any length."""

import tensorflow as tf

from input_pipeline.sources import Source

_shuffled = tf.random.experimental.index_shuffle


def row_at(source: Source, stream: tf.Tensor, seed: int) -> tf.Tensor:
    """The row (int64 scalar) at place `stream` (int or int64 scalar, from 0) of the endless stream that `seed` gives.

    Epoch e is the places from e * size on. In it every row comes once; of a mixture with weights every part comes as
    often as its share says, and its own rows go round in epochs of their own.
    """
    stream = tf.cast(stream, tf.int64)
    epoch, place = stream // source.size, stream % source.size
    place = _shuffled(place, _key(seed, epoch), source.size - 1)
    if source.shares is None:
        return place
    rows_M, share_M = (tf.constant(numbers, tf.int64) for numbers in zip(*source.shares, strict=True))
    part = tf.searchsorted(tf.cumsum(share_M), [place], side="right")[0]
    first_place, first_row = tf.cumsum(share_M, exclusive=True)[part], tf.cumsum(rows_M, exclusive=True)[part]
    rows = rows_M[part]
    own = epoch * share_M[part] + place - first_place  # its place in the part's own stream
    # Each part has its own sequence of shuffles: any odd number spreads them over the seeds.
    part_seed = seed + (tf.cast(part, tf.int64) + 1) * 0x9E3779B1
    return first_row + _shuffled(own % rows, _key(part_seed, own // rows), rows - 1)


def _key(seed, epoch):
    return tf.cast(tf.stack([tf.cast(seed, tf.int64), epoch]), tf.uint32)
