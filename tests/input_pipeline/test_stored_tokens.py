"""Tokens that are stored with the data, and several captions of a picture."""

from collections import Counter

import numpy as np
import pytest
import tensorflow as tf

from input_pipeline import order, pipeline, sources
from rankclip_jax import config
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from tests.input_pipeline.test_sources import opened
from tests.support.source_files import (
    example,
    open_as,
    samples,
    write_tfrecord,
)


def batches_of(source, tokenizer, context_length=16, **options):
    given = dict(batch_size=4, image_side=8, crop_scale=(1.0, 1.0), seed=0) | options
    return pipeline.TrainBatches(source, tokenizer, context_length=context_length, **given)


def test_stored_tokens_are_used_and_checked(tmp_path):
    made = samples(12)
    tokenizer = Tokenizer.train([caption for _, caption in made], 400)

    def write(tokens_of):
        with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as out:
            for i, (image, caption) in enumerate(made):
                out.write(example(jpg=image, txt=caption, tokens=tokens_of(i, caption)))
        return opened("tfrecord", str(tmp_path))

    stored = write(lambda i, caption: tokenizer([caption], 16)[0].tolist())
    asked = []
    counting = lambda texts, length: asked.append(texts) or tokenizer(texts, length)  # noqa: E731
    got = [next(batches_of(stored, counting))["tokens"] for _ in range(1)]
    (tmp_path / "plain").mkdir()
    plain = opened("tfrecord", write_tfrecord(tmp_path / "plain", made))
    assert np.array_equal(got[0], next(batches_of(plain, tokenizer))["tokens"])
    assert [len(texts) for texts in asked] == [1, 1]  # as a check: one caption at the start, and one of the batch
    with pytest.raises(
        InputError, match="the 16 tokens per caption in the data come from another tokenizer .* context length than 12"
    ):
        batches_of(stored, tokenizer, context_length=12)
    other = write(lambda i, caption: [(i + k) % 300 for k in range(16)])
    with pytest.raises(InputError, match="come from another tokenizer"):
        batches_of(other, tokenizer)


def test_tokens_of_several_tokenizers_in_a_mixture_are_refused(tmp_path):
    made = samples(8)
    tokenizer = Tokenizer.train([caption for _, caption in made], 400)
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as out:
        for i, (image, caption) in enumerate(made):
            tokens = tokenizer([caption], 16)[0] + (i >= 4)
            out.write(example(jpg=image, txt=caption, tokens=tokens.tolist()))
    source = opened("tfrecord", str(tmp_path / "0.tfrecord"))
    seed = next(seed for seed in range(9) if int(order.row_at(source, 0, seed)) < 4)
    batches = batches_of(source, tokenizer, seed=seed, batch_size=1)  # the first sample has this run's tokens
    with pytest.raises(InputError, match="come from another tokenizer"):
        for _ in range(8):
            next(batches)


def test_a_record_without_the_tokens_of_the_first_ones_is_a_bad_sample(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as out:
        for i, (image, caption) in enumerate(samples(12)):
            out.write(example(jpg=image, txt=caption, **({"tokens": [1, 2]} if i < 11 else {})))
    source = opened("tfrecord", str(tmp_path / "0.tfrecord"))
    assert source.read(10)["tokens"].numpy().tolist() == [1, 2]
    with pytest.raises(tf.errors.InvalidArgumentError, match="it has not 2 tokens, as the first records have"):
        source.read(11)


def test_tokens_of_several_lengths_in_a_mixture_are_not_used(tmp_path):
    made = samples(8)
    tokenizer = Tokenizer.train([caption for _, caption in made], 400)
    parts = {}
    for name, length in (("long", 16), ("short", 4)):
        with tf.io.TFRecordWriter(str(tmp_path / f"{name}.tfrecord")) as out:
            for image, caption in made:
                out.write(example(jpg=image, txt=caption, tokens=tokenizer([caption], length)[0].tolist()))
        parts[name] = dict(path=str(tmp_path / f"{name}.tfrecord"))
    data = config.complete(dict(data=dict(format="tfrecord", train=parts))).data
    mixture = sources.open_source(data, data.train, image_side=8)
    possible = {tuple(tokenizer([caption], 16)[0].tolist()) for _, caption in made}
    batch = next(batches_of(mixture, tokenizer, batch_size=16))
    assert {tuple(tokens) for tokens in batch["tokens"].tolist()} == possible


def test_each_of_several_captions_comes_in_time_and_the_same_when_resumed(tmp_path):
    made = samples(6)
    source = open_as("tfds", tmp_path, made)
    decoded = lambda texts, length: np.array([[int(t.rpartition(" ")[2]) + 1 if "again" in t else 0] for t in texts])  # noqa: E731
    tokens = lambda texts, length: decoded(texts, length).astype(np.int32)  # noqa: E731
    batches = batches_of(source, tokens, context_length=1, batch_size=6)
    seen = [next(batches)["tokens"][:, 0] for _ in range(60)]
    drawn = Counter(np.concatenate(seen).tolist())
    # Of 6 images two have one caption, two have two, two have three: 120 + 60 + 40 of the first in 360, and so on.
    assert drawn.total() == 360
    for number, expected in enumerate((220, 100, 40)):
        assert abs(drawn[number] - expected) < 5 * expected**0.5
    resumed = batches_of(source, tokens, context_length=1, batch_size=6, start=6 * 31)
    assert np.array_equal(next(resumed)["tokens"][:, 0], seen[31])
    captions = [c for b in pipeline.eval_batches(source, batch_size=6, image_side=8) for c in b["caption"]]
    assert captions == [caption for _, caption in made]  # an evaluation takes the first
