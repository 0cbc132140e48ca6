"""Tars, Parquet and folders as people have them: pairing by name, captions inside JSON and lists, images by path."""

import errno
import gzip
import itertools
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from input_pipeline import sources
from input_pipeline.graph import require
from input_pipeline.rows import read_each, read_rows
from input_pipeline.sources.tar_samples import Pairing
from rankclip_jax.common import folders
from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete
from tests.support import cases


def read(kind, path, **keys):
    """([(image, captions)] of the good rows, [reason] of the others and of what is lost)"""
    spec = complete({"data": dict(format=kind, train=str(path), **keys)}).data
    source = sources.open_source(spec, spec.train, image_side=8)
    rows = list(read_rows(source, range(source.size)))
    bad = [row.reason for row in rows if row.reason] + [one.reason for one in source.lost for _ in range(one.samples)]
    return [(row.image, row.captions) for row in rows if not row.reason], bad


WANTED = {"image": ("jpg", "png"), "caption": ("txt",)}


@pytest.mark.parametrize(
    "names, samples",
    [
        ("a.jpg a.txt b.jpg b.txt", "a.jpg+a.txt b.jpg+b.txt"),
        ("a.txt a.json a.jpg", "a.jpg+a.txt"),
        ("a.png a.jpg a.txt", "a.jpg+a.txt"),  # jpg is wanted before png
        ("x/a.jpg x/a.txt y/a.jpg y/a.txt", "x/a.jpg+x/a.txt y/a.jpg+y/a.txt"),
        ("A.JPG A.TXT", "A.JPG+A.TXT"),
        ("a.jpg a.txt a.jpg a.txt", "a.jpg+a.txt a.jpg+a.txt"),
        ("a.jpg a.jpg a.txt", "a.jpg+- a.jpg+a.txt"),
        ("a.jpg a.txt a.txt", "a.jpg+a.txt -+a.txt"),
        ("a.seg.png a.jpg a.txt", "a.jpg+a.txt"),  # WebDataset's rule pairs all: seg.png is another extension
        ("v1.0.jpg v1.0.txt v1.1.jpg v1.1.txt", "v1.0.jpg+v1.0.txt v1.1.jpg+v1.1.txt"),
        ("a.x.jpg a.x.txt a.jpg a.txt", "a.x.jpg+a.x.txt a.jpg+a.txt"),
        ("._a.jpg a.jpg a.txt .DS_Store", "a.jpg+a.txt"),
        ("a.jpg b.jpg", "a.jpg+- b.jpg+-"),
        ("a.jpg a.txt b.jpg a.jpg c.jpg a.txt", "a.jpg+a.txt b.jpg+- c.jpg+- apart:1"),
        ("a.jpg b.jpg a.txt c.jpg c.txt", "b.jpg+- c.jpg+c.txt apart:1"),
    ],
)
def test_members_are_paired_by_webdatasets_rule_or_by_the_ending(names, samples):
    pairing, members = Pairing(WANTED), names.split()
    for place, name in enumerate(members):
        pairing.add(name, place, 1)
    found, apart = pairing.finish()
    named = ["+".join("-" if begin < 0 else members[begin] for begin in sample.begins) for sample in found]
    assert " ".join([*named, *([f"apart:{apart}"] if apart else [])]) == samples


def test_tars_with_compressed_captions_and_several_in_json(tmp_path):
    zipped = [[(f"{i}.jpg", cases.jpeg(i)), (f"{i}.txt.gz", gzip.compress(f"thing {i}".encode()))] for i in range(3)]
    cases.tar(tmp_path / "a.tar", itertools.chain(*zipped))
    assert read("webdataset", tmp_path / "a.tar") == ([(cases.jpeg(i), (f"thing {i}",)) for i in range(3)], [])
    texts = [{"a": {"b": ["one", "two"]}}, {"a": [{"b": "three"}, {"b": "four"}]}, {"a": {}}, [1], {"a": {"b": None}}]
    members = [[(f"{i}.jpg", cases.jpeg(i)), (f"{i}.json", json.dumps(text))] for i, text in enumerate(texts)]
    cases.tar(tmp_path / "b.tar", itertools.chain(*members, [("5.jpg", b"x"), ("5.json", "{")]))
    good, bad = read("webdataset", tmp_path / "b.tar", caption_key="json:a:b")
    assert [captions for _, captions in good] == [("one", "two"), ("three", "four")]
    assert len(bad) == 4 and all("a:b in the JSON" in why or "no caption in the JSON" in why for why in bad)


def test_members_apart_are_counted_with_the_cause(tmp_path):
    near = [(f"n{i}.jpg", cases.jpeg(i)) if k == 0 else (f"n{i}.txt", "near") for i in range(5) for k in range(2)]
    far = [(f"f{i}.jpg", b"x") for i in range(3)] + [(f"f{i}.txt", "far") for i in range(3)]
    cases.tar(tmp_path / "a.tar", near + far)
    good, bad = read("webdataset", tmp_path / "a.tar")
    assert (
        len(good) == 5
        and len(bad) == 3
        and all("not adjacent; write the tar again with tar --sort=name" in b for b in bad)
    )


