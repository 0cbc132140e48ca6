"""Tars, TFRecord and Parquet by blocks: one request each, the bytes of a local copy, Parquet as it is."""

import dataclasses
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import pipeline, sources
from input_pipeline.blocks import BlockOrder
from input_pipeline.sources import together
from input_pipeline.sources.mixture import open_mixture
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.bucket import FAULTS
from tests.support.source_files import KEYS, WRITERS, read_all, samples, write_parquet, write_tar

FORMATS = ("webdataset", "tfrecord", "parquet")
QUICK = ("webdataset", "parquet", pytest.param("tfrecord", marks=pytest.mark.slow))  # it reads ranges, as tars do
TOKENIZER = Tokenizer.train(["picture number 0123456789"], 300)
BLOCKS = dict(shuffle="blocks", block_rows=4, window_mb=1024)


def opened(kind, path, **options):
    return sources.open_source(ConfigDict(KEYS | BLOCKS | dict(format=kind) | options), path, image_side=8)


def pictures(count, side=96):
    """[(JPEG of some 7 kB, caption)]"""
    rng, made = np.random.default_rng(0), []
    for i in range(count):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(out, "JPEG", quality=90)
        made.append((out.getvalue(), f"picture number {i}"))
    return made


def stream(source, batches, *, start=(), lanes=4, window=4, batch=8, **options):
    """TrainBatches of `batches`; a window has so many blocks of each lane."""
    mean = source.blocks.size / len(source.blocks.first)
    order = BlockOrder(source.blocks, seed=3, lanes=lanes, window_bytes=int(lanes * (window + 0.5) * mean))
    view = dict(batch_size=batch, image_side=32, context_length=16, crop_scale=(0.5, 1.0))
    options |= dict(seed=3, start=start, order=order, batches=batches)
    return pipeline.TrainBatches(source, TOKENIZER, **view, **options)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


@pytest.mark.parametrize("kind", FORMATS)
def test_an_epoch_is_one_request_a_block_and_the_batches_of_a_local_copy(kind, bucket):
    made = pictures(56)
    path = WRITERS[kind](bucket.folder, made)
    source = opened(kind, path.replace(str(bucket.folder), "gs://mine"))
    blocks = 2 * 28 // (7 if kind == "parquet" else 4)
    assert source.size == 56 and len(source.blocks.first) == blocks
    bucket.requests.clear()
    batches = stream(source, 7, lanes=2)  # an epoch: both have as many blocks
    found = take(batches, 7)
    reads = [size for of, _, size in bucket.requests if of == "read"]
    assert len(reads) == blocks == len(bucket.requests)
    assert sum(reads) <= 1.05 * sum(len(image) + len(text) for image, text in made) + (kind == "webdataset") * 56 * 3500
    assert_same(found, take(stream(opened(kind, path), 7, lanes=2), 7))
    texts = sorted(TOKENIZER([text for _, text in made], 16).tolist())
    assert sorted(row for batch in found for row in batch["tokens"].tolist()) == texts
    if kind == "parquet":
        assert not list(bucket.folder.rglob("*.tar")) and not (bucket.folder.parent / "cache").exists()


@pytest.mark.parametrize("kind", [*FORMATS, "webdataset by rows", "tfrecord by rows"])
def test_rows_read_together_are_those_read_alone_and_are_fetched_once(kind, bucket, monkeypatch):
    kind, _, rows = kind.partition(" by ")
    made = pictures(56)
    made[3], made[9], made[20] = (b"no picture", "picture"), (made[9][0], ""), (b"", "")
    path = WRITERS[kind](bucket.folder, made).replace(str(bucket.folder), "gs://mine")
    size = sum(file.stat().st_size for file in bucket.folder.iterdir() if file.is_file())
    found = []
    for share in ("all", "some", "none"):
        monkeypatch.setattr(together, "SMALL", 6_900 if share == "some" else 1 << 18)
        source = opened(kind, path, shuffle=rows or "blocks")
        given_NxK = source.together.read(np.arange(56))
        if share == "none":
            given_NxK[:] = b""
            source = dataclasses.replace(source, together=source.together._replace(read=given_NxK.__getitem__))
        bucket.requests.clear()
        view = dict(batch_size=7, image_side=32, context_length=16, crop_scale=(0.5, 1.0), seed=3)
        batches = pipeline.TrainBatches(source, TOKENIZER, **view, batches=7) if rows else stream(source, 12, batch=4)
        found.append((take(batches, 6), batches.bad.reasons, sum(map(any, given_NxK))))
        assert bucket.read_bytes() <= size  # of an epoch
    assert found[0][2] >= 55 and found[2][2] == 0 and (0 < found[1][2] < 55 or kind == "parquet")
    for batches, reasons, _ in found[1:]:
        assert_same(batches, found[0][0])
        assert reasons == found[0][1]


