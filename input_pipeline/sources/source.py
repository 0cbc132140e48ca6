"""What a source is: a set of samples that gives any row by number, so the pipeline shuffles and resumes for free."""

import dataclasses
from collections.abc import Callable, Iterable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of images and captions by number.

    Attributes:
      size: number of rows.
      read: TensorFlow ops: int64 scalar -> {"image": encoded bytes or uint8 (H, W, 3), "caption": string}; labelled
        sets add "label": int32.
      where: names a row for a person: file, row, image.
      captions: iterable of the captions, for training a tokenizer.
      labels: int32 (size,) of a labelled csv.
      scan: the samples in order as a tf.data.Dataset, for a set that is only evaluated and is slow to read by number.
    """

    size: int
    read: Callable
    where: Callable[[int], str]
    captions: Callable[[], Iterable[str]]
    labels: np.ndarray | None = None
    scan: Callable | None = None