IMAGES = [cases.jpeg(i) for i in range(3)]
TEXTS = [f"thing {i}" for i in range(3)]


def parquet(folder, image, caption):
    pq.write_table(pa.table({"image": image, "caption": caption}), folder / "a.parquet")
    return folder / "a.parquet"


@pytest.mark.parametrize(
    "image",
    [
        pa.array(IMAGES),
        pa.array(IMAGES, pa.large_binary()),
        pa.array(IMAGES, pa.binary_view()),
        pa.array(IMAGES).dictionary_encode(),
        pa.array([{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(IMAGES)]),
        pa.array(
            [{"bytes": None, "path": f"{i}.jpg"} for i in range(3)],
            pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        ),
        pa.array([{"bytes": None if i else image, "path": f"{i}.jpg"} for i, image in enumerate(IMAGES)]),
        pa.array([{"path": f"{i}.jpg"} for i in range(3)]),
        pa.array([f"{i}.jpg" for i in range(3)]),
        pa.array([f"{i}.jpg" for i in range(3)]).dictionary_encode(),
    ],
)
def test_images_in_parquet_as_bytes_or_as_paths(image, tmp_path):
    for i, data in enumerate(IMAGES):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    found = read("parquet", parquet(tmp_path, image, TEXTS))
    assert found == ([(image, (text,)) for image, text in zip(IMAGES, TEXTS, strict=True)], [])


@pytest.mark.parametrize(
    "caption, key",
    [
        (pa.array(TEXTS), None),
        (pa.array(TEXTS, pa.large_string()), None),
        (pa.array(TEXTS, pa.string_view()), None),
        (pa.array(TEXTS).dictionary_encode(), None),
        (pa.array([text.encode() for text in TEXTS]), None),
        (pa.array([[text] for text in TEXTS]), None),
        (pa.array([[None, text, None] for text in TEXTS]), None),
        (pa.array([[text] for text in TEXTS], pa.large_list(pa.large_string())), None),
        (pa.array([{"en": text, "de": "x"} for text in TEXTS]), "caption:en"),
        (pa.array([json.dumps({"en": [text]}) for text in TEXTS]), "caption:en"),
    ],
)
def test_captions_in_parquet(caption, key, tmp_path):
    found = read("parquet", parquet(tmp_path, pa.array(IMAGES), caption), caption_key=key)
    assert found == ([(image, (text,)) for image, text in zip(IMAGES, TEXTS, strict=True)], [])


def test_columns_of_parquet_whose_names_have_a_dot(tmp_path):
    pq.write_table(pa.table({"image.bytes": IMAGES, "meta.caption": TEXTS}), tmp_path / "a.parquet")
    good, bad = read("parquet", tmp_path / "a.parquet", image_key="image.bytes", caption_key="meta.caption")
    assert good == [(image, (text,)) for image, text in zip(IMAGES, TEXTS, strict=True)] and not bad


def test_parquet_without_image_text_or_file_is_a_bad_row(tmp_path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": None, "path": "gone.jpg"}, None, {"bytes": IMAGES[0], "path": None}], struct)
    good, bad = read("parquet", parquet(tmp_path, image, [["a"], ["b"], []]))
    assert good == [] and bad == ["no such file", "empty image", "empty caption"]
    good, _ = read("parquet", parquet(tmp_path, pa.array(IMAGES), [["one", "two"], ["three"], [""]]))
    assert [captions for _, captions in good] == [("one", "two"), ("three",)]
    good, bad = read("parquet", parquet(tmp_path, pa.array(IMAGES), pa.array(["a", None, "a"]).dictionary_encode()))
    assert [captions for _, captions in good] == [("a",), ("a",)] and bad == ["empty caption"]
    none = pa.array([], pa.binary())
    for shuffle in ("rows", "blocks"):
        with pytest.raises(InputError, match=r"a\.parquet has no rows$"):
            read("parquet", parquet(tmp_path, none, none), shuffle=shuffle, window_mb=64)


def test_a_folders_missing_caption_is_called_that(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.JPG").write_bytes(IMAGES[i])
    (tmp_path / "0.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp_path / "1.TXT").write_text("\ufeffone\ntwo", encoding="utf-8")
    good, bad = read("folder", tmp_path)
    assert good == [(IMAGES[1], ("one\ntwo",))]
    assert bad == [
        "the caption is not UTF-8 (see config.data.encoding)",
        "no caption: there is no .txt of the image's name beside it",
    ]
    good, _ = read("folder", tmp_path, encoding="latin-1")
    assert good[0] == (IMAGES[0], ("caf\xe9",))
    assert read("folder", tmp_path, captions_per_line=True)[0] == [(IMAGES[1], ("one", "two"))]


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jpg").write_bytes(IMAGES[0])
    (tmp_path / "a.csv").write_text("image,caption\na.jpg,thing\n")
    assert read("csv", "~/a.csv") == ([(IMAGES[0], ("thing",))], [])


def test_which_folders_and_files_count(tmp_path, monkeypatch):
    names = [
        "10/a.JPEG",
        "9/b.tiff",
        "9/.hidden.png",
        "9/deep/c.webp",
        "__MACOSX/d.png",
        ".git/e.png",
        "@eaDir/f.png",
        "9/g.txt",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert folders.class_folders(str(tmp_path)) == ["9", "10"]
    assert folders.pictures_below(str(tmp_path)) == ["10/a.JPEG", "9/b.tiff", "9/deep/c.webp"]
    assert folders.in_order(["b", "10", "9"]) == ["10", "9", "b"]
    assert folders.pictures_below(str(tmp_path / "gone")) == []
    scandir, denied = os.scandir, str(tmp_path / "9" / "deep")  # root may read everything

    def refuse(path):
        if path == denied:
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="9/deep cannot be read: Permission denied; make it readable, or move it away"):
        folders.pictures_below(str(tmp_path))


def test_a_tar_of_halves_is_refused(tmp_path):
    cases.tar(tmp_path / "a.tar", [("a.jpg", b"x"), ("b.txt", "y")])
    with pytest.raises(InputError, match=r"no sample has both an image \(.*\) and a caption \(.*\) under one name"):
        read("webdataset", tmp_path / "a.tar")


def test_reading_each_row_names_the_first_that_cannot_be_read():
    def read(row):
        require(row != 2, "two is refused")
        return row * row

    found = []
    with pytest.raises(InputError, match="row 2 cannot be read: two is refused"):
        found.extend(read_each(read, 5, "row {}".format, None))
    assert found == [0, 1]


def refused(kind, path, **keys):
    with pytest.raises(InputError) as error:
        read(kind, path, **keys)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("captions", ["\"['a cat', 'a pet']\"", '"[""a cat"", ""a pet""]"'])
def test_lists_that_a_csv_has_as_text_are_no_captions(captions, tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("image,caption\n" + f"a.jpg,{captions}\n" * 3)
    assert f"{path} row 0: the captions are lists written as text" in refused("csv", path)
    path.write_text("image,caption\n" + "a.jpg,[a cat]\nb.jpg,['sic'] a dog\n" + f"c.jpg,{captions}\n")
    assert len(sources.open_source(complete({"data": {"format": "csv"}}).data, str(path), image_side=8).captions()) == 3


@pytest.mark.parametrize("name, kind", [
    ("a.tar", "webdataset"), ("a.parquet", "parquet"), ("a.tfrecord", "tfrecord"), ("a.csv", "csv"), ("a.jsonl", "csv"),
])  # fmt: skip
def test_a_pointer_of_git_lfs_is_named(name, kind, tmp_path):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
    (tmp_path / name).write_text(text)
    said = refused(kind, tmp_path / name)
    assert "is a Git LFS pointer to 123,456 bytes that are not here; run `git lfs pull`" in said


def test_a_folder_without_a_caption_says_what_else_is_there(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    assert refused("folder", tmp_path) == f"{tmp_path}: no image has a caption, a .txt of its name beside it"
    (tmp_path / "metadata.jsonl").write_text("")
    assert refused("folder", tmp_path).endswith(f"; give its table, {tmp_path / 'metadata.jsonl'}")


def test_a_folder_of_arrow_files_says_how_to_save_it_again(tmp_path):
    for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    how = "save its .arrow files as Parquet (in Python data.to_parquet('data.parquet')) and give that"
    assert refused("folder", tmp_path).endswith(how)
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    assert "give its table" not in refused("folder", tmp_path)


def test_an_image_in_base64_is_a_bad_sample_of_few_words(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"image": "/9j/" + "A" * 50_000, "caption": "a"}) + "\n")
    spec = complete({"data": dict(format="csv", train=str(path))}).data
    source = sources.open_source(spec, spec.train, image_side=8)
    (row,) = read_rows(source, range(1))
    assert row.reason == "not a path but perhaps an image in base64, which is not read"
    assert row.detail == f"/9j/{'A' * 36}... (50,004 letters)" and len(source.where(0)) < 300


def test_shards_as_tensorflow_names_them(tmp_path):
    from input_pipeline.sources.paths import expand

    names = [f"a.tfrecord-{i:05}-of-00002" for i in range(2)]
    for name in names:
        (tmp_path / name).touch()
    found = [str(tmp_path / name) for name in names]
    for pattern in (str(tmp_path), f"{tmp_path}/a.tfrecord*"):
        assert expand(pattern, endings=(".tfrecord",)) == found
