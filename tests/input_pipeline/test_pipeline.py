import csv
import io
import json

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import pipeline, sources
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import NO_IMAGE
from rankclip_jax.common.tokenizer import Tokenizer

KEYS = dict(format="csv", image_key="image", caption_key="caption", delimiter=",")
SPEC = ConfigDict(KEYS)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([f"grey level {i}" for i in range(40)], 400)


def batches(path, tokenizer, **options):
    source = sources.open_source(SPEC, path, image_side=8)
    given = dict(batch_size=4, image_side=8, context_length=12, crop_scale=(0.5, 1.0), seed=1) | options
    return pipeline.TrainBatches(source, tokenizer, **given)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def levels(batch):
    return (batch["image"][:, 0, 0, 0] // 5).tolist()


def same(a, b):
    return all(np.array_equal(x[key], y[key]) for x, y in zip(a, b, strict=True) for key in ("image", "tokens"))


def test_every_row_comes_once_an_epoch_in_an_order_that_changes(captioned, tokenizer):
    rows = [level for batch in take(batches(captioned, tokenizer), 30) for level in levels(batch)]
    epochs = [rows[:40], rows[40:80], rows[80:]]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_images_keep_their_own_captions(captioned, tokenizer):
    for batch in take(batches(captioned, tokenizer), 10):
        assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
        expected = tokenizer([f"grey level {level}" for level in levels(batch)], 12)
        assert np.array_equal(batch["tokens"], expected)


def test_resuming_anywhere_gives_the_very_batches_that_would_have_come(captioned, tokenizer):
    whole = batches(captioned, tokenizer)
    all_batches, positions = [], []
    for _ in range(25):
        all_batches.append(next(whole))
        positions.append(whole.position)
    for stop in (0, 6, 9, 20):
        resumed = batches(captioned, tokenizer, start=positions[stop])
        assert same(take(resumed, 3), all_batches[stop + 1 : stop + 4])


def test_resuming_far_into_ten_million_samples_is_immediate(tokenizer):
    image = tf.io.encode_png(tf.zeros((8, 8, 3), tf.uint8))
    source = sources.Source(
        10_000_000, lambda row: {"image": image, "caption": tf.strings.as_string(row)}, str, lambda: []
    )
    options = dict(batch_size=4, image_side=8, context_length=12, crop_scale=(1.0, 1.0), seed=0)
    far = 3 * 10_000_000 + 17
    first = next(pipeline.TrainBatches(source, tokenizer, start=far, **options))
    again = pipeline.TrainBatches(source, tokenizer, start=far - 4, **options)
    next(again)
    assert np.array_equal(next(again)["tokens"], first["tokens"])


def test_processes_share_an_epoch_and_make_the_batch_of_one_process(captioned, tokenizer):
    one = [levels(batch) for batch in take(batches(captioned, tokenizer), 10)]
    two = [take(batches(captioned, tokenizer, batch_size=2, process=(i, 2)), 10) for i in range(2)]
    together = [sorted(levels(a) + levels(b)) for a, b in zip(*two, strict=True)]
    assert together == [sorted(batch) for batch in one]


def test_bad_samples_are_passed_over_named_and_counted(captioned, tokenizer, tmp_path, capsys):
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "images" / "7.png").write_text("not an image")
    jpeg = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(jpeg, "JPEG")
    (tmp_path / "images" / "11.png").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    captioned.write_text(captioned.read_text().replace("grey level 20\n", " \n"))
    iterator = batches(captioned, tokenizer, bad_path=tmp_path / "bad.jsonl")
    rows = [level for batch in take(iterator, 18) for level in levels(batch)]
    assert sorted(set(range(40)) - set(rows)) == [3, 7, 11, 20]
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {line["row"] for line in lines} == {3, 7, 11, 20} and len(lines) == 4
    reasons = {line["row"]: line["reason"] for line in lines}
    assert reasons == {
        3: "no such file",
        7: NO_IMAGE,
        11: "broken or truncated JPEG",
        20: "empty caption",
    }
    assert iterator.bad.reasons == dict.fromkeys(reasons.values(), 1)
    assert "images/7.png" in next(line["where"] for line in lines if line["row"] == 7)
    assert iterator.bad.count in (8, 7)  # twice an epoch; the second epoch's last batch may not be complete
    assert "bad sample skipped" in capsys.readouterr().err
    # A run that stopped resumes behind the bad samples too.
    resumed = batches(captioned, tokenizer, start=iterator.position)
    whole = batches(captioned, tokenizer)
    assert same(take(resumed, 2), take(whole, 20)[18:])


