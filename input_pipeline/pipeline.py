"""Batches from a source: shuffled and resumable for training, complete and padded for evaluation.

The training stream is endless. Position p belongs to epoch p // size. Every epoch contains every row once, in an order
computed from (seed, epoch) without a list (order.py). So a batch is a function of its first position, and resuming at
any position costs nothing. Every process reads a contiguous share of the rows of each batch, so a batch is the same
with any number of processes. Shards that are slow to read row by row have another order, of blocks (blocks.py).

Batches of b images have one of two forms (made by transforms.py, used by rankclip_jax/models/images.py):

  canvas=C     "image" uint8 (b, C, C, 3), each image at the top left, zeros elsewhere; "size" int32 (b, 2), its height
               and width on the canvas; "windows" float32 (b, V, 4), the parts to use: (top, left, height, width) in
               pixels of the image. The device cuts out and resizes. V is 2 for training with two views, otherwise 1.
  canvas=None  "image" uint8 (b, S, S, 3), resized here; (b, 2, S, S, 3) with two views.
"""

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline import cpu_only, transforms
from input_pipeline.bad_samples import SHOWN, BadSamples, reason_of_failure
from input_pipeline.blocks import BlockOrder
from input_pipeline.graph import as_written, iterated, mapped
from input_pipeline.lanes import LaneStream
from input_pipeline.order import RowStream, place_of
from input_pipeline.sources import Source, started_ahead
from input_pipeline.tensorflow_import import tf
from input_pipeline.training_samples import TrainingSamples, one_of
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer

# Length of the spans in which the training stream is read; the pipeline restarts between two spans.
_SPAN_BATCHES = 1000


