"""Several sources as one, mixed by weights.

An epoch of a mixture has as many samples as all its sources have rows together, and each source gives its weight's
share of them, to the sample. A source that gives more than it has begins again, newly shuffled; one that gives less
goes on in the next epoch where it stopped: none of its rows comes twice before each has come once. Which sample stands
where is computed from its position alone (input_pipeline/order.py), as for a single source. Without weights the
sources are simply put together, and every row comes once an epoch.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline.sources.source import Source
from rankclip_jax.common.errors import InputError


def open_mixture(spec: ConfigDict, parts: Mapping[str, Mapping], open_one: Callable) -> Source:
    """Opens name -> {path, weight, and what differs from `spec`} with open_one(spec, path) for each.

    Raises:
      InputError: a weight that is not positive, weights for some only, shapes among the parts, or what opening raises.
    """
    weights = [part.get("weight") for part in parts.values()]
    for name, weight in zip(parts, weights, strict=True):
        if weight is not None and not (isinstance(weight, int | float) and 0 < weight < float("inf")):
            raise InputError(f"config.data.train.{name}.weight must be a positive number; got {weight!r}")
        if (weight is None) != (weights[0] is None):
            raise InputError(f"config.data.train: {name} and {next(iter(parts))}: give all parts a weight, or none")
    given = [weight for weight in weights if weight is not None]  # all, or none
    sources = []
    for name, part in parts.items():
        own = {key: value for key, value in part.items() if value is not None}
        if own.get("format", spec.format) == "shapes":
            raise InputError(f"config.data.train.{name}: drawn scenes cannot be mixed with files; prepare them first")
        sources.append(open_one(ConfigDict({**dict(spec.items()), "train": None, "val": None} | own), own.get("path")))
    sizes = np.array([source.size for source in sources])
    starts = np.cumsum(sizes) - sizes
    names = list(parts)

    def part_of(row):
        return int(np.searchsorted(starts, row, side="right")) - 1

    def where(row):
        part = part_of(row)
        return f"{names[part]}: {sources[part].where(row - starts[part])}"

    return Source(
        size=int(sizes.sum()),
        read=_read(sources, starts),
        where=where,
        captions=lambda: (caption for source in sources for caption in source.captions()),
        lost=tuple(one for source in sources for one in source.lost),
        shares=tuple(zip(sizes.tolist(), _shares(given, sizes.sum()), strict=True)) if given else None,
    )


def _read(sources, starts):
    specs = [tf.data.Dataset.range(1).map(source.read).element_spec for source in sources]
    common = set.intersection(*map(set, specs))  # tokens count only where all have them
    several = any(spec["caption"].shape.rank for spec in specs)
    starts = tf.constant(starts, tf.int64)

    def branch(number, row):
        sample = {key: value for key, value in sources[number].read(row - starts[number]).items() if key in common}
        if several:
            sample["caption"] = tf.reshape(sample["caption"], [-1])
        return sample

    def read(row):
        part = tf.searchsorted(starts, [row], side="right")[0] - 1
        return tf.switch_case(part, [lambda i=i: branch(i, row) for i in range(len(sources))])

    return read


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided as the weights say, the largest remainders rounded up."""
    exact = np.array(weights) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares.tolist()
