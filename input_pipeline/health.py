"""Checks for the doctor: whether TensorFlow leaves the accelerators alone, and how fast it decodes."""

import time

import numpy as np
import tensorflow as tf

from input_pipeline import (
    decode,
    pipeline,  # noqa: F401 -- it keeps TensorFlow off the GPUs
)


def gpus_of_tensorflow() -> int:
    """Number of GPUs visible to TensorFlow, whose memory it would take."""
    return len(tf.config.get_visible_devices("GPU"))


def jpegs_per_second(count: int) -> float:
    """Images per second when decoding a noisy 400 x 300 JPEG of quality 90 `count` times on all cores."""
    rows, columns = np.mgrid[0:300, 0:400]
    noise = np.random.default_rng(0).integers(0, 64, (300, 400, 3))
    image = tf.io.encode_jpeg(((rows + columns)[..., None] // 4 + noise).astype(np.uint8), quality=90)
    data = tf.data.Dataset.from_tensors(image).repeat(count)
    data = data.map(lambda x: tf.shape(decode.decode(x)), num_parallel_calls=tf.data.AUTOTUNE)
    start = time.perf_counter()
    done = sum(1 for _ in data)
    return done / (time.perf_counter() - start)
