"""The index of shards: made once for all machines, by all processes together, and never wrong."""

import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline import prepare, rows, sources
from input_pipeline.sources import index_file, index_places, offset_index, offsets, tar, tfrecord
from rankclip_jax.common.errors import InputError
from tests.support.source_files import KEYS, WRITERS, read_all, samples

KINDS = {"tfrecord": tfrecord.kind, "webdataset": tar.usual_kind}
# With an index that is read at once, and with one that is read as it is needed.
HOW = [("tfrecord", 0), ("webdataset", 64 << 20)]
HOW += [pytest.param(*how, marks=pytest.mark.slow) for how in (("tfrecord", 64 << 20), ("webdataset", 0))]
ENDINGS = {"tfrecord": "tfrecord", "webdataset": "tar"}


def opened(layout, path, **options):
    return sources.open_source(ConfigDict(KEYS | dict(format=layout) | options), path, image_side=8)


def shards_of(layout, folder):
    return [f"{folder}/{number:05}.{ENDINGS[layout]}" for number in (0, 1)]


def index_of(layout, folder, **options):
    return offset_index.offset_index(KINDS[layout](), shards_of(layout, folder), **options)


def records_of(index):
    return [index.of_shard(file).tolist() for file in range(len(index.paths))]


def files_of(folder):
    return sorted(Path(folder).glob("*.index"))


@pytest.mark.parametrize("layout", KINDS)
def test_where_the_rows_are(layout, tmp_path):
    made = samples(13)
    WRITERS[layout](tmp_path, made)
    index = index_of(layout, tmp_path)
    assert (index.size, index.starts.tolist()) == (13, [0, 6])
    for row in (0, 5, 6, 12):
        (file,), (record,) = index.of_rows([row])
        assert file == index.file_of(row) == (row >= 6)
        begin, length = np.split(record, 2)
        data = Path(index.paths[file]).read_bytes()
        if layout == "webdataset":
            parts = [data[b : b + n] for b, n in zip(begin, length, strict=True)]
            assert parts == [made[row][0], made[row][1].encode()]
        else:  # behind 8 bytes of length and 4 of its checksum
            found = tf.train.Example.FromString(data[begin[0] + 12 : begin[0] + 12 + length[0]])
            assert found.features.feature["jpg"].bytes_list.value[0] == made[row][0]
        assert [x.numpy().tolist() for x in index.in_graph(tf.constant(row))] == [file, begin.tolist(), length.tolist()]
    # Rows i to j of shard s.
    assert index.of_shard(1, 2, 5).tolist() == index.of_rows([8, 9, 10])[1].tolist()
    assert index.of_shard(1, 5, 99).tolist() == index.of_rows([11, 12])[1].tolist()
    assert len(index.of_shard(0, 3, 3)) == 0


