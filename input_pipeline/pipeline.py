"""Batches from a source: shuffled and resumable for training, complete and padded for evaluation.

The training stream is endless: stream position p is epoch p // size, and within an epoch every row comes once, in
an order that `index_shuffle` computes from (seed, epoch) without a list. So a batch is a function of the position
at which it starts, and resuming at any position costs nothing. Each process reads every P-th position.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from input_pipeline import transforms
from input_pipeline.bad_samples import BadSamples, reason_of_failure
from input_pipeline.sources import Source
from rankclip_jax.errors import InputError

# tf.data runs on the host; TensorFlow must never take the accelerator's memory.
tf.config.set_visible_devices([], "GPU")


class TrainBatches:
    """Iterator over {"image": uint8 (b, S, S, 3), "tokens": int32 (b, L)}, b this process's share of the batch.

    Attributes:
      position: this process's place in its stream after the batch last returned; given as `start`, the
        stream goes on there.
      bad: what was passed over (BadSamples).
    """

    def __init__(
        self,
        source: Source,
        tokenizer,
        *,
        batch_size: int,
        image_side: int,
        context_length: int,
        crop_scale: tuple[float, float],
        seed: int,
        start: int = 0,
        process: tuple[int, int] = (0, 1),
        bad_path=None,
        max_bad_fraction: float = 1.0,
    ):
        """`batch_size` is this process's share; `process` is (its index, how many there are)."""
        self.position = start
        self.bad = BadSamples(source, bad_path, max_bad_fraction)
        index, count = process

        def row_of(position):
            stream = position * count + index
            key = tf.cast(tf.stack([seed, stream // source.size]), tf.uint32)
            return tf.random.experimental.index_shuffle(stream % source.size, key, source.size - 1)

        def sample(position):
            raw = source.read(row_of(position))
            key = tf.stack([tf.constant(seed, tf.int64), position * count + index])
            image = transforms.random_resized_crop(transforms.decode(raw["image"]), image_side, crop_scale, key)
            return {"image": image, "caption": raw["caption"], "position": position}

        def tokenize(batch):
            ids = tf.numpy_function(
                lambda captions: tokenizer([c.decode(errors="replace") for c in captions], context_length),
                [batch.pop("caption")],
                tf.int32,
            )
            return batch | {"tokens": tf.ensure_shape(ids, (batch_size, context_length))}

        self._row_of, self._sample = row_of, sample
        self._require_one_good(source, start)
        data = tf.data.Dataset.range(start, np.iinfo(np.int64).max)
        data = data.map(sample, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).ignore_errors()
        data = data.batch(batch_size, drop_remainder=True).map(tokenize).prefetch(2)
        self._iterator = data.as_numpy_iterator()

    def _require_one_good(self, source, start):
        # Where every sample is bad, ignore_errors would look for a good one for ever.
        reasons = []
        for position in range(start, start + min(source.size, 100)):
            reason = reason_of_failure(self._sample, position)
            if reason is None:
                return
            reasons.append(f"{source.where(int(self._row_of(position)))}: {reason}")
        raise InputError(f"none of the first {len(reasons)} samples could be used; for example {reasons[0]}")

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        batch = next(self._iterator)
        came = batch.pop("position")
        end = int(came[-1]) + 1
        dropped = sorted(set(range(self.position, end)) - set(came.tolist()))
        self.bad.check(len(came), dropped, self._row_of, self._sample)
        self.position = end
        return batch


def eval_batches(
    source: Source, *, batch_size: int, image_side: int, process: tuple[int, int] = (0, 1)
) -> Iterator[dict]:
    """Every sample once, in order.

    Yields {"image": uint8 (b, S, S, 3), "label": int32 (b,), -1 without labels, "caption": list of b str,
    "row": int64 (b,), -1 for padding, "mask": bool (b,)}.

    `batch_size` b is this process's share. Every process gets the same number of batches; what is missing at
    the end, and what could not be read (named on the console), is padding: mask False.
    """
    index, count = process
    bad = BadSamples(source)

    def row_of(position):
        return position * count + index

    def sample(position, raw=None):
        raw = source.read(row_of(position)) if raw is None else raw
        image = transforms.resize_centre_crop(transforms.decode(raw["image"]), image_side)
        return {"image": image, "label": raw.get("label", -1), "caption": raw["caption"], "position": position}

    mine = len(range(index, source.size, count))
    data = tf.data.Dataset.range(mine)
    if source.scan is not None:
        data = tf.data.Dataset.zip(data, source.scan().shard(count, index))
    data = data.map(sample, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    batches = data.ignore_errors().batch(batch_size).prefetch(2).as_numpy_iterator()
    came = []
    for _ in range(-(-source.size // (batch_size * count))):
        batch = next(batches, None)
        good = 0 if batch is None else len(batch["position"])
        padded = {
            "image": np.zeros((batch_size, image_side, image_side, 3), np.uint8),
            "label": np.full(batch_size, -1, np.int32),
            "caption": [""] * batch_size,
            "row": np.full(batch_size, -1, np.int64),
            "mask": np.arange(batch_size) < good,
        }
        if good:
            padded["image"][:good], padded["label"][:good] = batch["image"], batch["label"]
            padded["caption"][:good] = [c.decode(errors="replace") for c in batch["caption"]]
            padded["row"][:good] = row_of(batch["position"])
            came.extend(batch["position"].tolist())
        yield padded
    bad.check(len(came), sorted(set(range(mine)) - set(came)), row_of, sample)
