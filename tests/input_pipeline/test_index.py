"""The index of shards: made once for all machines, by all processes together, and never wrong."""

import functools
import hashlib
import json
import os
import resource
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline import prepare, rows, sources
from input_pipeline.sources import fingerprint, index_file, index_places, offset_index, offsets, tar, tfrecord
from input_pipeline.sources.offset_index import Peers
from rankclip_jax.common.errors import InputError
from rankclip_jax.train import workdir
from tests.support.source_files import KEYS, WRITERS, read_all, samples

KINDS = {"tfrecord": tfrecord.kind, "webdataset": tar.usual_kind}
ENDINGS = {"tfrecord": "tfrecord", "webdataset": "tar"}


@pytest.fixture
def scanned(monkeypatch):
    """The names of the shards that are scanned, as they are."""
    names = []

    def noting(scan):
        return lambda *args: names.append(Path(args[-1]).stem) or scan(*args)

    for module in (tfrecord, tar):
        monkeypatch.setattr(module, "_scan", noting(module._scan))
    return names


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


@pytest.mark.parametrize("at_once", [64 << 20, 0])
@pytest.mark.parametrize("layout", KINDS)
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


@pytest.mark.parametrize("at_once", [64 << 20, 0])
@pytest.mark.parametrize("layout", KINDS)
def test_a_damaged_index_is_made_again(layout, at_once, tmp_path, monkeypatch):
    made = samples(20)
    WRITERS[layout](tmp_path, made)
    right = records_of(index_of(layout, tmp_path))
    (file,) = files_of(tmp_path / ".rankclip_index")
    data = file.read_bytes()
    monkeypatch.setattr(index_places, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    table = index_file._HEAD.size + index_file._HEAD.unpack_from(data)[2]
    places = [*range(index_file._HEAD.size), *rng.integers(0, table, 60), *rng.integers(4096, len(data), 60)]
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
        read = tf.function(source.read).get_concrete_function(tf.TensorSpec((), tf.int64))
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


class Agreed:
    """all_of among threads, each of which stands for a process."""

    def __init__(self, count):
        self._barrier, self._said, self._count = threading.Barrier(count, timeout=60), {}, count

    def of(self, index):
        calls = iter(range(100))

        def all_of(value):
            call = next(calls)
            self._said[call, index] = value
            self._barrier.wait()
            return [self._said[call, one] for one in range(self._count)]

        return all_of


def together(count, work):
    """[work(index, all_of)] of `count` processes at once."""
    agreed, found = Agreed(count), [None] * count

    def run(index):
        found[index] = work(index, agreed.of(index))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


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


@pytest.mark.parametrize("shared", ["beside", "workdir", "nothing"])
def test_each_process_indexes_its_share(shared, tmp_path, scanned):
    paths, right = many(tmp_path, 10)
    scanned.clear()

    def work(index, all_of, count=2):
        cache = None if shared == "beside" else str(tmp_path / f"cache{index}")
        folder = str(tmp_path / ("run" if shared != "nothing" else f"run{index}"))
        found = offset_index.offset_index(tfrecord.kind(), paths, cache, Peers((index, count), folder, all_of))
        return records_of(found)

    assert together(2, work) == [right, right]
    # Where they share nothing each scans the other's half, too.
    assert sorted(scanned) == sorted([f"{n:05}" for n in range(10)] * (2 if shared == "nothing" else 1))
    scanned.clear()
    assert together(2, work) == [right, right] and scanned == []
    # With another number of processes, on machines that have nothing.
    shutil.rmtree(tmp_path / "cache0", ignore_errors=True)
    assert together(3, functools.partial(work, count=3)) == [right] * 3
    assert scanned == [] or shared == "nothing"


def test_what_one_process_knows_alone_it_tells_the_others(tmp_path, scanned):
    paths, right = many(tmp_path, 10)
    offset_index.offset_index(tfrecord.kind(), paths[:7], str(tmp_path / "cache0"))
    scanned.clear()

    def work(index, all_of):
        peers = Peers((index, 2), str(tmp_path / "run"), all_of)
        return records_of(offset_index.offset_index(tfrecord.kind(), paths, str(tmp_path / f"cache{index}"), peers))

    assert together(2, work) == [right, right]
    # Of the even ones the first knows 0 to 6, of the odd ones the second knows none.
    assert sorted(scanned) == ["00001", "00003", "00005", "00007", "00008", "00009"]


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


def of_before(layout, folder, kind, columns):
    """The cache of earlier versions: one .npz for the list of shards."""
    shards = shards_of(layout, folder)
    name = hashlib.sha256("\n".join([kind, *shards]).encode()).hexdigest()[:20] + ".npz"
    stats = list(map(os.stat, shards))
    rows = [10, 10]
    files = [[path, stat.st_size, stat.st_mtime_ns, n] for path, stat, n in zip(shards, stats, rows, strict=True)]
    lost = [dict(where=shards[1], reason="torn", samples=3)]
    meta = np.frombuffer(json.dumps(dict(files=files, lost=lost)).encode(), np.uint8)
    (Path(folder) / ".rankclip_index").mkdir()
    with open(Path(folder) / ".rankclip_index" / name, "wb") as out:
        np.savez(out, meta=meta, **columns)
    return Path(folder) / ".rankclip_index" / name


@pytest.mark.parametrize("layout", KINDS)
def test_an_index_of_before_is_used(layout, tmp_path, scanned):
    made = samples(20)
    path = WRITERS[layout](tmp_path, made)
    options = dict(cache_dir=str(tmp_path / "cache"))
    index = index_of(layout, tmp_path, **options)
    begin, length = np.split(np.concatenate([index.of_shard(0), index.of_shard(1)]), 2, axis=1)
    if layout == "tfrecord":
        kind, columns = "tfrecord", dict(begin=begin[:, 0], length=length[:, 0])
    else:
        pictures = "'jpg', 'jpeg', 'jpe', 'jfif', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff'"
        kind = f"tar samples [('image', ({pictures})), ('caption', ('txt', 'caption', 'txt.gz', 'caption.gz'))] ()"
        columns = dict(begin=begin, length=length.astype(np.int32))
    assert KINDS[layout]().name == kind
    file = of_before(layout, tmp_path, kind, columns)
    scanned.clear()
    source = opened(layout, shards_of(layout, tmp_path))
    assert scanned == [] and [(one.reason, one.samples) for one in source.lost] == [("torn", 3)]
    assert read_all(source) == made
    for damaged in (file.read_bytes()[:300], b"", b"PK\3\4" + bytes(500)):
        shutil.rmtree(file.parent)
        file.parent.mkdir()
        file.write_bytes(damaged)
        assert read_all(opened(layout, shards_of(layout, tmp_path))) == made
    assert path and len(scanned) == 6


@pytest.mark.parametrize("layout", KINDS)
def test_the_fingerprints_of_before(layout, tmp_path, monkeypatch):
    WRITERS[layout](tmp_path, samples(20))
    index = index_of(layout, tmp_path)
    begin, length = np.split(np.concatenate([index.of_shard(0), index.of_shard(1)]), 2, axis=1)
    digest = hashlib.blake2b(b"20", digest_size=8)
    lengths = length.astype(np.int32 if layout == "webdataset" else np.int64)
    for part in (np.array([0, 10], np.int64), np.ascontiguousarray(begin), np.ascontiguousarray(lengths)):
        digest.update(part.nbytes.to_bytes(8, "little") + part.tobytes())
    source = opened(layout, shards_of(layout, tmp_path))
    assert fingerprint.fingerprint(source) == digest.hexdigest()
    # Of many rows the checksums stand for the offsets; runs that stored the others resume.
    monkeypatch.setattr(fingerprint, "_LONG", 19)
    long = fingerprint.fingerprint(source)
    assert long != digest.hexdigest() == fingerprint.fingerprint(source, before=True)
    (tmp_path / "run").mkdir()
    began = {"train": {"samples": 20, "fingerprint": digest.hexdigest()}}
    (tmp_path / "run" / "data.json").write_text(json.dumps(began))
    now = {"train": {"samples": 20, "fingerprint": long}}

    def before(name):
        return {"samples": 20, "fingerprint": fingerprint.fingerprint(source, before=True)}

    workdir.check_same_data(tmp_path / "run", now, before)
    with pytest.raises(InputError, match=r"config.data.train has other data than the run"):
        workdir.check_same_data(tmp_path / "run", now, lambda name: now[name])


def test_the_long_fingerprint_notices_a_changed_row(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_LONG", 0)
    found = []
    made = samples(20)
    for name, some in {"a": made, "b": made, "c": [*made[:7], (made[7][0] + b"x", "more"), *made[8:]]}.items():
        (tmp_path / name).mkdir()
        WRITERS["tfrecord"](tmp_path / name, some)
        found.append(fingerprint.fingerprint(opened("tfrecord", shards_of("tfrecord", tmp_path / name))))
    assert found[0] == found[1] != found[2]