def test_the_console_names_the_first_of_a_reason(captioned, tokenizer, tmp_path, capsys):
    for i in range(25):
        (tmp_path / "images" / f"{i}.png").unlink()
    source = sources.open_source(configs.complete({"data": {"format": "csv"}}).data, str(captioned), image_side=8)
    assert sum(batch["mask"].sum() for batch in pipeline.eval_batches(source, batch_size=8, image_side=8)) == 15
    *named, more, total = [line for line in capsys.readouterr().err.splitlines() if "no such file" in line]
    assert [line.startswith("bad sample skipped: ") for line in named] == [True] * 20
    assert more == "bad samples skipped: more for the same reason, no such file"
    assert total == "25 unusable samples skipped: 25 no such file"


def test_a_torn_line_of_a_killed_run_hides_no_later_one(captioned, tokenizer, tmp_path):
    (tmp_path / "images" / "3.png").unlink()
    (tmp_path / "bad.jsonl").write_text('{"row": 7, "whe')
    take(batches(captioned, tokenizer, bad_path=tmp_path / "bad.jsonl"), 10)
    again = batches(captioned, tokenizer, bad_path=tmp_path / "bad.jsonl")
    assert again.bad.reasons == {"no such file": 1}


def test_too_many_bad_samples_stop_the_run(captioned, tokenizer, tmp_path):
    for i in range(10):
        (tmp_path / "images" / f"{i}.png").unlink()
    with pytest.raises(InputError, match=r"of \d+ samples are unusable, more than config.data.max_bad_fraction"):
        take(batches(captioned, tokenizer, max_bad_fraction=0.2), 60)


def test_a_set_without_one_good_sample_is_refused_at_once(captioned, tokenizer, tmp_path):
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    with pytest.raises(InputError, match="the first 40 samples are all unusable; .*no such file"):
        batches(captioned, tokenizer)


@pytest.mark.parametrize(
    "process_count, batch_size",
    [(1, 7), (2, 5), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((1, 64), (3, 4)))],
)
def test_evaluation_covers_every_sample_exactly_once(captioned, process_count, batch_size):
    source = sources.open_source(SPEC, captioned, image_side=8)
    counts, seen = [], []
    for index in range(process_count):
        own = list(pipeline.eval_batches(source, batch_size=batch_size, image_side=8, process=(index, process_count)))
        counts.append(len(own))
        for batch in own:
            assert batch["image"].shape == (batch_size, 8, 8, 3)
            seen += [c for c, keep in zip(batch["caption"], batch["mask"], strict=True) if keep]
            assert levels(batch)[: batch["mask"].sum()] == [
                int(c.split()[-1]) for c, keep in zip(batch["caption"], batch["mask"], strict=True) if keep
            ]
    assert len(set(counts)) == 1
    assert sorted(seen) == sorted(f"grey level {i}" for i in range(40))


def test_evaluation_masks_and_names_what_it_cannot_read(captioned, tmp_path, capsys):
    (tmp_path / "images" / "39.png").unlink()
    (tmp_path / "images" / "0.png").unlink()
    source = sources.open_source(SPEC, captioned, image_side=8)
    assert sum(b["mask"].sum() for b in pipeline.eval_batches(source, batch_size=8, image_side=8)) == 38
    errors = capsys.readouterr().err
    assert "images/0.png" in errors and "images/39.png" in errors


def test_tabs_and_other_column_names(tmp_path, captioned):
    rows = list(csv.reader(captioned.open()))
    for name, delimiter, suffix in (("tabs", "\t", ".tsv"), ("bars", "|", ".csv")):
        with open(tmp_path / f"{name}{suffix}", "w", newline="") as out:
            csv.writer(out, delimiter=delimiter).writerows([["file", "text"], *rows[1:]])
        spec = ConfigDict(KEYS | dict(image_key="file", caption_key="text", delimiter="|"))
        source = sources.open_source(spec, tmp_path / f"{name}{suffix}", image_side=8)
        assert source.size == 40 and source.read(tf.constant(3))["caption"].numpy() == b"grey level 3"


def test_wrong_input_says_what_and_where(tmp_path, captioned):
    with pytest.raises(InputError, match=r"no such file: gone.csv \(in /.*\)"):
        sources.open_source(SPEC, "gone.csv", image_side=8)
    with pytest.raises(InputError, match=r"data.csv has no column 'title'; its columns are: image, caption"):
        sources.open_source(ConfigDict(KEYS | dict(caption_key="title")), captioned, image_side=8)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match=r"empty.csv is empty"):
        sources.open_source(SPEC, tmp_path / "empty.csv", image_side=8)
    (tmp_path / "header.csv").write_text("image,caption\n")
    with pytest.raises(InputError, match=r"header.csv has no rows"):
        sources.open_source(SPEC, tmp_path / "header.csv", image_side=8)
    with pytest.raises(InputError, match="config.data.format"):
        sources.open_source(ConfigDict(dict(format="zip")), captioned, image_side=8)
