"""Mixtures of sources, and the order of training."""

import numpy as np
import pytest
import tensorflow as tf

from input_pipeline import order, pipeline, sources
from rankclip_jax import config
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import NO_IMAGE
from rankclip_jax.common.tokenizer import Tokenizer
from tests.input_pipeline.test_sources import spec
from tests.support.source_files import WRITERS, read_all, samples


def numbered(size, first=0):
    """A source whose row r has the caption r + first."""
    image = tf.io.encode_png(tf.zeros((8, 8, 3), tf.uint8))
    read = lambda row: {"image": image, "caption": tf.strings.as_string(row + first)}  # noqa: E731
    return sources.Source(size, read, lambda row: f"row {row}", lambda: [str(first + row) for row in range(size)])


def mixed(parts, weights):
    """A mixture of `numbered` sources, as config.data.train gives it."""
    from input_pipeline.sources import mixture

    firsts = np.cumsum([0, *parts])
    given = {f"p{i}": dict(path=i, weight=weight, format="csv") for i, weight in enumerate(weights)}
    return mixture.open_mixture(spec("csv"), given, lambda spec, path: numbered(parts[path], int(firsts[path])))


def stream(source, count, start=0, seed=3):
    rows = tf.data.Dataset.range(start, start + count).map(lambda place: order.row_at(source, place, seed))
    return np.concatenate(list(rows.batch(1000).as_numpy_iterator()))  # quicker than one by one


@pytest.mark.parametrize("seed", [0, 3, 2**40 + 1])
def test_many_rows_are_found_at_once_in_tensorflows_own_order(seed):
    places = np.arange(30, 170)
    source = numbered(60)
    own = [int(tf.random.experimental.index_shuffle(p % 60, (seed % 2**32, p // 60), 59)) for p in places.tolist()]
    np.testing.assert_array_equal(order.row_at(source, places, seed), own)
    mixture = mixed((5, 40, 15), (0.1, 7, 2.5))
    np.testing.assert_array_equal(order.row_at(mixture, places, seed), stream(mixture, 140, 30, seed))


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.1, 7, 2.5), (1, 1e-9, 1)])
def test_a_mixture_gives_each_part_its_share_and_each_row_its_turn(weights):
    parts = (5, 40, 15)
    source = mixed(parts, weights)
    total = source.size
    assert total == 60
    epochs = 20
    rows = stream(source, epochs * total)
    exact = np.array(weights) / sum(weights) * total
    part_of_row = np.repeat([0, 1, 2], parts)
    per_epoch = np.array([np.bincount(part_of_row[e], minlength=3) for e in rows.reshape(epochs, total)])
    assert (per_epoch == per_epoch[0]).all() and (abs(per_epoch[0] - exact) < 1).all()
    for part, (first, size) in enumerate(zip((0, 5, 45), parts, strict=True)):
        times = np.bincount(rows[part_of_row[rows] == part] - first, minlength=size)
        # None twice before each came once.
        assert times.max() - times.min() <= 1 and times.sum() == epochs * per_epoch[0, part]
    assert np.array_equal(stream(source, 100, start=777), rows[777:877])
    assert not np.array_equal(stream(source, total, seed=4), rows[:total])


def test_a_mixture_without_weights_is_all_rows_once_an_epoch():
    source = mixed((5, 40), (None, None))
    rows = stream(source, 90)
    assert sorted(rows[:45]) == sorted(rows[45:]) == list(range(45)) and list(rows[:45]) != list(rows[45:])
    assert list(source.captions()) == [str(i) for i in range(45)] and source.where(7) == "p1: row 2"


@pytest.mark.slow
def test_a_mixture_of_every_layout_from_the_configuration(tmp_path):
    made, parts = {}, {}
    for i, layout in enumerate(("csv", "tfrecord", "webdataset", "tfds")):
        (tmp_path / layout).mkdir()
        made[layout] = samples(4, seed=i)
        parts[layout] = dict(format=layout, path=WRITERS[layout](tmp_path / layout, made[layout]), weight=i + 1)
    complete = config.complete(dict(data=dict(format="csv", train=parts, val=parts)))
    source = sources.open_source(complete.data, complete.data.train, image_side=8)
    got = read_all(source)
    made = {layout: made[layout] for layout in sorted(made)}  # a configuration's keys have the alphabet's order
    assert [image for image, _ in got] == [image for layout in made for image, _ in made[layout]]
    first = [captions if isinstance(captions, str) else captions[0] for _, captions in got]
    assert first == [caption for layout in made for _, caption in made[layout]]
    assert [share for _, share in source.shares] == [2, 6, 3, 5]  # of 16: 1.6, 6.4, 3.2, 4.8
    tokenizer = Tokenizer.train(source.captions(), 400)
    batches = pipeline.TrainBatches(
        source, tokenizer, batch_size=4, image_side=8, context_length=16, crop_scale=(1.0, 1.0), seed=0
    )
    (tmp_path / "csv" / "pictures" / "2.img").write_text("broken from now on")
    assert [next(batches)["tokens"].shape for _ in range(12)] == [(4, 16)] * 12
    assert batches.bad.reasons == {NO_IMAGE: 1}
    assert source.where(2).startswith("csv: ") and source.where(2).endswith(
        "data.csv row 2: " + str(tmp_path / "csv/pictures/2.img")
    )
    assert sum(b["mask"].sum() for b in pipeline.eval_batches(source, batch_size=5, image_side=8)) == 15


def test_wrong_mixtures_are_refused():
    complete = lambda train: config.complete(dict(data=dict(train=train)))  # noqa: E731
    for weights, message in (
        ((1, None), "config.data.train.b.weight=None. Expected a number above 0, as other parts have a weight"),
        ((None, 1), "config.data.train.a.weight=None. Expected a number above 0, as other parts have a weight"),
        ((1, 0), "config.data.train.b.weight=0. Expected a number above 0"),
        ((float("inf"), 1), "config.data.train.a.weight=inf. Expected a number above 0"),
    ):
        with pytest.raises(InputError, match=message):
            complete({name: dict(path="x", weight=weight) for name, weight in zip("ab", weights, strict=True)})
    with pytest.raises(InputError, match=r"config.data.train.a.wieght does not exist; the nearest key is .*weight"):
        complete(dict(a=dict(path="x", wieght=1)))
    with pytest.raises(InputError, match="config.data.train.a='x.csv'. Expected a group of keys"):
        complete(dict(a="x.csv"))
    shapes = dict(a=dict(path=100, format="shapes"))
    with pytest.raises(InputError, match="drawn scenes cannot be mixed with files"):
        sources.open_source(complete(shapes).data, complete(shapes).data.train, image_side=8)