@pytest.mark.slow
def test_traffic_is_that_of_the_rows_wherever_a_run_resumes(bucket):
    made = pictures(256)
    write_tar(bucket.folder, made)
    source = opened("webdataset", "gs://mine/*.tar")
    whole, came, positions = stream(source, 24), [], []
    for _ in range(20):
        came.append(next(whole))
        positions.append(whole.position)
    for step in (3, 11):
        again = opened("webdataset", "gs://mine/*.tar")
        bucket.requests.clear()
        assert_same(take(stream(again, 4, start=positions[step]), 4), came[step + 1 : step + 5])
        # Four batches are half a window: at most this window and the next are read, of 16 blocks each.
        assert len([1 for kind, _, _ in bucket.requests if kind == "read"]) <= 32


@pytest.mark.slow
def test_many_answers_fail_and_nothing_changes(bucket):
    write_tar(bucket.folder, pictures(128))
    source = opened("webdataset", "gs://mine/*.tar")
    bucket.faults, bucket.late = 0.3, 2.0
    batches = stream(source, 32)
    found = take(batches, 32)
    assert {name for kind, name, _ in bucket.requests if kind == "fault"} == set(FAULTS)
    assert batches.bad.count == 0
    assert_same(found, take(stream(opened("webdataset", str(bucket.folder / "*.tar")), 32), 32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])  # TFRecord: shard_blocks.py, as tars
def test_what_is_refused_is_no_bad_sample(kind, bucket, monkeypatch):
    monkeypatch.setattr(pipeline, "_SPAN_BATCHES", 20)  # so many batches are tried where none comes
    path = WRITERS[kind](bucket.folder, pictures(64)).replace(str(bucket.folder), "gs://mine")
    batches = stream(opened(kind, path), 16, window=1)  # two epochs
    next(batches)
    bucket.refused = 403
    with pytest.raises(InputError, match=r"^gs://mine/.*: no permission in gs://mine"):
        take(batches, 15)
    assert batches.bad.count == 0


@pytest.mark.parametrize("kind", QUICK)
def test_bad_rows_are_named_and_a_resumed_run_passes_over_them_too(kind, tmp_path):
    made = pictures(56)
    for row in (3, 17, 40):
        made[row] = (b"no picture", made[row][1])
    made[44] = (made[44][0], "")
    source = opened(kind, WRITERS[kind](tmp_path, made))
    bad = tmp_path / "bad.jsonl"
    whole, came, positions = stream(source, 21, bad_path=bad, lanes=2), [], []
    for _ in range(14):
        came.append(next(whole))
        positions.append(whole.position)
    lines = {line["row"]: line for line in map(json.loads, bad.read_text().splitlines())}
    assert set(lines) == {3, 17, 40, 44} and lines[44]["reason"] == "empty caption"
    assert all(str(tmp_path) in line["where"] for line in lines.values())
    for step in (2, 6):
        again = stream(source, 15, start=positions[step], lanes=2)
        assert_same(take(again, 4), came[step + 1 : step + 5])
        assert again.position == positions[step + 4] and again.read == 32 + again.bad.count


def test_a_shard_that_shrank_loses_the_rows_that_are_gone(bucket):
    made = pictures(16)
    write_tar(bucket.folder, made)
    source = opened("webdataset", "gs://mine/00000.tar", block_rows=8)
    os.truncate(bucket.folder / "00000.tar", 40_000)
    batches = stream(source, 1, batch=1, lanes=1)
    next(batches)
    assert source.size == 8 and all("ends before byte" in reason for reason in batches.bad.reasons)
    for row in range(3):  # the others of the block, one by one
        assert source.read(tf.constant(row, tf.int64))["image"].numpy() == made[row][0]


def test_a_block_that_is_too_large_for_a_window_is_read_row_by_row(bucket):
    made = pictures(16, side=256)
    write_tar(bucket.folder, made)
    source = opened("webdataset", "gs://mine/*.tar", window_mb=1, block_rows=4)
    assert 4 * len(made[0][0]) > 2**16
    bucket.requests.clear()
    take(stream(source, 2, lanes=1), 2)
    assert len(bucket.requests) >= 16


@pytest.mark.parametrize("kind", QUICK)
def test_rows_can_be_read_in_their_order_too(kind, bucket):
    made = samples(30)
    path = WRITERS[kind](bucket.folder, made)
    source = opened(kind, path.replace(str(bucket.folder), "gs://mine"))
    assert read_all(source) == made and list(source.captions()) == [text for _, text in made]
    assert f"gs://mine/{'1.parquet row 5' if kind == 'parquet' else '00001.t'}" in source.where(20)
    batches = pipeline.eval_batches(source, batch_size=4, image_side=8)
    assert [text for batch in batches for text in batch["caption"]][:30] == [text for _, text in made]


