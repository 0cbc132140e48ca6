"""Statistics of a data set: counts, formats, sizes, caption lengths, repetitions, bad rows."""

import dataclasses
import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from input_pipeline import caption_lengths
from input_pipeline.rows import Row, by_threads, read_rows
from input_pipeline.sources import Source
from rankclip_jax.common.pictures import BadImageError, loaded, opened
from rankclip_jax.common.progress import progress
from rankclip_jax.common.tokenizer import Tokenizer

_REASONS = 10  # reasons for bad rows that are shown


@dataclasses.dataclass(frozen=True)
class Overview:
    """Statistics of the inspected rows, of which n are good.

    Attributes:
      rows: number of rows of the source.
      looked_at: number of inspected rows.
      lost: number of samples that have no row.
      bad: reason -> count, of rows and lost samples.
      bad_rows: (number, reason, detail) of each bad row.
      kinds: format and mode by Pillow's names ("JPEG RGB") -> count.
      measures: name -> float64: width, height, shorter side (pixels), aspect ratio (width / height) and kB of each
        image; characters, words, and with a tokenizer tokens (start and end included) of each caption.
      repeated: "images" (equal bytes), "captions", "pairs" -> number that repeat an earlier one.
      frequent: the most frequent captions, at most 3: (hash, number of the first row, count).
      good_rows: int64 (n,), numbers of the good rows in order.
    """

    rows: int
    looked_at: int
    lost: int
    bad: Counter
    bad_rows: list[tuple[int, str, str]]
    kinds: Counter
    measures: dict[str, np.ndarray]
    repeated: dict[str, int]
    frequent: list[tuple[int, int, int]]
    good_rows: np.ndarray


