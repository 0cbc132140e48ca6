"""Every source gives the same samples; shards by number, cached offsets, mixtures and the order of training."""

import csv
import gzip
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline import bad_samples, order, pipeline, sources
from input_pipeline.sources import index_places, offset_index, paths, tfrecord
from input_pipeline.sources.source import require
from rankclip_jax import config
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import NO_IMAGE
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.source_files import (
    KEYS,
    LAYOUTS,
    WRITERS,
    example,
    open_as,
    read_all,
    samples,
    write_csv,
    write_parquet,
    write_tfrecord,
)

DATA = Path(os.environ.get("RANKCLIP_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


def spec(layout, **options):
    return ConfigDict(KEYS | dict(format=layout) | options)


def opened(layout, path, **options):
    return sources.open_source(spec(layout, **options), path, image_side=8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_source_gives_the_same_images_captions_and_counts(layout, tmp_path):
    made = samples(31)
    source = open_as(layout, tmp_path, made)
    assert source.size == 31 and source.lost == ()
    several = layout.startswith("tfds")
    expected = [(i, [c, *(f"{c} again {k}" for k in range(n % 3))] if several else c) for n, (i, c) in enumerate(made)]
    assert read_all(source) == expected
    captions = [one for _, c in expected for one in (c if several else [c])]
    assert list(source.captions()) == captions
    # In any order, by a row's number alone, also outside a graph, of either kind of integer.
    for row in (30, 0, 17):
        assert (
            source.read(tf.constant(row))["image"].numpy()
            == source.read(np.int64(row))["image"].numpy()
            == made[row][0]
        )
    assert len({source.where(row) for row in range(31)}) == 31


@pytest.mark.skipif(not (DATA / "wds").is_dir(), reason="the project's sample data are not here")
def test_the_shared_sample_is_the_same_through_every_source(tmp_path):
    rows = list(csv.DictReader(open(DATA / "cifar10" / "train.csv")))[:1000]
    by_record = read_all(opened("tfrecord", str(DATA / "tfrecord"), cache_dir=str(tmp_path)))
    assert [caption for _, caption in by_record] == [row["caption"] for row in rows]
    assert (
        read_all(opened("webdataset", str(DATA / "wds" / "{00000..00001}.tar"), cache_dir=str(tmp_path))) == by_record
    )
    for layout in ("csv", "folder", "parquet"):
        (tmp_path / layout).mkdir()
        assert read_all(open_as(layout, tmp_path / layout, by_record)) == by_record


@pytest.mark.skipif(not (DATA / "cifar10" / "broken").is_dir(), reason="the project's sample data are not here")
def test_the_broken_sample_is_read_on_and_names_its_four_rows(tmp_path, capsys):
    source = opened("csv", str(DATA / "cifar10" / "broken" / "sample.csv"))
    tokenizer = Tokenizer.train(source.captions(), 400)
    options = dict(batch_size=15, image_side=32, context_length=16, crop_scale=(1.0, 1.0), seed=0)
    batches = pipeline.TrainBatches(source, tokenizer, bad_path=tmp_path / "bad.jsonl", max_bad_fraction=0.1, **options)
    for _ in range(8):
        assert next(batches)["image"].shape[0] == 15
    pil = NO_IMAGE
    reasons = {9: "no such file", 22: "broken or truncated JPEG", 41: pil, 57: "empty caption"}
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and {line["row"]: line["reason"] for line in lines} == reasons
    assert batches.bad.reasons == dict.fromkeys(reasons.values(), 1)
    assert batches.bad.summary().startswith("4 unusable samples skipped: 1 ")
    named = capsys.readouterr().err
    assert all(f"row {row}: " in named for row in (9, 22, 41, 57))
    recovering = pipeline.TrainBatches(source, tokenizer, recover_truncated=True, **options)
    for _ in range(8):
        next(recovering)
    assert "broken or truncated JPEG" not in recovering.bad.reasons and len(recovering.bad.reasons) == 3


def test_paths_by_brace_glob_folder_and_list(tmp_path):
    assert paths.braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert paths.braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    with pytest.raises(InputError, match=r"cannot read \{5..3\}. Expected a range"):
        paths.braces("{5..3}")
    names = [str(tmp_path / name) for name in ("0.tar", "1.tar", "[2].tar")]
    for name in names:
        Path(name).touch()
    (tmp_path / "notes.txt").touch()
    expand = lambda pattern: paths.expand(pattern, endings=(".tar",))  # noqa: E731
    assert expand(str(tmp_path / "{0..1}.tar")) == names[:2]
    assert expand(str(tmp_path / "?.tar")) == names[:2]
    assert expand(str(tmp_path)) == names
    assert expand([names[1], str(tmp_path / "{0,1}.tar")]) == [names[1], *names[:2]]
    assert expand(names[2]) == [names[2]]  # a name of its own, not a set of characters
    with pytest.raises(InputError, match=r"no such file: .*2.tar$"):
        expand(str(tmp_path / "{0..2}.tar"))
    with pytest.raises(InputError, match="has no files that end in .parquet"):
        paths.expand(str(tmp_path), endings=(".parquet",))
    with pytest.raises(InputError, match="no path to the data is given; fetch it"):
        paths.expand(None, endings=(".tar",), hint="fetch it")
    with pytest.raises(InputError, match="nowhere:// is not supported"):
        expand("nowhere://bucket/{0..1}.tar")


def test_offsets_are_kept_and_only_changed_shards_gone_through_again(tmp_path, monkeypatch):
    made = samples(20)
    path = write_tfrecord(tmp_path, made)
    gone_through = []
    scan = tfrecord._scan
    monkeypatch.setattr(tfrecord, "_scan", lambda data, size, path: gone_through.append(path) or scan(data, size, path))
    shards = [str(tmp_path / f"{i:05}.tfrecord") for i in (0, 1)]
    assert opened("tfrecord", path).size == 20 and sorted(gone_through) == shards
    gone_through.clear()
    assert read_all(opened("tfrecord", path)) == made and gone_through == []
    # A longer shard, and one of the same size that was written again.
    with tf.io.TFRecordWriter(shards[1]) as out:
        for image, caption in made[:13]:
            out.write(example(jpg=image, txt=caption))
    assert read_all(opened("tfrecord", path)) == made[:10] + made[:13] and gone_through == [shards[1]]
    gone_through.clear()
    os.utime(shards[0], ns=(0, 0))
    assert opened("tfrecord", path).size == 23 and gone_through == [shards[0]]
    # A stored index that was cut off is none.
    for kept in (tmp_path / ".rankclip_index").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    assert read_all(opened("tfrecord", path)) == made[:10] + made[:13]


@pytest.mark.parametrize("layout", ["tfrecord", "webdataset"])
def test_a_wildcard_matches_neither_the_index_nor_a_folder(layout, tmp_path):
    made = samples(6)
    WRITERS[layout](tmp_path, made)
    (tmp_path / "folder").mkdir()
    (tmp_path / "._00000.tar").write_bytes(b"left by macOS")
    for _ in range(2):  # the first leaves .rankclip_index
        assert read_all(opened(layout, str(tmp_path / "*"))) == made
    assert (tmp_path / ".rankclip_index").is_dir()


def test_a_wrong_length_that_ends_behind_the_shard_is_no_truncation(tmp_path):
    shard = tmp_path / "0.tfrecord"
    with tf.io.TFRecordWriter(str(shard)) as out:
        for _ in range(40):
            out.write(example(jpg=b"x", txt="y"))
    data = bytearray(shard.read_bytes())
    second = len(data) // 40
    data[second + 6] ^= 0x40
    shard.write_bytes(data)
    (lost,) = opened("tfrecord", str(shard)).lost
    assert f"the checksum of a record's length is wrong at byte {second}" in lost.reason and lost.samples == 39


def test_checksums_are_tensorflows(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "a")) as out:
        for length in (0, 1, 1000, 70_000):
            out.write(b"x" * length)
    data, at = (tmp_path / "a").read_bytes(), 0
    for length in (0, 1, 1000, 70_000):
        head = np.frombuffer(data[at : at + 12], np.uint8)
        assert tfrecord._masked_crc32c(head[None, :8])[0] == head[8:].view("<u4")[0]
        at += 16 + length


def test_tars_of_every_dialect(tmp_path):
    """Long names in pax and GNU form, folders, links, hidden files, capital endings, and joined tars."""
    image, caption = samples(1)[0]
    long_key = "a/" * 60 + "k" * 120
    for dialect in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "one.tar", "w", format=dialect) as tar:
            (tmp_path / "x.jpg").write_bytes(image)
            (tmp_path / "x.txt").write_text(caption)
            tar.add(tmp_path / "x.txt", "._hidden.txt")
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            link = tarfile.TarInfo("folder/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "x.jpg"
            tar.addfile(link)
            for key in ("folder/x", long_key, "\u00e9t\u00e9"):
                tar.add(tmp_path / "x.jpg", f"{key}.JPG")
                tar.add(tmp_path / "x.txt", f"{key}.txt")
        joined = (tmp_path / "one.tar").read_bytes() * 2  # with an end mark in the middle
        (tmp_path / f"joined{dialect}.tar").write_bytes(joined)
        source = opened("webdataset", str(tmp_path / f"joined{dialect}.tar"))
        assert read_all(source) == [(image, caption)] * 6 and source.lost == ()
        assert [source.where(row).split(" key ")[1] for row in (0, 1, 2)] == ["folder/x", long_key, "\u00e9t\u00e9"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_tar_takes_no_memory(tmp_path):
    made = samples(2)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, (image, caption) in enumerate(made):
            for ending, data in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            hole = tarfile.TarInfo(f"hole{i}.bin")
            hole.size = 1 << 31  # a file with a hole has the length and not the bytes
            tar.offset += tar.fileobj.write(hole.tobuf()) + hole.size
            tar.fileobj.seek(tar.offset)

    def in_memory():
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["RssAnon"].split()[0]) << 10

    before = in_memory()
    source = opened("webdataset", str(tmp_path))
    assert read_all(source) == made and (tmp_path / "0.tar").stat().st_size > 1 << 32
    assert in_memory() - before < 1 << 29


def test_webdataset_keys_can_be_named(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for ending, data in (("left.png", b"left"), ("right.png", b"right"), ("en.txt", b"en"), ("de.txt", b"de")):
            (tmp_path / "x").write_bytes(data)
            tar.add(tmp_path / "x", f"k.{ending}")
    source = opened("webdataset", str(tmp_path), image_key=("none", "right.png"), caption_key="de.txt")
    assert read_all(source) == [(b"right", "de")]
    with pytest.raises(InputError, match=r"no sample has both an image \(.jpg or .* and a caption \(.txt or"):
        opened("webdataset", str(tmp_path))


def test_record_keys_can_be_named_and_are_found_among_several(tmp_path):
    with tf.io.TFRecordWriter(str(tmp_path / "0.tfrecord")) as out:
        out.write(example(png=b"a", caption="one"))
        out.write(example(webp=b"b", caption="two", txt=""))
        out.write(example(jpg=b"c", txt="three", caption="not this", tokens=[1, 2, 3]))
    assert read_all(opened("tfrecord", str(tmp_path))) == [(b"a", "one"), (b"b", "two"), (b"c", "three")]
    by_name = opened("tfrecord", str(tmp_path), image_key=("none", "webp", "png", "jpg"), caption_key="caption")
    assert read_all(by_name) == [(b"a", "one"), (b"b", "two"), (b"c", "not this")]
    path = str(tmp_path / "0.tfrecord")
    with pytest.raises(
        InputError, match="no feature picture; the features are: caption, png; set config.data.image_key"
    ):
        opened("tfrecord", path, image_key="picture")
    with pytest.raises(InputError, match="set config.data.caption_key"):
        opened("tfrecord", path, caption_key="title")


def test_wrong_files_are_refused_by_name(tmp_path):
    (tmp_path / "text.tfrecord").write_text("this is no TFRecord at all, only a text\n" * 10)
    with pytest.raises(InputError, match="text.tfrecord has no TFRecords"):
        opened("tfrecord", str(tmp_path / "text.tfrecord"))
    for name, layout in (("a.tfrecord", "tfrecord"), ("a.tar", "webdataset")):
        (tmp_path / name).write_bytes(gzip.compress(b"x" * 5000))
        with pytest.raises(InputError, match=f"{name} is compressed, .* run gunzip first"):
            opened(layout, str(tmp_path / name))
    (tmp_path / "a.parquet").write_text("no Parquet")
    with pytest.raises(InputError, match="a.parquet cannot be read as Parquet"):
        opened("parquet", str(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"image": [1], "text": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="b.parquet: column image has type int64. Expected bytes, a path, or"):
        opened("parquet", str(tmp_path / "b.parquet"), caption_key="text")
    with pytest.raises(InputError, match="b.parquet has no column caption or txt; its columns are: image, text"):
        opened("parquet", str(tmp_path / "b.parquet"), image_key="text")
    with pytest.raises(InputError, match="gone is not a folder"):
        opened("folder", str(tmp_path / "gone"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has no images"):
        opened("folder", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="a tfds path is NAME:SPLIT"):
        opened("tfds", "coco_captions")
    with pytest.raises(InputError, match="tfds 'coco_captions' is not prepared in .*tfds build coco_captions"):
        opened("tfds", "coco_captions:train", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="tfds 'no_such_set' cannot be opened"):
        opened("tfds", "no_such_set:train", data_dir=str(tmp_path))
    with pytest.raises(InputError, match="unknown config.data.format=.*Expected csv, tfrecord"):
        opened("zip", "x")


def test_a_csv_counts_its_rows_as_they_stand_in_the_file(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfimage,caption\n"  # a byte order mark, as Excel writes it
        b'0.png,"two\nlines and ""quotes"""\n'
        b"1.png\n"
        b"2.png,one,too many\n"
        b"\n"
        b"3.png,caf\xe9\n"  # not UTF-8
        b'4.png,a 6" pipe\n'
    )
    with pytest.raises(InputError, match=r'a.csv row 3: byte 0xe9 is not utf-8 \(in "caf\\xe9"\); set config.data.enc'):
        opened("csv", str(tmp_path / "a.csv"))
    for encoding in ("utf-8", "latin-1"):  # the byte order mark counts
        source = opened("csv", str(tmp_path / "a.csv"), encoding=encoding)
        assert list(source.captions()) == ['two\nlines and "quotes"', 'a 6" pipe']
        assert [source.where(row).split("a.csv ")[1].split(":")[0] for row in range(2)] == ["row 0", "row 4"]
        assert [(lost.where.split("a.csv ")[1], lost.reason) for lost in source.lost] == [
            ("row 1", "wrong number of fields: 1, and the header has 2"),
            ("row 2", "wrong number of fields: 3, and the header has 2; a text with ',' in it needs quotation marks"),
            ("row 3", "byte 0xe9 is not utf-8"),
        ]
    (tmp_path / "b.csv").write_text('image,caption\n0.png,good\n1.png,"never closed\n2.png,also good\n')
    source = opened("csv", str(tmp_path / "b.csv"))
    assert list(source.captions()) == ["good", "also good"]
    assert [(lost.where.split("b.csv ")[1], lost.reason) for lost in source.lost] == [
        ("row 1", "a quotation mark that is not closed at the end of its field")
    ]


def test_several_tables_keep_their_folders(tmp_path):
    made = samples(4)
    for name, part in (("x", made[:2]), ("y", made[2:])):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name, part)
    absolute = tmp_path / "z.csv"
    absolute.write_text(f"image,caption\n{tmp_path}/x/pictures/0.img,absolute\n")
    source = opened("csv", [str(tmp_path / "{x,y}" / "data.csv"), str(absolute)])
    assert read_all(source) == [*made, (made[0][0], "absolute")]
    assert "y/data.csv row 1: " in source.where(3) and source.where(4).endswith("x/pictures/0.img")


def test_a_folder_names_captions_without_image_and_goes_in_no_circles(tmp_path):
    made = samples(3)
    root = Path(WRITERS["folder"](tmp_path, made))
    (root / "alone.txt").write_text("no image")
    (root / "0000" / "up").symlink_to(root, target_is_directory=True)
    source = opened("folder", str(root))
    assert read_all(source) == made
    assert [(lost.where, lost.reason) for lost in source.lost] == [(f"{root}/alone.txt", "a caption without an image")]


def test_parquet_is_unpacked_once_and_needs_room(tmp_path, monkeypatch):
    made = samples(10)
    path = write_parquet(tmp_path, made)
    opened("parquet", path)
    tars = {tar: tar.stat().st_mtime_ns for tar in (tmp_path / ".rankclip_index").glob("*.tar")}
    assert len(tars) == 2
    assert read_all(opened("parquet", path)) == made
    assert {tar: tar.stat().st_mtime_ns for tar in (tmp_path / ".rankclip_index").glob("*.tar")} == tars
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("", (), dict(free=10)))
    with pytest.raises(InputError, match=r"GB, but .*mine has 0.0 GB free; set config.data.cache_dir"):
        opened("parquet", path, cache_dir=str(tmp_path / "mine"))


def test_a_reason_is_the_same_in_a_graph_and_alone():
    def read(row):
        require(row < 0, "no [usual] image")
        return row

    for called in (read, tf.function(read)):
        with pytest.raises(tf.errors.OpError) as error:
            called(tf.constant(1))
        assert bad_samples.in_words(error.value) == "no [usual] image"


# Mixtures and order


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
    return np.array(list(rows.as_numpy_iterator()))


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
    assert [captions[0] for _, captions in got] == [caption for layout in made for _, caption in made[layout]]
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
    with pytest.raises(InputError, match=r"config.data.train.a.wieght does not exist; the nearest key is .*weight"):
        complete(dict(a=dict(path="x", wieght=1)))
    with pytest.raises(InputError, match=r"train.b.weight=None. Expected a weight of every part, or of none"):
        complete(dict(a=dict(path="x", weight=1), b=dict(path="y")))
    with pytest.raises(InputError, match=r"config.data.train.a.weight=0. Expected a number above 0 or None"):
        complete(dict(a=dict(path="x", weight=0)))
    with pytest.raises(InputError, match="config.data.train.a='x.csv'. Expected a group of keys"):
        complete(dict(a="x.csv"))
    shapes = dict(a=dict(path=100, format="shapes"))
    with pytest.raises(InputError, match="drawn scenes cannot be mixed with files"):
        sources.open_source(complete(shapes).data, complete(shapes).data.train, image_side=8)


# Tokens and several captions


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


# Ten million samples


@pytest.mark.slow
def test_ten_million_records_are_opened_and_resumed_in_little_memory(tmp_path):
    """An index as large as a real one, over one real shard that all its rows point into."""
    made = samples(100)
    path = write_tfrecord(tmp_path, made)
    shard = str(tmp_path / "00000.tfrecord")
    index = offset_index.offset_index(tfrecord.kind(), [shard])
    records = np.tile(index.of_shard(0), (200_000, 1))
    shutil.rmtree(tmp_path / ".rankclip_index")
    place = index_places.Place(str(tmp_path / ".rankclip_index"), str(tmp_path))
    writer = index_places.Writer(tfrecord.kind(), [place])
    writer.add(shard, paths.stamps([shard])[0], records, ())
    writer.flush()
    source = opened("tfrecord", shard)
    assert source.size == 10_000_000 and records.nbytes == 16 * source.size
    tokenizer = Tokenizer.train([caption for _, caption in made], 400)
    far = 2 * source.size + 123_457
    whole = batches_of(source, tokenizer, start=far)
    came = [next(whole)["tokens"] for _ in range(3)]
    resumed = batches_of(source, tokenizer, start=far + 8)
    assert np.array_equal(next(resumed)["tokens"], came[2]) and whole.position == far + 12
    # Rows of an epoch are a permutation: as many different ones in any part of it as the part is long.
    assert len(set(stream(source, 20_000, start=far).tolist())) == 20_000
    captions = {caption for _, caption in made[:50]}
    assert {row for _, row in zip(range(100), source.captions(), strict=False)} <= captions
    assert path
