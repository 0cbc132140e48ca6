"""Data in a bucket: the same bytes as from a local copy, no more of them than are wanted, whatever fails on the way."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from input_pipeline import labelled, pipeline, sources
from input_pipeline.sources.paths import expand
from input_pipeline.sources.source import _BLOCK_ROWS, _BLOCKS
from rankclip_jax import config
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.storage import place
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.bucket import FAULTS
from tests.support.s3 import served_s3
from tests.support.source_files import KEYS, LAYOUTS, WRITERS, read_all, samples, write_csv, write_tar, write_tfrecord


def opened(layout, path, **options):
    kind = "tfds" if layout.startswith("tfds") else layout
    return sources.open_source(ConfigDict(KEYS | dict(format=kind) | options), path, image_side=8)


SLOW = {"folder", "tfds"}  # read as a csv, as tfrecord


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=pytest.mark.slow if layout in SLOW else ())
        for layout in LAYOUTS
        if layout != "tfds_array_record"
    ],
)
def test_the_bytes_are_those_of_a_local_copy(layout, bucket):
    made = samples(7)
    path = WRITERS[layout](bucket.folder, made).replace(str(bucket.folder), "gs://mine")
    source = opened(layout, path)
    copy = opened(layout, path.replace("gs://mine", str(bucket.folder)))
    assert read_all(source) == read_all(copy) and list(source.captions()) == list(copy.captions())
    assert [image for image, _ in read_all(source)] == [image for image, _ in made]
    assert source.ahead is not None or layout == "parquet"  # which is unpacked here
    assert "gs://mine/" in source.where(3)


def test_folders_wildcards_and_lists_of_names(bucket):
    write_tar(bucket.folder, samples(8))
    (bucket.folder / "below").mkdir()
    shutil.copy(bucket.folder / "00000.tar", bucket.folder / "below" / "9.tar")
    for pattern in (
        "gs://mine/{00000..00001}.tar",
        "gs://mine/*.tar",
        "gs://mine",
        "gs://mine/",
        "gs://mine/0000?.tar",
    ):
        assert len(read_all(opened("webdataset", pattern))) == 8, pattern
    assert opened("webdataset", ["gs://mine/below/*.tar", "gs://mine/00001.tar"]).size == 8
    bucket.requests.clear()
    with pytest.raises(InputError, match=r"no such file: gs://mine/000\d\d.tar"):
        opened("webdataset", "gs://mine/{00000..00063}.tar")
    assert sum(kind in ("list", "stat") for kind, _, _ in bucket.requests) < 6  # one listing, not one request a shard


def test_a_wildcard_in_a_name_lists_no_folder_below(bucket):
    write_tar(bucket.folder, samples(8))
    (bucket.folder / "pictures").mkdir()
    for i in range(50):
        (bucket.folder / "pictures" / f"{i}.tar").touch()
    assert expand("gs://mine/*.tar", endings=(".tar",)) == ["gs://mine/00000.tar", "gs://mine/00001.tar"]
    assert [objects for kind, _, objects in bucket.requests if kind == "list"] == [2]
    assert len(expand("gs://mine/*/*.tar", endings=(".tar",))) == 50


def test_a_tokenizer_of_a_large_set_reads_few_blocks_and_no_pictures(bucket, monkeypatch):
    assert _BLOCKS == 256
    monkeypatch.setattr("input_pipeline.sources.source._BLOCKS", 4)
    monkeypatch.setattr("input_pipeline.sources.source._BLOCK_ROWS", 3)
    assert _BLOCK_ROWS >= 64
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(noise).save(picture, "PNG")
    write_tar(bucket.folder, [(picture.getvalue(), f"caption {i}") for i in range(40)])
    source = opened("webdataset", "gs://mine/*.tar")
    bucket.requests.clear()
    wanted = [f"caption {10 * block + i}" for block in range(4) for i in range(3)]
    assert list(source.captions()) == wanted
    assert bucket.read_bytes() == sum(map(len, wanted))


def large_tar(folder, count, side=160):
    """Bytes of the pictures and captions of a tar in `folder`, cc.tar."""
    rng, total = np.random.default_rng(0), 0
    with tarfile.open(folder / "cc.tar", "w") as tar:
        for i in range(count):
            picture = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(picture, "JPEG", quality=95)
            for ending, data in (("jpg", picture.getvalue()), ("txt", f"picture number {i}".encode())):
                member = tarfile.TarInfo(f"{i:05}.{ending}")
                member.size = len(data)
                total += len(data)
                tar.addfile(member, io.BytesIO(data))
    return total


def batches_of(source, count, size=8):
    tokenizer = Tokenizer.train(["picture number 0123456789"], 300)
    view = dict(batch_size=size, image_side=32, context_length=16, crop_scale=(0.5, 1.0))
    stream = pipeline.TrainBatches(source, tokenizer, **view, seed=3, batches=count)
    return [next(stream) for _ in range(count)], stream


def assert_same(some, others):
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_an_epoch_reads_no_more_than_its_rows(bucket):
    wanted = large_tar(bucket.folder, 64)
    source = opened("webdataset", "gs://mine/cc.tar")
    bucket.requests.clear()
    batches, stream = batches_of(source, 8)
    first = max(size for _, _, size in bucket.requests)  # the first row is tried, and tells the shapes
    assert wanted <= bucket.read_bytes() - first <= 1.05 * wanted
    assert_same(batches, batches_of(opened("webdataset", str(bucket.folder / "cc.tar")), 8)[0])
    assert stream.bad.count == 0


def test_tfrecords_are_read_exactly_and_their_checksums_verified(bucket):
    path = write_tfrecord(bucket.folder, samples(12)).replace(str(bucket.folder), "gs://mine")
    source = opened("tfrecord", path)
    bucket.requests.clear()
    read_all(source)
    assert bucket.read_bytes() == sum(file.stat().st_size for file in bucket.folder.glob("*.tfrecord"))
    shard = bucket.folder / "00000.tfrecord"
    data = bytearray(shard.read_bytes())
    data[60] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="does not match its checksum"):
        from input_pipeline.bad_samples import reason_of_failure

        damaged = opened("tfrecord", path)
        raise InputError(str(reason_of_failure(damaged.read, 0, damaged.ahead)))


@pytest.mark.slow
def test_a_tenth_of_the_answers_fails_and_nothing_changes(bucket):
    large_tar(bucket.folder, 96)
    source = opened("webdataset", "gs://mine/cc.tar")
    bucket.faults, bucket.late = 0.1, 2.0
    batches, stream = batches_of(source, 24)
    assert {name for kind, name, _ in bucket.requests if kind == "fault"} == set(FAULTS)
    assert stream.bad.count == 0 and not stream.bad.reasons
    assert_same(batches, batches_of(opened("webdataset", str(bucket.folder / "cc.tar")), 24)[0])


@pytest.mark.slow
def test_what_is_refused_is_no_bad_sample(bucket, monkeypatch):
    monkeypatch.setattr(pipeline, "_SPAN_BATCHES", 20)  # so many batches are tried where none comes
    large_tar(bucket.folder, 32)
    source = opened("webdataset", "gs://mine/cc.tar")
    _, stream = batches_of(source, 1)
    bucket.refused = 403
    with pytest.raises(InputError, match=r"^gs://mine/cc.tar: no permission in gs://mine: .*GOOGLE_APPLICATION_CRED"):
        for _ in range(20):
            next(stream)
    with pytest.raises(InputError, match="no permission in gs://mine"):
        opened("webdataset", "gs://mine/cc.tar")
    bucket.refused = 401
    with pytest.raises(InputError, match="no valid credentials .*gcloud auth application-default login"):
        opened("webdataset", "gs://mine/cc.tar")


def test_a_store_that_lets_one_wait_is_named_once(bucket, monkeypatch, capfd):
    monkeypatch.setattr(place, "_PATIENCE", 0.05)
    bucket.latency = 0.2
    for data in (b"first", b"second"):
        storage.write("gs://slow/a", data)
        assert storage.read("gs://slow/a") == data
    assert capfd.readouterr().err == "gs://slow has not answered for 0.05 s; trying for about five minutes\n"


def test_a_shard_that_shrank_is_a_bad_sample(bucket):
    large_tar(bucket.folder, 16)
    source = opened("webdataset", "gs://mine/cc.tar")
    os.truncate(bucket.folder / "cc.tar", 50_000)
    _, stream = batches_of(source, 1, size=1)
    assert stream.bad.count and all("ends before byte" in reason for reason in stream.bad.reasons)


def test_evaluation_sets_in_a_bucket(bucket):
    made = samples(6)
    path = write_csv(bucket.folder, made)
    for below in ("cats", "dogs"):
        (bucket.folder / "classes" / below).mkdir(parents=True)
        (bucket.folder / "classes" / below / "0.png").write_bytes(made[0][0])
    keys = config.complete({"eval": {"zero_shot": {"own": {"path": "gs://mine/classes", "format": "folder"}}}}).eval
    found = labelled.open_labelled(keys.zero_shot.own, image_side=8)
    assert found.names == ["cats", "dogs"] and found.source.labels.tolist() == [0, 1]
    assert [batch["mask"].all() for batch in pipeline.eval_batches(found.source, batch_size=2, image_side=8)] == [True]
    keys = config.complete(
        {"eval": {"retrieval": {"own": {"path": path.replace(str(bucket.folder), "gs://mine")}}}}
    ).eval
    pairs = labelled.open_captioned(keys.retrieval.own, image_side=8)
    assert pairs.captions == [caption for _, caption in made] and pairs.source.size == 6


def test_an_address_that_names_nothing_is_a_bad_sample(bucket, tmp_path, capfd):
    (bucket.folder / "a.png").write_bytes(samples(1)[0][0])
    odd = ["ftp://mine/a.png", "http://[a.png", "gs:///a.png", f"gs://mine/{'a' * 1100}", "gs://mine/a\rb", "x" * 300]
    images = ["image", *["gs://mine/a.png"] * 12, *odd]
    (tmp_path / "a.csv").write_text("".join(f'"{image}",caption\n' for image in images), newline="")
    _, stream = batches_of(opened("csv", str(tmp_path / "a.csv")), 4, size=4)
    for reason in ("ftp:// is", "not a valid address", "no bucket is named", "Invalid GCS object", "gs://mine/aa", "/"):
        assert sum(each.startswith(reason) for each in stream.bad.reasons) == 1, reason
    assert "gs://mine/a?b: gs://mine/a\\rb; Invalid GCS object name\n" in capfd.readouterr().err


def test_pictures_over_http(bucket, tmp_path):
    made = samples(3)
    write_csv(bucket.folder, made)
    address = f"http://127.0.0.1:{bucket.port}/mine"
    table = tmp_path / "urls.csv"
    table.write_text("image,caption\n" + "".join(f"{address}/pictures/{i}.img,picture {i}\n" for i in range(3)))
    assert [image for image, _ in read_all(opened("csv", str(table)))] == [image for image, _ in made]
    assert storage.read(f"{address}/pictures/1.img", 2, 5) == made[1][0][2:5]
    with pytest.raises(InputError, match="no such file: http"):
        opened("csv", f"{address}/none.csv")


def test_s3_by_motos_server(tmp_path, monkeypatch):
    with served_s3(tmp_path, monkeypatch) as client:
        made = samples(5)
        for layout in ("webdataset", "tfrecord", "csv", "parquet"):
            folder = tmp_path / layout
            folder.mkdir()
            path = WRITERS[layout](folder, made)
            for file in [file for file in folder.rglob("*") if file.is_file()]:
                client.upload_file(str(file), "mine", file.relative_to(tmp_path).as_posix())
            assert read_all(opened(layout, path.replace(str(tmp_path), "s3://mine"))) == made, layout
        with pytest.raises(InputError, match="there is no bucket other"):
            opened("webdataset", "s3://other/0.tar")
        with pytest.raises(InputError, match="no such file: s3://mine/0.tar"):
            opened("webdataset", "s3://mine/0.tar")