class TrainBatches:
    """Iterator over batches: images as above, and "tokens" int32 (b, L), or (b, 2, L) with two views.

    Attributes:
      position: this process's position in its stream after the last returned batch, in the order of blocks those of
        its lanes; pass it as `start` to resume.
      read: samples that this process has read so far.
      bad: the skipped samples (BadSamples).
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        image_side: int,
        context_length: int,
        crop_scale: tuple[float, float],
        seed: int,
        start: int | tuple[int, ...] = 0,
        order: BlockOrder | None = None,
        process: tuple[int, int] = (0, 1),
        bad_path: Path | None = None,
        max_bad_fraction: float = 1.0,
        canvas: int | None = None,
        two_views: bool = False,
        synonyms: Mapping[str, Sequence[str]] | None = None,
        recover_truncated: bool = False,
        batches: int | None = None,
    ):
        """`batch_size` b is this process's share; `process` is (its index, number of processes).

        With `two_views` each image has a second window and each caption an edited version (captions.py, with the table
        `synonyms`). With `recover_truncated` the readable part of a truncated JPEG is used. `batches`: how many are
        wanted at most, so that none is read for nothing. `order`: of a source's blocks; None: of its rows.
        """
        cpu_only()
        self._stream: RowStream | LaneStream
        if order and source.together:  # which every source of blocks has
            place = start if isinstance(start, tuple) else ()
            self._stream = LaneStream(order, source.together, place, batch_size, process)
        else:
            self._stream = RowStream(source, seed, start if isinstance(start, int) else 0, batch_size, process)
        self.bad, self._source = BadSamples(source, bad_path, max_bad_fraction), source
        self._samples = TrainingSamples(
            source=source,
            tokenizer=tokenizer,
            image_side=image_side,
            canvas=canvas,
            context_length=context_length,
            crop_scale=crop_scale,
            seed=seed,
            two_views=two_views,
            synonyms=synonyms,
            recover_truncated=recover_truncated,
        )
        # If every sample is bad, `ignore_errors` searches for a good one forever. So it gets a span of positions; when
        # that yields no more batches, the next span begins where the last batch ended.
        self._stream.begin(min(_SPAN_BATCHES, batches or _SPAN_BATCHES))
        good = self._one_good()
        if "tokens" in good:
            self._samples.check_tokens(good["tokens"].numpy(), good["caption"].numpy())
        data = self._stream.samples(self._samples.read, good)
        padded = _padded_batches(data, batch_size, canvas, drop_remainder=True)
        self._data = padded.map(as_written(self._samples.complete)).prefetch(2)
        self._iterator = iterated(self._data)

    @property
    def position(self) -> int | tuple[int, ...]:
        return self._stream.position

    @property
    def read(self) -> int:
        return self.bad.seen

    def _one_good(self):
        good, reasons = [], []
        for place in itertools.islice(self._stream.places(), min(self._source.size, 100)):
            reason = reason_of_failure(lambda x: good.append(self._sample(x)), place, self._source.ahead)
            if reason is None:
                return good[0]
            reasons.append(f"{self._source.where(int(self._stream.row_of(place)))}: {reason}")
        raise InputError(f"the first {len(reasons)} samples are all unusable; for example {reasons[0]}")

    def _sample(self, place):
        return self._samples.read(place, tf.constant(self._stream.row_of(place), tf.int64))

    def __iter__(self) -> Iterator[dict]:
        return self

    def __next__(self) -> dict:
        batch = self._read()
        if batch is None:
            self._stream.begin(_SPAN_BATCHES)
            self._iterator = iterated(self._data)
            batch = self._read()
        if batch is None:
            places = itertools.islice(self._stream.places(), 100)
            reasons = (reason_of_failure(self._sample, place, self._source.ahead) for place in places)
            raise InputError(
                f"not one batch of good samples in {_SPAN_BATCHES} batches; the next one fails with: "
                f"{next(filter(None, reasons), None)}"
            )
        if "caption" in batch:  # once a batch, since parts of the data may come from different tokenizers
            self._samples.check_tokens(batch["tokens"][0], batch.pop("caption")[0])
        came = batch.pop("position")
        self.bad.check(len(came), self._stream.passed(came), self._stream.row_of, self._sample)
        return batch

    def _read(self):
        """The next batch of the span; None: there is none, or a lane has no more."""
        batch = next(self._iterator, None)
        return None if batch is None or batch["position"].min() < 0 else batch


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    image_side: int,
    process: tuple[int, int] = (0, 1),
    canvas: int | None = None,
    squash: str = "no",
) -> Iterator[dict]:
    """Yields every sample once, in order, with CLIP's evaluation view, or SigLIP's (`squash`: config.data.squash).

    A batch has images as above, and {"label": int32 (b,), -1 without labels, "caption": list of b str,
    "row": int64 (b,), -1 for padding, "mask": bool (b,)}.

    `batch_size` b is this process's share. Every process gets the same number of batches. Missing samples at the end
    and unreadable ones (reported on the console) are padding with mask False.
    """
    cpu_only()
    index, count = process
    bad = BadSamples(source)

    def row_of(position):
        return place_of(position, batch_size, process)

    def sample(position):
        raw = source.read(row_of(position))
        centre = functools.partial(transforms.centre_window, side=image_side)
        windows_of = centre if squash == "no" else transforms.whole_window
        views = transforms.view(raw["image"], windows_of, side=image_side, canvas=canvas, exact=True, squash=squash)
        label, caption = (tf.ensure_shape(x, ()) for x in (raw.get("label", -1), one_of(raw["caption"])))
        return views | {"label": label, "caption": caption, "position": position}

    whole, rest = divmod(source.size, batch_size * count)
    mine = whole * batch_size + min(max(rest - index * batch_size, 0), batch_size)
    data = started_ahead(tf.data.Dataset.range(mine), source.ahead, row_of)
    batches = iterated(_padded_batches(mapped(data, sample).ignore_errors(), batch_size, canvas).prefetch(2))
    side = canvas or image_side
    blank: dict[str, Any] = {"image": np.zeros((side, side, 3), np.uint8)}
    blank |= {"label": np.int32(-1), "position": np.int64(-1)}
    if canvas:
        size, windows = np.array([side, side], np.int32), np.array([[0, 0, side, side]], np.float32)
        blank |= {"size": size, "windows": windows}
    came = []
    for _ in range(-(-source.size // (batch_size * count))):
        batch = next(batches, {"position": [], "caption": []})
        good = len(batch["position"])
        if source.ahead and good < batch_size:
            source.ahead.check()
        came.extend(batch["position"])
        captions = [c.decode(errors="replace") for c in batch.pop("caption")] + [""] * (batch_size - good)
        if good < batch_size:
            batch = {k: np.stack([*batch.get(k, ()), *[filler] * (batch_size - good)]) for k, filler in blank.items()}
        mask = np.arange(batch_size) < good
        position = batch.pop("position")
        yield batch | {"caption": captions, "row": np.where(mask, row_of(position), -1), "mask": mask}
    bad.check(len(came), sorted(set(range(mine)) - set(came)), row_of, sample)
    if any(count > SHOWN for count in bad.found.values()):
        print(bad.summary(), file=sys.stderr)


def resume_at(positions: list[int], batch_size: int, process: tuple[int, int]) -> tuple[int, int]:
    """(position at which a process resumes its stream, number of samples skipped by that).

    With as many processes as before, each resumes exactly where it was. With another number, all start with the first
    batch of which no process has read anything. That is the next batch, unless bad samples were skipped, for which the
    processes had to read ahead.

    Args:
      positions: the earlier position of each process.
      batch_size: of all processes together.
      process: (its index, number of processes now).
    """
    index, count = process
    if len(positions) == count:
        return positions[index], 0
    share = batch_size // len(positions)
    batches = max(-(-position // share) for position in positions)
    return batches * (batch_size // count), batches * batch_size - sum(positions)


def _padded_batches(data, batch_size, canvas, drop_remainder=False):
    shapes = {key: spec.shape for key, spec in data.element_spec.items()}
    if canvas:
        shapes["image"] = (canvas, canvas, 3)
    # The batch adds the zeros around an image: one copy less than padding each image.
    return data.padded_batch(batch_size, shapes, drop_remainder=drop_remainder)