def sampled(rows: int, most: int | None) -> range:
    """The numbers of all rows, or of at most `most`, evenly spaced."""
    return range(0, rows, -(-rows // most) if most else 1)


def survey(source: Source, *, tokenizer: Tokenizer | None, sample: int | None, workers: int) -> Overview:
    """Decodes every row, or at most `sample` evenly spaced rows, by `workers` threads."""
    numbers = sampled(source.size, sample)
    bad, kinds, bad_rows = Counter({one.reason: 0 for one in source.lost}), Counter(), []
    for one in source.lost:
        bad[one.reason] += one.samples
    measures, hashes, good_rows = defaultdict(lambda: array("d")), defaultdict(lambda: array("Q")), array("q")
    caption_rows, looked_at = array("q"), 0
    with ThreadPoolExecutor(workers) as pool, progress("inspect", len(numbers), unit="rows") as bar:
        for chunk in by_threads(pool, _look, read_rows(source, numbers), workers):
            good = [look for look in chunk if isinstance(look, _Look)]
            for look in chunk:
                if not isinstance(look, _Look):
                    bad[look[1]] += 1
                    bad_rows.append(look)
            for look in good:
                good_rows.append(look.row)
                kinds[look.kind] += 1
                for name, values in look.measures.items():
                    measures[name].extend(values)
                for name, values in look.hashes.items():
                    hashes[name].extend(values)
                caption_rows.extend([look.row] * len(look.captions))
            if tokenizer:
                measures["tokens"].extend(tokenizer.lengths([text for look in good for text in look.captions]))
            looked_at += len(chunk)
            bar.set_postfix_str(f"{bad.total():,} bad" if bad else "", refresh=False)
            bar.update(len(chunk))
    return Overview(
        source.size,
        looked_at,
        sum(one.samples for one in source.lost),
        bad,
        bad_rows,
        kinds,
        {name: np.array(values) for name, values in measures.items()},
        {name: len(values) - len(np.unique(values)) for name, values in hashes.items()},
        _frequent(hashes["captions"], caption_rows),
        np.array(good_rows, np.int64),
    )


@dataclasses.dataclass(frozen=True)
class _Look:
    row: int
    kind: str
    captions: tuple[str, ...]
    measures: dict[str, Sequence[float]]
    hashes: dict[str, list[int]]


def _look(row: Row) -> _Look | tuple[int, str, str]:
    """The measurements of a row, or (its number, reason, detail) if it is unusable."""
    try:
        if row.reason is not None:
            return row.number, row.reason, row.detail
        image = opened(row.image)
        width, height, kind = image.width, image.height, f"{image.format or 'pixels'} {image.mode}"
        image.draft(None, (1, 1))  # of a JPEG, the whole file is still read
        loaded(image)
    except BadImageError as error:
        return row.number, error.reason, error.detail
    data = row.image if isinstance(row.image, bytes) else row.image.tobytes()
    measures: dict[str, Sequence[float]] = {
        "width": [width],
        "height": [height],
        "shorter side": [min(width, height)],
        "aspect ratio": [width / height],
        "kB an image": [len(data) / 1000],
        "characters": [len(caption) for caption in row.captions],
        "words": [len(caption.split()) for caption in row.captions],
    }
    image, captions = _hash(data), [_hash(caption.encode()) for caption in row.captions]
    pairs = [hash((image, caption)) % 2**64 for caption in captions]
    return _Look(row.number, kind, row.captions, measures, {"images": [image], "captions": captions, "pairs": pairs})


def _hash(data):
    # 64 bits: among ten million different values, the chance of a collision is 3 in a million.
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def _frequent(hashes, rows):
    _, first, counts = np.unique(np.array(hashes, np.uint64), return_index=True, return_counts=True)
    order = [i for i in np.lexsort((first, -counts))[:3] if counts[i] > 1]
    return [(int(hashes[first[i]]), int(rows[first[i]]), int(counts[i])) for i in order]


def text(overview: Overview, captions_of: Callable[[int], tuple[str, ...]], context_length: int = 77) -> str:
    """The tables for a terminal; captions_of(row) returns the captions of a row. context_length: of packed rows."""
    looked_at, good = overview.looked_at, len(overview.good_rows)
    part = "" if looked_at == overview.rows else f", {looked_at:,} of them inspected, evenly spaced"
    looked_at, of = looked_at + overview.lost, overview.rows + overview.lost
    lines = [f"{of:,} rows{part}: {good:,} good, {looked_at - good:,} bad"]
    lines += [share(count, looked_at, reason) for reason, count in overview.bad.most_common(_REASONS)]
    if len(overview.bad) > _REASONS:
        lines.append(f"{'':>18}  and {len(overview.bad) - _REASONS:,} other reasons")
    if not good:
        return "\n".join(lines)
    lines += ["", "images", *(share(count, good, kind) for kind, count in overview.kinds.most_common())]
    percentiles = (0, 5, 25, 50, 75, 95, 100)
    heads = ("least", *(f"{p} %" for p in percentiles[1:-1]), "most", "mean")
    lines += ["", " " * 14 + "".join(f"{head:>10}" for head in heads)]
    for name, values in overview.measures.items():
        numbers = (*np.percentile(values, percentiles), values.mean())
        lines.append(f"{name:<14}" + "".join(f"{_short(number):>10}" for number in numbers))
    captions = len(overview.measures["characters"])
    several = "" if captions == good else f", {captions / good:.3g} per image"
    lines += ["", f"{captions:,} captions{several}"]
    tokens = overview.measures.get("tokens")
    if tokens is not None:
        lines.append(share(int((tokens > 77).sum()), captions, "of more than 77 tokens, which CLIP cuts"))
    of = {"images": good, "captions": captions, "pairs": captions}
    lines += [share(count, of[what], f"{what} that came before") for what, count in overview.repeated.items()]
    for hashed, row, count in overview.frequent:
        caption = next(" ".join(caption.split()) for caption in captions_of(row) if _hash(caption.encode()) == hashed)
        lines.append(share(count, captions, f'"{caption[:60]}{"..." if len(caption) > 60 else ""}"'))
    unit = "words" if tokens is None else "tokens"
    counts = Counter(overview.measures[unit].astype(int).tolist())
    lines += ["", *caption_lengths.histogram(counts, unit)]
    if tokens is not None:
        lines.append(caption_lengths.packed(counts, context_length))
    return "\n".join(lines)


def share(number: int, of: int, what: str) -> str:
    """A line: how many, which share, of what."""
    return f"{number:>10,}  {number / of:>6.1%}  {what}"


def _short(number):
    return f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"