@pytest.mark.parametrize("layout, at_once", HOW)
def test_a_shard_in_a_bucket_is_scanned_once_for_all_machines(layout, at_once, bucket, tmp_path, monkeypatch, scanned):
    monkeypatch.setattr(index_places, "AT_ONCE", at_once)
    monkeypatch.setattr(index_file, "CHUNK", 4)
    monkeypatch.setattr(offsets, "CHUNK", 4)
    made = samples(40)
    path = WRITERS[layout](bucket.folder, made).replace(str(bucket.folder), "gs://mine")
    assert read_all(opened(layout, path)) == made and sorted(scanned) == ["00000", "00001"]
    for machine in ("second", "third"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        scanned.clear()
        bucket.requests.clear()
        index = index_of(layout, "gs://mine")
        assert scanned == [] and bucket.read_bytes("0") == 0
        assert sum(kind == "read" for kind, *_ in bucket.requests) <= (4 if at_once else 2)
        width, tables = 8 * 2 * (2 if layout == "webdataset" else 1), bucket.read_bytes()
        assert len(index.of_shard(1, 5, 7)) == 2  # in records 4 to 7
        assert bucket.read_bytes() - tables == (0 if at_once else 4 * width)
        assert not Path(tmp_path / machine / "rankclip_jax").exists()
    assert read_all(opened(layout, path)) == made and scanned == []
    # A shard that was written again is scanned again, and only that.
    (tmp_path / "short").mkdir()
    WRITERS[layout](tmp_path / "short", made[:6])
    shutil.copy(shards_of(layout, tmp_path / "short")[1], bucket.folder)
    assert read_all(opened(layout, path)) == made[:20] + made[3:6] and scanned == ["00001"]


@pytest.mark.parametrize("at_once", [64 << 20, 0])
def test_an_index_in_a_bucket_of_shards_on_a_disk(at_once, bucket, tmp_path, monkeypatch, scanned):
    monkeypatch.setattr(index_places, "AT_ONCE", at_once)
    made = samples(8)
    (tmp_path / "data").mkdir()
    path = WRITERS["webdataset"](tmp_path / "data", made)
    for machine in ("first", "second"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        assert read_all(opened("webdataset", path, cache_dir="gs://mine/cache")) == made
    assert sorted(scanned) == ["00000", "00001"] and files_of(bucket.folder / "cache")
    assert not (tmp_path / "data" / ".rankclip_index").exists()


@pytest.mark.parametrize("layout", KINDS)
def test_an_index_that_cannot_be_reached_makes_no_bad_samples(layout, bucket, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    path = WRITERS[layout](tmp_path / "data", samples(20))
    opened(layout, path, cache_dir="gs://mine/cache")
    monkeypatch.setattr(index_places, "AT_ONCE", 0)
    source = opened(layout, path, cache_dir="gs://mine/cache")
    bucket.refused = 403
    with pytest.raises(InputError, match=r"gs://mine/cache/.*: no permission"):
        list(rows.read_rows(source, range(11, 20)))


def test_where_the_data_cannot_be_written_the_index_is_in_the_cache(tmp_path, monkeypatch, scanned):
    made = samples(6)
    path = WRITERS["webdataset"](tmp_path, made)
    (tmp_path / ".rankclip_index").write_text("in the way, as for somebody without the right to write here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for _ in range(2):
        assert read_all(opened("webdataset", path)) == made
        assert read_all(opened("webdataset", path, cache_dir=str(tmp_path / "mine"))) == made
    # With config.data.cache_dir the user's own cache is not looked into.
    assert sorted(scanned) == ["00000", "00000", "00001", "00001"]
    assert len(files_of(tmp_path / "home" / "rankclip_jax")) == len(files_of(tmp_path / "mine")) == 1
    # Nowhere: it is made at each start.
    (tmp_path / "file").touch()
    assert read_all(opened("webdataset", path, cache_dir=str(tmp_path / "file"))) == made and len(scanned) == 6


def test_what_was_scanned_is_kept_though_the_rest_fails(tmp_path, monkeypatch, scanned):
    paths, _ = many(tmp_path, 4)
    data = Path(paths[2]).read_bytes()
    Path(paths[2]).write_bytes(b"\x1f\x8b" + data[2:])
    monkeypatch.setattr(index_places, "_EVERY", 0)
    scanned.clear()
    with pytest.raises(InputError, match="00002.tfrecord is compressed"):
        offset_index.offset_index(tfrecord.kind(), paths)
    Path(paths[2]).write_bytes(data)
    scanned.clear()
    assert offset_index.offset_index(tfrecord.kind(), paths).size == 12 and sorted(scanned) == ["00002", "00003"]


def test_an_index_that_goes_while_it_is_looked_for_costs_no_other(tmp_path, monkeypatch, scanned):
    paths, _ = many(tmp_path, 4)
    monkeypatch.setattr(index_places, "_EVERY", 0)  # a file for each shard
    offset_index.offset_index(tfrecord.kind(), paths)
    scanned.clear()
    listing = os.scandir

    def scandir(folder):
        items = sorted(listing(folder), key=lambda item: item.name)
        if Path(folder).name == ".rankclip_index":
            os.unlink(items[0].path)  # by another run
        return items

    monkeypatch.setattr(index_places.os, "scandir", scandir)
    assert offset_index.offset_index(tfrecord.kind(), paths).size == 12 and len(scanned) == 1


def test_a_moved_folder_keeps_its_index_and_another_set_of_the_same_names_is_not_mistaken_for_it(tmp_path, scanned):
    made = samples(6)
    (tmp_path / "here").mkdir()
    WRITERS["tfrecord"](tmp_path / "here", made)
    options = dict(cache_dir=str(tmp_path / "cache"))
    first = records_of(index_of("tfrecord", tmp_path / "here"))
    assert records_of(index_of("tfrecord", tmp_path / "here", **options)) == first and len(scanned) == 2
    shutil.copytree(tmp_path / "here", tmp_path / "there")  # with the times
    assert records_of(index_of("tfrecord", tmp_path / "there")) == first and len(scanned) == 2
    shutil.rmtree(tmp_path / "there" / ".rankclip_index")
    assert records_of(index_of("tfrecord", tmp_path / "there", **options)) == first and len(scanned) == 4


@pytest.mark.parametrize("layout, at_once", HOW)
def test_a_damaged_index_is_made_again(layout, at_once, tmp_path, monkeypatch):
    made = samples(20)
    WRITERS[layout](tmp_path, made)
    right = records_of(index_of(layout, tmp_path))
    (file,) = files_of(tmp_path / ".rankclip_index")
    data = file.read_bytes()
    monkeypatch.setattr(index_places, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    table = index_file._HEAD.size + index_file._HEAD.unpack_from(data)[2]
    places = [*range(index_file._HEAD.size), *rng.integers(0, table, 20), *rng.integers(4096, len(data), 20)]
    for kind in ("flip", "cut"):
        for place in places:
            damaged = bytearray(data)
            if kind == "flip":
                damaged[place] ^= 1 << rng.integers(8)
            else:
                damaged = damaged[:place]
            for old in files_of(tmp_path / ".rankclip_index"):
                old.unlink()
            file.write_bytes(damaged)
            assert records_of(index_of(layout, tmp_path)) == right, (kind, place)
    assert records_of(index_of(layout, tmp_path)) == right


def forged(tmp_path, change, **shard):
    """The index of two TFRecord shards of 10 rows each, consistent in itself, with other records of the second."""
    WRITERS["tfrecord"](tmp_path, samples(20))
    first, second = (records.copy() for records in map(index_of("tfrecord", tmp_path).of_shard, (0, 1)))
    right = [first.tolist(), second.tolist()]
    (file,) = files_of(tmp_path / ".rankclip_index")
    known = index_file.read(str(file), file.stat().st_size, "tfrecord", 2).shards
    second = change(second)
    stamps = [(shard.size, shard.time) for shard in known]
    forged = [
        index_file.described(s.name, stamp, records, ())._replace(first=first)
        for s, stamp, records, first in zip(known, stamps, (first, second), (0, 10), strict=True)
    ]
    forged[1] = forged[1]._replace(**shard)
    head = index_file.table("tfrecord", 2, forged)
    file.write_bytes(head + first.tobytes() + second.tobytes())
    return right


@pytest.mark.parametrize("at_once", [64 << 20, 0])
@pytest.mark.parametrize(
    "change",
    [
        lambda records: np.add(records, [1 << 40, 0]),
        lambda records: np.add(records, [0, 1 << 62]),
        lambda records: records * [1, -1],
        lambda records: records * 0 - 2,
        lambda records: records * 0 + np.iinfo(np.int64).max,
        lambda records: np.add(records, [20, 0]),  # the last frame ends behind the shard
    ],
)
def test_offsets_outside_of_the_shard_are_not_used(change, at_once, tmp_path, monkeypatch):
    right = forged(tmp_path, change)
    monkeypatch.setattr(index_places, "AT_ONCE", at_once)
    assert records_of(index_of("tfrecord", tmp_path)) == right


@pytest.mark.parametrize("shard", [dict(rows=-1), dict(first=11), dict(first=-1), dict(rows=1 << 60), dict(rows=11)])
def test_a_table_that_does_not_fit_its_file_is_none(shard, tmp_path):
    right = forged(tmp_path, lambda records: records, **shard)
    assert records_of(index_of("tfrecord", tmp_path)) == right


def test_a_large_index_of_another_number_of_rows_is_one_line(tmp_path, monkeypatch):
    forged(tmp_path, lambda records: records[:-3] * 0 - 2)
    monkeypatch.setattr(index_places, "AT_ONCE", 0)
    with pytest.raises(InputError, match=r"\.index says that .*00001.tfrecord has 7 rows, and it has 10: delete that"):
        records_of(index_of("tfrecord", tmp_path))


@pytest.mark.parametrize("layout", KINDS)
def test_what_was_not_verified_on_opening_is_verified_in_the_graph(layout, tmp_path, monkeypatch, scanned):
    made = samples(20)
    path = WRITERS[layout](tmp_path, made)
    opened(layout, path)
    (file,) = files_of(tmp_path / ".rankclip_index")
    data = bytearray(file.read_bytes())
    data[-13 * 16] ^= 8  # a first byte, of the second shard
    file.write_bytes(data)
    monkeypatch.setattr(index_places, "AT_ONCE", 0)
    scanned.clear()
    source = opened(layout, path)
    for _ in range(3):
        assert read_all(source) == made
    assert len(scanned) == 1


def test_offsets_are_no_part_of_the_graph(tmp_path):
    def bytes_of(count):
        (tmp_path / str(count)).mkdir()
        source = opened("webdataset", WRITERS["webdataset"](tmp_path / str(count), samples(1) * count))
        read = tf.function(source.read, autograph=False).get_concrete_function(tf.TensorSpec((), tf.int64))
        captured = sum(x.numpy().nbytes for x in read.captured_inputs if x.dtype not in (tf.variant, tf.resource))
        return len(read.graph.as_graph_def().SerializeToString()), captured

    (graph, captured), (more_graph, more_captured) = bytes_of(4), bytes_of(400)
    assert abs(more_graph - graph) < 200 and captured == more_captured


def test_more_shards_than_files_may_be_open(tmp_path):
    made = samples(80)
    for number, (image, caption) in enumerate(made):
        (tmp_path / "one").mkdir()
        WRITERS["webdataset"](tmp_path / "one", [(image, caption)] * 2)
        shutil.move(tmp_path / "one" / "00000.tar", tmp_path / f"{number:05}.tar")
        shutil.rmtree(tmp_path / "one")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened("webdataset", str(tmp_path / "*.tar"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 60, limits[1]))
    try:
        assert read_all(opened("webdataset", str(tmp_path / "*.tar"))) == made
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def many(folder, count):
    """`count` shards of TFRecords; (paths, right records)"""
    made = samples(3 * count)
    for number in range(count):
        with tf.io.TFRecordWriter(f"{folder}/{number:05}.tfrecord") as out:
            for image, _ in made[3 * number : 3 * number + 3]:
                out.write(image)
    paths = [f"{folder}/{number:05}.tfrecord" for number in range(count)]
    alone = offset_index.offset_index(tfrecord.kind(), paths, str(folder / "alone"))
    shutil.rmtree(folder / "alone")
    return paths, records_of(alone)


def test_what_prepare_writes_needs_no_scan(tmp_path, monkeypatch, scanned, captioned):
    def run(*more):
        arguments = ["prepare", str(captioned), str(tmp_path / "out"), "--shard-size", "7", *more]
        monkeypatch.setattr(sys, "argv", arguments)
        prepare.main()

    run()
    assert sorted(set(scanned)) == [f"{number:05}" for number in range(6)]
    scanned.clear()
    first = read_all(opened("tfrecord", str(tmp_path / "out" / "*.tfrecord")))
    assert len(first) == 40 and scanned == []
    # Resumed after one was lost: that one alone, and what described it before goes.
    (tmp_path / "out" / "00002.tfrecord").unlink()
    run()
    assert scanned == ["00002"]
    assert read_all(opened("tfrecord", str(tmp_path / "out" / "*.tfrecord"))) == first and scanned == ["00002"]


def test_an_index_beside_the_shards_is_in_no_commands_way(captioned, tmp_path, monkeypatch):
    (tmp_path / "out" / ".rankclip_index").mkdir(parents=True)
    monkeypatch.setattr(sys, "argv", ["prepare", str(captioned), str(tmp_path / "out")])
    prepare.main()
    assert len(files_of(tmp_path / "out" / ".rankclip_index")) == 1