# Parquet


def test_captions_alone_read_no_pictures(bucket):
    write_parquet(bucket.folder, pictures(28))
    source = opened("parquet", "gs://mine")
    bucket.requests.clear()
    assert len(list(source.captions())) == 28
    assert bucket.read_bytes() < 4000


def test_lists_of_captions_paths_and_other_columns(tmp_path):
    made = samples(6)
    (tmp_path / "3.img").write_bytes(made[3][0])
    images = [{"bytes": image, "path": None} for image, _ in made]
    images[3] = {"bytes": None, "path": "3.img"}
    table = pa.table({"a.b": images, "id": range(6), "caption": [[text, text + "!"] for _, text in made]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    for options in ({"shuffle": "rows"}, {}):
        source = opened("parquet", str(tmp_path / "a.parquet"), image_key="a.b", **options)
        assert read_all(source) == [(image, [text, text + "!"]) for image, text in made]
    inside = pa.table({"image": [image for image, _ in made], "meta": [{"text": text} for _, text in made]})
    pq.write_table(inside, tmp_path / "b.parquet", row_group_size=4)
    source = opened("parquet", str(tmp_path / "b.parquet"), caption_key="meta:text")
    assert read_all(source) == made


def test_a_damaged_row_group_loses_its_rows_alone(tmp_path):
    made = pictures(28)
    write_parquet(tmp_path, made)
    file = tmp_path / "0.parquet"
    chunk = pq.read_metadata(file).row_group(1).column(1)
    data = bytearray(file.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 40] = b"\xff" * 40
    file.write_bytes(data)
    source = opened("parquet", str(tmp_path))
    batches = stream(source, 3, batch=7, lanes=1)
    found = [row for batch in take(batches, 3) for row in batch["tokens"].tolist()]
    assert batches.bad.count == 7 and "cannot be read as Parquet" in next(iter(batches.bad.reasons))
    assert sorted(found) == sorted(TOKENIZER([text for _, text in made[:7] + made[14:]], 16).tolist())


def test_a_row_group_that_is_too_large_for_a_window_is_refused(tmp_path):
    path = write_parquet(tmp_path, pictures(28, side=256))
    with pytest.raises(InputError) as refused:
        opened("parquet", path, window_mb=1)
    assert str(refused.value).startswith(f"{tmp_path}/0.parquet: row group 0 takes 0.4 MiB, more than a sixteenth of ")
    assert f"python -m input_pipeline.prepare {tmp_path}/0.parquet OUT_DIR" in str(refused.value)
    opened("parquet", path, window_mb=8)


# Mixtures


def test_a_mixture_without_weights_has_the_blocks_of_its_parts(tmp_path):
    made, parts = pictures(42), {}
    for kind, some in (("webdataset", made[:20]), ("parquet", made[20:])):
        (tmp_path / kind).mkdir()
        parts[kind] = dict(format=kind, path=WRITERS[kind](tmp_path / kind, some))
    spec = ConfigDict(KEYS | BLOCKS | dict(format="webdataset"))
    source = sources.open_source(spec, parts, image_side=8)
    assert len(source.blocks.first) == 6 + 4 and source.blocks.rows.sum() == 42
    batches = stream(source, 5, lanes=1)
    found = [row for batch in take(batches, 5) for row in batch["tokens"].tolist()]
    texts = TOKENIZER([text for _, text in made], 16).tolist()
    assert len(set(map(str, found))) == 40 and all(row in texts for row in found) and batches.bad.count == 0
    weighted = {name: part | {"weight": 1.0} for name, part in parts.items()}
    assert open_mixture(spec, weighted, lambda spec, path: opened(spec.format, path)).blocks is None


# What is held


def test_values_are_made_once_and_kept_while_they_are_used():
    made = []

    def make(number):
        made.append(number)
        if number == 13:
            raise InputError("thirteen")
        return 10 * number

    held = storage.Held(make)
    for user in ("a", "b"):
        for number in range(50):
            held.hold(number, user)
    assert held.get(49) == 490 and sorted(made) == list(range(50)) and held.get(50) is None
    with pytest.raises(InputError, match="thirteen"):
        held.get(13)
    held.drop(3, "a")
    held.drop(3, "nobody")
    assert held.get(3) == 30
    held.drop(3, "b")
    assert held.get(3) is None
    held.hold(3, "c")
    assert held.get(3) == 30 and made.count(3) == 2
