"""Collections with captions: of shards and tables, the cosine of each pair, and pictures that have none."""

import contextlib
import dataclasses
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rankclip_jax.inference import collection, store
from rankclip_jax.inference.pictures import open_pictures
from tests.inference.test_embed import names_below


def test_captions_of_shards(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, content in (("0", b"first"), ("1", b"")):
            for ending, data in (("png", picture.getvalue()), ("txt", content)):
                info = tarfile.TarInfo(f"{number}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    pictures = open_pictures(str(tmp_path / "0.tar"))
    assert [pictures.caption(i) for i in range(2)] == ["first", ""]


QUICK = {("parquet", "none"), ("tfrecord", "bad")}  # and of a tar all


@pytest.mark.parametrize(
    "kind, text",
    [
        pytest.param(kind, text, marks=() if kind == "tar" or (kind, text) in QUICK else pytest.mark.slow)
        for kind in ("tar", "parquet", "tfrecord")
        for text in ("none", "cls", "some", "bad")
    ],
)
def test_pictures_of_shards_need_no_captions(kind, text, tmp_path):
    names, out, written = [".jfif", ".jpe", ".jpg"], tmp_path / f"0.{kind}", []
    for i in range(3):
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (80 * i, 0, 0)).save(picture, "JPEG")
        written.append(picture.getvalue())
    texts = {"none": [None] * 3, "cls": [b"1"] * 3, "some": [b"a", None, b""], "bad": [b"a", b"\xff", b"c"]}[text]
    column = "cls" if text == "cls" else "txt"
    if kind == "tar":
        with tarfile.open(out, "w") as tar:
            for i in range(3):
                for ending, data in ((names[i], written[i]), (f".{column}", texts[i])):
                    if data is not None:
                        info = tarfile.TarInfo(f"v1.0 {i}{ending}" if text == "none" else f"{i}{ending}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    elif kind == "parquet":
        (tmp_path / "2.jpg").write_bytes(written[2])  # of which the column has the path alone
        images = [{"bytes": data if i < 2 else None, "path": f"{i}.jpg"} for i, data in enumerate(written)]
        columns = {"image": images} | ({} if text == "none" else {column: texts})
        pq.write_table(pa.table(columns), out)
    else:
        tf = pytest.importorskip("tensorflow")
        bytes_of = lambda value: tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))  # noqa: E731
        with tf.io.TFRecordWriter(str(out)) as writer:
            for image, caption in zip(written, texts, strict=True):
                feature = {"jpg": bytes_of(image)} | ({} if caption is None else {column: bytes_of(caption)})
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    pictures = open_pictures(str(out))
    assert [np.asarray(pictures.image(i))[0, 0, 0] // 50 for i in range(pictures.size)] == [0, 1, 3]
    expected = {"some": ["a", "", ""], "bad": ["a", "", "c"]}.get(text, [""] * 3)
    assert [pictures.caption(i) for i in range(3)] == expected and pictures.lost == ()


@pytest.mark.parametrize("ending", store.ENDINGS)
def test_captioned_collections_get_the_cosine_of_each_pair(run, model, folder, tmp_path, monkeypatch, ending):
    monkeypatch.setattr(collection, "PART", 4)
    names = names_below(folder)
    texts = [["a cat", "two dogs on a beach", " "], ["the small blue star"], *(["a red circle"] for _ in names[2:])]
    lines = [json.dumps({"image": name, "caption": some}) for name, some in zip(names, texts, strict=True)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    run(folder / "data.jsonl", "--out", tmp_path / f"e{ending}")
    z_img = model.encode_image([folder / name for name in names]).astype(np.float64)
    z_txt = [model.encode_text([text for text in some if text.strip()]).astype(np.float64) for some in texts]
    expected = [np.mean([z @ one for one in some]) for z, some in zip(z_img, z_txt, strict=True)]
    found = tmp_path / f"e{ending}"
    with np.load(found) if ending == ".npz" else contextlib.nullcontext(pq.read_table(found)) as columns:
        cosines = np.asarray(columns["cosine"])
    assert cosines.dtype == np.float32
    np.testing.assert_allclose(cosines, expected, atol=1e-6)
    assert store.read(found).names == names  # read as before


def test_pairs_without_a_caption_have_none_and_collections_without_no_column(
    run, model, folder, tmp_path, monkeypatch, capsys
):
    names = names_below(folder)
    run(folder, "--out", tmp_path / "bare.npz")
    (folder / f"{names[2][:-4]}.txt").write_text("a photo of a cat\n")
    (folder / f"{names[3][:-4]}.txt").write_text(" \n")
    run(folder, "--out", tmp_path / "one.npz")
    with np.load(tmp_path / "bare.npz") as bare, np.load(tmp_path / "one.npz") as one:
        assert "cosine" not in bare
        assert np.flatnonzero(np.isfinite(one["cosine"])).tolist() == [2]
        cosine = model.encode_text("a photo of a cat")[0].astype(np.float64) @ model.encode_image(folder / names[2])[0]
        np.testing.assert_allclose(one["cosine"][2], cosine, atol=1e-6)
    capsys.readouterr()
    monkeypatch.setattr(model, "source", dataclasses.replace(model.source, tokenizer=None))
    run(folder, "--out", tmp_path / "no.npz")
    assert "no cosines with the captions: " in capsys.readouterr().err
    with np.load(tmp_path / "no.npz") as no:
        assert "cosine" not in no


def test_what_is_written_otherwise_is_not_mixed(run, model, folder, tmp_path, monkeypatch):
    def starts(name):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            patch.setattr(store, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            run(folder, "--out", tmp_path / name)

    def resumes(name, message, **changed):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=f"belongs to another run {message}"):
            patch.setattr(model, "source", dataclasses.replace(model.source, **changed))
            run(folder, "--out", tmp_path / name)

    starts("bare.npz")
    (folder / "00.txt").write_text("a cat")
    resumes("bare.npz", r"\(cosines: None -> True\)")
    starts("scored.npz")
    resumes("scored.npz", r"\(cosines: True -> None\)", tokenizer=None)
    gelu = dataclasses.replace(model.source.config, activation="gelu_tanh")
    resumes("scored.npz", r"\(activation: 'quick_gelu' -> 'gelu_tanh'\)", config=gelu)  # the same weights


def test_captions_that_have_changed_are_not_mixed(run, folder, tmp_path):
    (folder / "data.csv").write_text("image,caption\n" + "".join(f"{name},a cat\n" for name in names_below(folder)))
    run(folder / "data.csv", "--out", tmp_path / "scored")
    run(folder / "data.csv", "--out", tmp_path / "scored")  # nothing is left to do
    (folder / "data.csv").write_text((folder / "data.csv").read_text().replace("cat", "dog", 1))
    with pytest.raises(SystemExit, match=r"scored belongs to another run \(captions: '\w{8}' -> '\w{8}'\); delete it"):
        run(folder / "data.csv", "--out", tmp_path / "scored")
    about = json.loads((tmp_path / "scored/_about.json").read_text())
    del about["captions"]  # as earlier versions wrote it
    (tmp_path / "scored/_about.json").write_text(json.dumps(about))
    run(folder / "data.csv", "--out", tmp_path / "scored")


def test_the_column_of_captions_may_have_another_name(run, model, folder, tmp_path):
    names = names_below(folder)
    (folder / "data.csv").write_text("image,alt\n" + "".join(f"{name},a cat\n" for name in names))
    run(folder / "data.csv", "--out", tmp_path / "e.npz", "--caption-key", "alt")
    with np.load(tmp_path / "e.npz") as found:
        assert np.isfinite(found["cosine"]).all()
    with pytest.raises(SystemExit, match="has no column 'title'"):
        run(folder / "data.csv", "--out", tmp_path / "f.npz", "--caption-key", "title")
