"""Mixes several sources by weights.

An epoch of a mixture has as many samples as its sources have rows in total. Each source contributes exactly its
weight's share of them. A source with fewer rows starts again, reshuffled; a source with more rows continues in the next
epoch. No row is repeated before each row of its source has been used once. The order is computed from the position
(input_pipeline/order.py), as for a single source. Without weights the sources are concatenated, and every row is used
once per epoch.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from input_pipeline.graph import as_written
from input_pipeline.sources.fingerprint import fingerprint
from input_pipeline.sources.source import Ahead, Blocks, Reading, Source, all_ahead
from input_pipeline.sources.together import Given, Together
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError


def open_mixture(spec: ConfigDict, parts: Mapping[str, Mapping], open_one: Callable) -> Source:
    """Opens each of name -> {path, weight, changes to `spec`} with open_one(spec, path).

    Raises:
      InputError: shapes as a part, or as `open_one`.
    """
    given = [part["weight"] for part in parts.values() if part.get("weight") is not None]  # all, or none
    sources = []
    for name, part in parts.items():
        own = {key: value for key, value in part.items() if value is not None}
        if own.get("format", spec.format) == "shapes":
            raise InputError(f"config.data.train.{name}: drawn scenes cannot be mixed with files; prepare them first")
        sources.append(open_one(ConfigDict({**dict(spec.items()), "train": None, "val": None} | own), own.get("path")))
    sizes = np.array([source.size for source in sources])
    starts = np.cumsum(sizes) - sizes
    texts = [source.text or Reading(source.read, source.ahead) for source in sources]
    together, names = [source.together for source in sources], list(parts)

    def part_of(row):
        return int(np.searchsorted(starts, row, side="right")) - 1

    def where(row):
        part = part_of(row)
        return f"{names[part]}: {sources[part].where(row - starts[part])}"

    return Source(
        size=int(sizes.sum()),
        read=_read([source.read for source in sources], starts, together),
        where=where,
        captions=lambda: (caption for source in sources for caption in source.captions()),
        lost=tuple(one for source in sources for one in source.lost),
        index=lambda: [fingerprint(source, before=True) for source in sources],
        digest=lambda: [fingerprint(source) for source in sources],
        shares=tuple(zip(sizes.tolist(), _shares(given, sizes.sum()), strict=True)) if given else None,
        ahead=_ahead([source.ahead for source in sources], starts, sizes),
        blocks=None if given else _blocks([source.blocks for source in sources], starts),
        together=_together(together, starts),
        text=Reading(
            _read([read for read, _ in texts], starts, [None] * len(texts)),
            _ahead([ahead for _, ahead in texts], starts, sizes),
        ),
    )


def _ahead(aheads, starts, sizes):
    def of_part(ahead, start, size):
        return Ahead(lambda rows: ahead.start(rows[(rows >= start) & (rows < start + size)] - start), ahead.check)

    parts = zip(aheads, starts, sizes, strict=True)
    return all_ahead([ahead and of_part(ahead, start, size) for ahead, start, size in parts])


def _blocks(parts, starts):
    if not all(parts):
        return None
    counts = np.cumsum([0] + [len(part.first) for part in parts])

    def of_part(method):
        def call(block, user):
            part = int(np.searchsorted(counts, block, side="right")) - 1
            getattr(parts[part], method)(block - counts[part], user)

        return call

    first_N = np.concatenate([part.first + start for part, start in zip(parts, starts, strict=True)])
    rows_N = np.concatenate([part.rows for part in parts])
    return Blocks(first_N, rows_N, sum(part.size for part in parts), of_part("hold"), of_part("drop"))


def _together(parts, starts):
    if not any(parts):
        return None
    strings = max(part.strings for part in parts if part)

    def together(rows):
        found, part_N = np.full((len(rows), strings), b"", object), np.searchsorted(starts, rows, side="right") - 1
        for number, part in enumerate(parts):
            own = part_N == number
            if part and own.any():
                found[own, : part.strings] = part.read(rows[own] - starts[number])
        return found

    return Together(strings, together)


def _read(reads, starts, together):
    specs = [tf.data.Dataset.range(1).map(as_written(read)).element_spec for read in reads]
    common = set.intersection(*map(set, specs))
    if len({spec.get("tokens") for spec in specs}) > 1:  # not in all parts, or of several lengths
        common.discard("tokens")
    several = any(spec["caption"].shape.rank for spec in specs)
    starts = tf.constant(starts, tf.int64)

    def branch(number, row, given):
        own = [Given(one.there, one.strings[: together[number].strings]) for one in given if together[number]]
        of_part = reads[number](row - starts[number], *own)
        sample = {key: value for key, value in of_part.items() if key in common}
        if several:
            sample["caption"] = tf.reshape(sample["caption"], [-1])
        return sample

    def read(row, *given):
        part = tf.searchsorted(starts, [row], side="right")[0] - 1
        return tf.switch_case(part, [lambda i=i: branch(i, row, given) for i in range(len(reads))])

    return read


def _shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided by weight, with the largest remainders rounded up."""
    exact = np.array(weights) / sum(weights) * total
    shares = np.floor(exact).astype(int)
    shares[np.argsort(shares - exact, kind="stable")[: total - shares.sum()]] += 1
    return shares.tolist()
