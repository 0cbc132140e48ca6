"""Collections to embeddings and back by text: a folder, a csv, shards; interrupted, damaged, searched, drawn."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.pictures import BadImageError
from rankclip_jax.inference import collection, search, store
from rankclip_jax.inference.pictures import open_pictures

REPO = Path(__file__).parents[2]


def names_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))


@pytest.mark.parametrize("ending", store.ENDINGS)
def test_a_folder_to_a_file(run, model, folder, tmp_path, monkeypatch, ending):
    if ending == ".parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(collection, "PART", 4)
    run(folder, "--out", tmp_path / f"e{ending}")
    names = names_below(folder)
    stored = store.read(tmp_path / f"e{ending}")
    assert stored.names == names and stored.rows.tolist() == list(range(11))
    assert stored.z.dtype == np.float32
    np.testing.assert_allclose(stored.z, model.encode_image([folder / name for name in names]), atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"e{ending}", "photos"]  # nothing else is left


@pytest.mark.parametrize("ending", store.ENDINGS)
def test_a_file_to_write_without_out_is_no_query(run, folder, tmp_path, capsys, ending):
    with pytest.raises(SystemExit):
        run(folder, tmp_path / f"e{ending}")
    file = tmp_path / f"e{ending}"
    assert f"error: {file} is read as a QUERY; to write that file give --out {file}" in capsys.readouterr().err


def test_a_csv_with_bad_rows(run, model, folder, tmp_path, capsys):
    names = names_below(folder)
    (folder / "text.png").write_text("no picture")
    rows = [names[0], "gone.png", names[1], "text.png", ""]
    (folder / "data.tsv").write_text("picture\tcaption\n" + "".join(f"{row}\tx\n" for row in rows))
    out = tmp_path / "e.npz"
    run(folder / "data.tsv", "--out", out, "--image-key", "picture")
    stored = store.read(out)
    assert stored.names == names[:2] and stored.rows.tolist() == [0, 2]
    bad = [json.loads(line) for line in (tmp_path / "e.npz.bad_samples.jsonl").read_text().splitlines()]
    assert [(line["row"], line["where"].rpartition("/")[2]) for line in bad] == [
        (None, "data.tsv row 4"),
        (1, "gone.png"),
        (3, "text.png"),
    ]
    assert bad[0]["reason"] == "no image path"
    assert "no such file" in bad[1]["reason"] and "not an image" in bad[2]["reason"]
    assert "3 images were left out" in capsys.readouterr().out


def test_a_stopped_run_resumes(run, model, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collection, "PART", 4)
    out, encode, calls = tmp_path / "e.npz", model.encode_views, []

    def stops(views):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(views)

    monkeypatch.setattr(model, "encode_views", stops)
    with pytest.raises(SystemExit, match="130"):
        run(folder, "--out", out)
    assert not out.exists() and sorted(p.name for p in Path(f"{out}.parts").glob("*.npz")) == ["0.npz", "4.npz"]
    run(folder, "--out", out)
    assert len(calls) == 4  # one part was missing
    assert "resuming from" in capsys.readouterr().out
    expected = model.encode_image([folder / name for name in names_below(folder)])
    np.testing.assert_allclose(store.read(out).z, expected, atol=1e-6)


def test_parts_of_another_run_are_not_mixed_in(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(collection, "_write_part", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit, match="130"):
        run(folder, "--out", tmp_path / "e.npz")
    next(folder.glob("*.png")).unlink()
    with pytest.raises(SystemExit, match=r"parts belongs to another run \(size: 11 -> 10; names: .*\); delete it"):
        run(folder, "--out", tmp_path / "e.npz")


def test_search_finds_the_nearest(run, model, folder, tmp_path, capsys):
    out, png = tmp_path / "e.npz", tmp_path / "m.png"
    run(folder, "--out", out)
    capsys.readouterr()
    run(out, "--search", "a photo of a cat", "two dogs", "--top", "3", "--png", png)
    stored = store.read(out)
    lines = capsys.readouterr().out.splitlines()
    for text, block in (("a photo of a cat", lines[:4]), ("two dogs", lines[4:8])):
        cosines = stored.z.astype(np.float64) @ model.encode_text(text)[0].astype(np.float64)
        order = np.argsort(-cosines)[:3]
        assert block[0] == f'"{text}"'
        for rank, i in enumerate(order):
            assert block[1 + rank].split() == [str(rank + 1), f"{cosines[i]:.4f}", stored.names[i]]
    with Image.open(png) as drawn:
        assert drawn.width > 500 and len(drawn.convert("RGB").getcolors(10**7)) > 1000  # noise pictures are drawn


def test_a_name_is_one_line_of_the_table():
    named = store.Embeddings(np.zeros((1, 0)), np.arange(1), ["a\n\x1b[31mb.png"], {})
    assert search.table("x\ny", named, np.array([0]), np.array([0.5])) == '"x y"\n    1   0.5000  a  [31mb.png'


def test_a_folder_of_embeddings_may_have_a_dot_in_its_name(run, folder, tmp_path):
    run(folder, "--out", f"{tmp_path}/my.photos/")
    assert store.is_store(str(tmp_path / "my.photos")) and store.about_of(str(tmp_path / "my.photos"))["size"] == 11


def test_ties_come_in_the_files_order_and_top_may_exceed():
    same = np.tile(np.float32([[0.6, 0.8]]), (3, 1))
    stored = store.Embeddings(same, np.arange(3), list("abc"), {})
    matches, found, cosines = search.best([stored], np.float32([[1, 0]]), 10)
    assert [matches.names[i] for i in found[0]] == list("abc") and np.allclose(cosines, 0.6)


def test_what_is_wrong_is_one_line(run, model, folder, tmp_path, monkeypatch):
    def refused(message, *arguments):
        with pytest.raises(SystemExit, match=message):
            run(*arguments)

    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("picture,caption\n")
    (tmp_path / "b.csv").write_text("image,caption\n")
    (tmp_path / "c.csv").write_text("image,caption\ngone.png,x\n")
    out = tmp_path / "e.npz"
    refused(r"empty has no images .* and no shards .tar, tfrecord, ", tmp_path / "empty", "--out", out)
    refused(r"^error: no such file: .*gone\.csv$", tmp_path / "gone.csv", "--out", out)
    refused(
        r"a\.csv has no column 'image' or 'file_name'; its columns are: picture, caption",
        tmp_path / "a.csv",
        "--out",
        out,
    )
    refused(r"b\.csv has no rows", tmp_path / "b.csv", "--out", out)
    refused(r"none of the 1 images could be used; for example gone\.png: ", tmp_path / "c.csv", "--out", out)
    refused(r"cannot open photo\.heic\. Expected a folder, a table \(.csv, .csv.gz, .tsv, ", "photo.heic", "--out", out)
    refused(r"unknown extension\. Expected \.npz or \.parquet", folder, "--out", tmp_path / "e.csv")
    refused(r"^error: no such file: .*other\.npz$", tmp_path / "other.npz", "--search", "a")
    (tmp_path / "other.npz").write_bytes(b"PK\x03\x04")
    refused(r"other\.npz is not a file of embeddings", tmp_path / "other.npz", "--search", "a")
    (tmp_path / "other.npz").write_bytes(b"")
    refused(r"other\.npz is not a file of embeddings", tmp_path / "other.npz", "--search", "a")
    right = dict(embedding=np.zeros((1, 2)), row=np.zeros(1, int), name=np.array(["a"]))
    for change, message in (({"embedding": np.zeros(2)}, "do not fit together"), ({}, "of which collection")):
        np.savez(tmp_path / "other.npz", about="{}", **right | change)
        refused(message, tmp_path / "other.npz", "--search", "a")
    fine = tmp_path / "fine.npz"
    run(folder, "--out", fine)
    refused(r"fine\.npz already exists; search it with --search, delete it", folder, "--out", fine)
    refused(r"^error: .*m\.png: No such file or directory$", fine, "--search", "a", "--png", tmp_path / "no" / "m.png")
    refused(r"^error: cannot draw .*m\.xyz: its name must end in .*png", fine, "--search", "a", "--png", "m.xyz")
    own = model.identity()
    for change in ({"model": "00000000"}, {"activation": "gelu"}, {"view": "another"}):
        monkeypatch.setattr(model, "identity", lambda change=change: own | change)
        refused(r"was embedded with another model than .*; embed the collection again", fine, "--search", "a")
    monkeypatch.setattr(model, "identity", lambda: {"model": own["model"]})  # as before there were more
    run(folder, "--out", tmp_path / "old.npz")
    monkeypatch.setattr(model, "identity", lambda: own)
    run(tmp_path / "old.npz", "--search", "a")


@pytest.mark.parametrize("flags", [(), ("--search", "a", "--top", "0"), ("--search", "a", "--top=-1")])
def test_flags_that_ask_for_nothing(run, folder, flags):
    with pytest.raises(SystemExit) as stopped:
        run(folder, *flags)
    assert stopped.value.code == 2


def test_a_collection_that_has_changed_is_not_drawn_with_other_pictures(run, folder, tmp_path):
    out = tmp_path / "e.npz"
    run(folder, "--out", out)
    (folder / "00.png").rename(folder / "zz.png")  # every other picture has another number now
    with pytest.raises(SystemExit, match="the collection has changed since it was embedded"):
        run(out, "--search", "a", "--png", tmp_path / "m.png")


def test_a_damaged_part_is_named(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        run(folder, "--out", tmp_path / "e.npz")
    (tmp_path / "e.npz.parts" / "0.npz").write_bytes(b"PK")
    with pytest.raises(SystemExit, match=r"0\.npz is damaged .*; delete it, and run the same command again"):
        run(folder, "--out", tmp_path / "e.npz")


def test_a_query_may_begin_with_a_tilde(run, folder, capsys):
    run(folder, "--search", "~nobody's dog")
    assert "\"~nobody's dog\"" in capsys.readouterr().out


@pytest.mark.slow
def test_shards_give_what_the_folder_gives(model, workdir, folder, tmp_path):
    """In a process of its own, as it is used: a folder with a tar of the same pictures, one of them damaged."""
    names, shards = names_below(folder), tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "00000.tar", "w") as tar:
        for i, name in enumerate(names):
            content = (folder / name).read_bytes() if i != 5 else b"no picture"
            for ending, data in (("png", content), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{i:05}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    out = tmp_path / "e.npz"
    command = [sys.executable, "-m", "rankclip_jax.embed", workdir, shards, "--out", out]
    env = os.environ | {"XLA_FLAGS": XLA_FLAGS}
    subprocess.run(list(map(str, [*command, "--search", "a cat"])), cwd=REPO, env=env, check=True)
    stored = store.read(out)
    assert stored.rows.tolist() == [i for i in range(11) if i != 5]
    assert "00004" in stored.names[4]
    expected = model.encode_image([folder / name for i, name in enumerate(names) if i != 5])
    np.testing.assert_allclose(stored.z, expected, atol=1e-5)
    with pytest.raises(InputError, match="no"):
        open_pictures(str(tmp_path / "9*.tar"))


def test_the_paths_of_a_table_may_be_below_another_folder(run, folder, tmp_path):
    names, table = names_below(folder), tmp_path / "tables" / "a.csv"
    table.parent.mkdir()
    table.write_text("\n".join(["image", *names, ""]))
    below = os.path.relpath(folder, table.parent)
    run(table, "--image-folder", below, "--out", tmp_path / "e.npz", "--search", "a cat", "--png", tmp_path / "e.png")
    stored = store.read(tmp_path / "e.npz")
    assert stored.names == names and stored.about["image_folder"] == below and (tmp_path / "e.png").exists()
    with pytest.raises(InputError, match="no such file or folder: .*/gone"):
        open_pictures(str(tmp_path / "gone"))


def test_bad_rows_of_a_table_are_listed(run, folder, tmp_path):
    names = names_below(folder)
    lines = [f"{name}|x" if i != 4 else f"{name}|x|y" for i, name in enumerate(names)]
    (folder / "a.csv").write_bytes("\n".join(["image|caf\xe9", *lines, ""]).encode("latin-1"))
    run(folder / "a.csv", "--out", tmp_path / "e.npz", "--encoding", "latin-1")
    assert len(store.read(tmp_path / "e.npz").names) == 10
    (line,) = (tmp_path / "e.npz.bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "row": None,
        "where": f"{folder}/a.csv row 4",
        "reason": "wrong number of fields: 3, and the header has 2; a text with '|' in it needs quotation marks",
    }


def test_one_command_embeds_and_searches_and_a_picture_is_a_query(run, model, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collection, "PART", 4)
    names, png = names_below(folder), tmp_path / "m.png"
    (folder / "broken.png").write_text("no picture")
    query = folder / names[3]
    before = sorted(tmp_path.rglob("*"))
    run(folder, "two dogs", "--top", "2", query, "--search", "a cat", "--png", png)
    said = capsys.readouterr()
    assert "1 images were left out, for example broken.png" in said.err
    z = model.encode_image([folder / name for name in names]).astype(np.float64)
    lines = said.out.splitlines()
    queries = [("a cat", model.encode_text("a cat")), ("two dogs", model.encode_text("two dogs"))]
    for place, (words, embedded) in enumerate([*queries, (str(query), model.encode_image(query))]):
        cosines = z @ embedded[0].astype(np.float64)
        block = lines[3 * place : 3 * place + 3]
        assert block[0] == f'"{words}"'
        assert [line.split()[2] for line in block[1:]] == [names[i] for i in np.argsort(-cosines)[:2]]
    assert lines[7].split()[1:] == ["1.0000", names[3]]  # itself
    assert sorted(tmp_path.rglob("*")) == sorted([*before, png])
    with pytest.raises(SystemExit, match=r"^error: no such picture: nothere.png \(in /"):
        run(folder, "nothere.png")
    run(folder, "what is in photo.png", "--top", "1")


def test_matches_are_drawn_from_the_files_with_captions(run, folder, tmp_path, monkeypatch):
    seen = []
    matches = search.figures.matches
    monkeypatch.setattr(search.figures, "matches", lambda *given: seen.append(given) or matches(*given))
    names = names_below(folder)
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 30:] = 255
    for name in names:
        Image.fromarray(wide).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"the words of {name}")
    table = tmp_path / "t.csv"
    table.write_text("image,caption\n" + "".join(f"photos/{name},row of {name}\n" for name in names[:3]))
    without = tmp_path / "w.csv"
    without.write_text("image\nphotos/00.png\n")
    for data in (folder, table, without):
        run(data, "a cat", "--png", tmp_path / "m.png")
    (_, pictures, notes), (_, _, of_table), (_, _, bare) = seen
    np.testing.assert_array_equal(pictures[0][0], wide)  # not the model's square
    assert all(re.fullmatch(r"-?0\.\d{3}\n(\d\d\.png)\nthe words of (deep/)?\1", note) for note in notes[0])
    assert all("row of" in note for note in of_table[0]) and bare[0][0].count("\n") == 1


def test_pictures_in_a_bucket(bucket):
    images = bucket.folder / "images"
    images.mkdir()
    for i in range(3):
        Image.new("RGB", (8, 8), (9 * i, 0, 0)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"picture {i}")
    (images / "table.csv").write_text("image\n0.png\ngone.png\nftp://mine/2.png\n")
    folder = open_pictures("gs://mine/images")
    assert [folder.name(i) for i in range(folder.size)] == ["0.png", "1.png", "2.png"]
    assert np.asarray(folder.image(2))[0, 0].tolist() == [18, 0, 0] and folder.caption(1) == "picture 1"
    table = open_pictures("gs://mine/images/table.csv")
    with pytest.raises(BadImageError, match="no such file: gs://mine/images/gone.png"):
        table.image(1)
    with pytest.raises(BadImageError, match="ftp:// is not supported"):
        table.image(2)
    bucket.refused = 403  # which makes no picture a bad one
    with pytest.raises(ConnectionError, match="no permission in gs://mine"):
        table.image(0)


@pytest.mark.parametrize("ending", [".npz", ".parquet"])
def test_a_file_name_that_is_not_utf_8_is_escaped(run, folder, tmp_path, capsys, ending):
    try:
        os.rename(os.fsencode(folder / "00.png"), os.fsencode(folder) + b"/a\xff.png")
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    out = tmp_path / f"made{ending}"
    run(folder, "--out", out, "--search", "a text", "--top", 11)
    assert store.read(out).names.count("a\\xff.png") == 1
    assert "a\\xff.png" in capsys.readouterr().out
