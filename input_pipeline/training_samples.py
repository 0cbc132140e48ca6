"""A sample of the training stream, drawn from its row by (seed, position); and what a batch of them still needs."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline import transforms
from input_pipeline.captions import augment
from input_pipeline.sources import Source
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class TrainingSamples:
    """The fields are arguments of pipeline.TrainBatches."""

    source: Source
    tokenizer: Tokenizer
    image_side: int
    canvas: int | None
    context_length: int
    crop_scale: tuple[float, float]
    seed: int
    two_views: bool
    synonyms: Mapping[str, Sequence[str]] | None
    recover_truncated: bool

    def read(self, place: tf.Tensor, row: tf.Tensor, *given: tf.Tensor) -> dict[str, tf.Tensor]:
        """The views of the image, one of the captions, and its tokens if they are stored. `given`: as Source.read."""
        raw = self.source.read(row, *given)
        key = tf.stack([tf.constant(self.seed, tf.int64), place])
        numbers = transforms.window_numbers(key, 2 if self.two_views else 1)
        views = transforms.training_view(
            raw["image"],
            numbers,
            self.crop_scale,
            side=self.image_side,
            canvas=self.canvas,
            recover=self.recover_truncated,
        )
        text = {"caption": one_of(raw["caption"], key)}
        if "tokens" in raw and not self.two_views:
            text["tokens"] = raw["tokens"]
        later = {"numbers": numbers} if self.canvas else {}
        return views | text | {"position": place} | later

    def complete(self, batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Windows on the canvas, and tokens; of stored ones, the first caption stays, for `check_tokens`."""
        if self.canvas:
            given = batch["windows"]
            drawn = transforms.windows(batch.pop("numbers"), batch["size"], self.crop_scale)
            batch = batch | {"windows": tf.where(given[..., 2:3] > 0, given, drawn)}
        if "tokens" in batch:
            return batch | {"caption": batch["caption"][:1]}
        ids = tf.numpy_function(self._tokens, [batch.pop("caption"), batch["position"]], tf.int32)
        views = (2,) if self.two_views else ()
        return batch | {"tokens": tf.ensure_shape(ids, (batch["position"].shape[0], *views, self.context_length))}

    def _tokens(self, captions, places):
        texts = [c.decode(errors="replace") for c in captions]
        if not self.two_views:
            return self.tokenizer(texts, self.context_length)
        edited = [
            augment(text, np.random.default_rng((self.seed, place)), self.synonyms)
            for text, place in zip(texts, places.clip(0), strict=True)  # -1: no sample
        ]
        both = self.tokenizer([text for pair in zip(texts, edited, strict=True) for text in pair], self.context_length)
        return both.reshape(len(texts), 2, self.context_length)

    def check_tokens(self, stored: np.ndarray, caption: bytes) -> None:
        """Raises InputError where the stored tokens of a caption are not those of this run's tokenizer."""
        text, length = caption.decode(errors="replace"), self.context_length
        if not np.array_equal(stored, self.tokenizer([text], length)[0]):
            raise InputError(
                f"the {len(stored)} tokens per caption in the data come from another tokenizer than this run's, or "
                f"from another context length than {length}: {text[:40]!r} is {stored[:8].tolist()} ...; set "
                "config.tokenizer.path and config.model.context_length to those of the data, or prepare it again"
            )


def one_of(captions: tf.Tensor, key_2: tf.Tensor | None = None) -> tf.Tensor:
    """One of several captions, drawn with the key; without a key the first. A single caption is returned unchanged."""
    captions = tf.convert_to_tensor(captions)
    if not captions.shape.rank:
        return captions
    if key_2 is None:
        return captions[0]
    # A different key than the window's, so that the two are independent.
    drawn = tf.random.stateless_uniform((), tf.add(key_2, [1 << 32, 0]), maxval=tf.size(captions), dtype=tf.int32)
    return captions[drawn]
