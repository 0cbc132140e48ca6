"""The shuffled order of the training stream, computed from the position without a list."""

import tensorflow as tf

from input_pipeline.sources import Source

_shuffled = tf.random.experimental.index_shuffle


def row_at(source: Source, stream: tf.Tensor, seed: int) -> tf.Tensor:
    """The row (int64 scalar) at position `stream` (int or int64 scalar, from 0) of the endless stream of `seed`.

    Epoch e has the positions from e * size to (e + 1) * size - 1 and contains every row once. In a weighted mixture it
    contains each part as often as its share, and the rows of a part have their own epochs.
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
    own = epoch * share_M[part] + place - first_place  # position in the part's own stream
    # Each part has its own shuffles: an odd factor gives each a different seed.
    part_seed = seed + (tf.cast(part, tf.int64) + 1) * 0x9E3779B1
    return first_row + _shuffled(own % rows, _key(part_seed, own // rows), rows - 1)


def _key(seed, epoch):
    return tf.cast(tf.stack([tf.cast(seed, tf.int64), epoch]), tf.uint32)
