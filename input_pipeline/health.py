"""Checks for the doctor: whether TensorFlow leaves the accelerators alone, and how fast it decodes."""

import time

import numpy as np

from input_pipeline import cpu_only, decode
from input_pipeline.graph import iterated, mapped
from input_pipeline.tensorflow_import import tf


def gpus_of_tensorflow() -> int:
    """Number of GPUs visible to TensorFlow after `cpu_only`, whose memory it would take. Raises as that does."""
    cpu_only()
    return len(tf.config.get_visible_devices("GPU"))


def jpegs_per_second(count: int) -> float:
    """Images per second when decoding a noisy 400 x 300 JPEG of quality 90 `count` times on all cores.

    Raises as `cpu_only`.
    """
    cpu_only()
    rows, columns = np.mgrid[0:300, 0:400]
    noise = np.random.default_rng(0).integers(0, 64, (300, 400, 3))
    image = tf.io.encode_jpeg(((rows + columns)[..., None] // 4 + noise).astype(np.uint8), quality=90)
    data = tf.data.Dataset.from_tensors(image).repeat(count)
    data = mapped(data, lambda x: tf.shape(decode.decode(x)))
    start = time.perf_counter()
    done = sum(1 for _ in iterated(data))
    return done / (time.perf_counter() - start)
