"""prepare --min-score and --dedup: which rows stay, what is counted, and what is refused."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from input_pipeline import contact_sheet, filtering
from rankclip_jax.inference import store
from tests.input_pipeline.test_prepare import files, records, refused, run
from tests.support.source_files import samples, write_folder, write_parquet, write_tar, write_tfrecord

SCORES = np.float32([0.31, 0.05, 0.28, -0.2, 0.4, 0.27, 0.9, 0.1])


def scored(path, names, cosines, size=None, rows=None, bad=None):
    """A file as embed writes it; `bad`: of a folder's shard, lines about what it leaves out."""
    rows = np.arange(len(names)) if rows is None else np.array(rows, np.int64)
    size = len(names) if size is None else size
    about = {"data": "x", "image_key": None, "delimiter": ",", "model": "00", "size": size}
    z = np.ones((len(names), 1), np.float32)
    found = store.Embeddings(z, rows, list(names), about, np.asarray(cosines, np.float32))
    store.write(path, [found], about, None, bad)
    return path


@pytest.fixture
def table(tmp_path):
    """data.csv of 8 pairs, and scores.npz of them."""
    (tmp_path / "images").mkdir()
    made = samples(8)
    with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "caption"])
        for i, (image, caption) in enumerate(made):
            (tmp_path / f"images/{i}").write_bytes(image)
            writer.writerow([f"images/{i}", caption])
    scored(tmp_path / "scores.npz", [f"images/{i}" for i in range(8)], SCORES)
    return tmp_path / "data.csv"


def numbers(folder):
    """The rows that were written, from samples' captions."""
    return [int(record["txt"].decode().split()[1][:-1]) for record in records(folder)]


@pytest.mark.parametrize("kind", ["csv", "folder", "webdataset", "tfrecord", "parquet"])
def test_what_has_the_score_stays(table, tmp_path, monkeypatch, capsys, kind):
    source, names = table, [f"images/{i}" for i in range(8)]
    if kind != "csv":
        from rankclip_jax.inference.pictures import open_pictures

        (tmp_path / kind).mkdir()
        write = dict(folder=write_folder, webdataset=write_tar, tfrecord=write_tfrecord, parquet=write_parquet)[kind]
        source = write(tmp_path / kind, samples(8))
        source = f"{source}/*.parquet" if kind == "parquet" else source
        found = open_pictures(str(source))
        names = [found.name(i) for i in range(found.size)]
    ending = "parquet" if kind in ("csv", "tfrecord") else "npz"
    file = scored(tmp_path / f"given.{ending}", names, SCORES)
    out = tmp_path / "out"
    run(monkeypatch, source, out, "--min-score", f"{file}:0.28", "--shard-size", 3)
    assert numbers(out) == [i for i in range(8) if SCORES[i] >= np.float32(0.28)] == [0, 2, 4, 6]
    assert [r["key"].decode() for r in records(out)] == ["000000", "000002", "000011", "000020"]  # as without a filter
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] == 4 and manifest["bad"] == {} and manifest["complete"]
    assert manifest["left_out"] == {"cosine below 0.28": 4}
    assert [shard["left_out"] for shard in manifest["shards"]] == [{"cosine below 0.28": n} for n in (1, 2, 1)]
    said = capsys.readouterr().out
    assert "4 rows left out by --min-score and --dedup:\n         4  cosine below 0.28\n" in said


def test_a_table_whose_rows_embed_counts_otherwise(table, tmp_path, monkeypatch):
    """Embed counts images; a row without a caption, or with too few fields, is not a pair."""
    lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[3:3] = ["images/7\n", "images/6,\n"]  # a bad row for both; an empty caption, which is one's bad row alone
    table.write_text("".join(lines), encoding="utf-8")
    from rankclip_jax.inference.pictures import open_pictures

    found = open_pictures(str(table))
    names = [found.name(i) for i in range(found.size)]
    cosines = [SCORES[int(name[7:])] if found.captions(i) else np.nan for i, name in enumerate(names)]
    scored(tmp_path / "s.npz", names, cosines)
    most = "--config.data.max_bad_fraction=0.5"
    run(monkeypatch, table, tmp_path / "out", "--min-score", f"{tmp_path / 's.npz'}:0.28", most)
    assert numbers(tmp_path / "out") == [0, 2, 4, 6]


def test_good_rows_without_a_score_are_left_out_with_that_reason(table, tmp_path, monkeypatch):
    keep = [0, 1, 2, 3, 5, 6, 7]
    cosines = SCORES[keep].copy()
    cosines[1] = np.nan
    scored(tmp_path / "s.npz", [f"images/{i}" for i in keep], cosines, 8, keep)
    flags = ("--min-score", f"{tmp_path / 's.npz'}:0.1")
    assert "has no score for 2 of the 8 rows" in refused(monkeypatch, table, tmp_path / "out", *flags)
    run(monkeypatch, table, tmp_path / "out", *flags, "--config.data.max_bad_fraction=0.25")
    assert numbers(tmp_path / "out") == [0, 2, 5, 6, 7]
    left_out = json.loads((tmp_path / "out/manifest.json").read_text())["left_out"]
    assert left_out == {"no score in s.npz": 2, "cosine below 0.1": 1}


def test_scores_may_be_a_folder_of_shards(table, tmp_path, monkeypatch):
    (tmp_path / "scores").mkdir()
    for i, (rows, bad) in enumerate((([0, 1, 2, 3], []), ([4, 6, 7], ["5 is broken"]))):
        scored(tmp_path / f"scores/0000{i}.parquet", [f"images/{i}" for i in rows], SCORES[rows], 8, rows, bad)
    flags = ("--config.data.max_bad_fraction=0.5", "--min-score", f"{tmp_path}/scores/:0.28")
    run(monkeypatch, table, tmp_path / "out", *flags)
    assert numbers(tmp_path / "out") == [0, 2, 4, 6]
    (tmp_path / "scores/00000.parquet").unlink()
    assert "scores has 4 of its collection's 8 images: shards" in refused(monkeypatch, table, tmp_path / "new", *flags)
    shutil.rmtree(tmp_path / "scores")
    (tmp_path / "scores").mkdir()
    message = refused(monkeypatch, table, tmp_path / "new", "--min-score", f"{tmp_path}/scores:0.28")
    assert "scores is not a file of rankclip_jax.embed (ValueError: no .parquet is in it)" in message


def test_wrong_scores_end_in_one_line(table, tmp_path, monkeypatch):
    out, names = tmp_path / "out", [f"images/{i}" for i in range(8)]

    def says(file, least="0.28", source=table):
        message = refused(monkeypatch, source, out, "--min-score", f"{file}:{least}")
        assert not out.exists()
        return message

    file = tmp_path / "s.npz"
    assert "no such file" in says(tmp_path / "gone.npz")
    assert "no such file" in says(tmp_path / "gone.parquet")
    assert "leaves nothing: the cosines are at most 0.9, half of them at most 0.275" in says(
        tmp_path / "scores.npz", "0.91"
    )
    scored(file, [f"images/{i}" for i in range(1, 9)], SCORES)
    assert "has scores of another set: images/1 where" in says(file)
    scored(file, names[:7], SCORES[:7])
    assert "has scores of 7 images, but" in says(file)
    scored(file, names, np.full(8, np.nan))
    assert "has no score for 8 of the 8 rows" in says(file)
    for odd in (np.inf, -np.inf, 28.0):
        scored(file, names, np.r_[SCORES[:7], np.float32(odd)])
        assert f"the score of images/7 is {odd:g}, which is not a cosine" in says(file)
    scored(file, names, SCORES, rows=[*range(7), 8])
    assert "columns do not fit together" in says(file)
    scored(file, [*names, names[3]], [*SCORES, 0.9], 8, rows=[*range(8), 3])
    assert "columns do not fit together" in says(file)
    for key in ("row", "name", "about"):
        with np.load(tmp_path / "scores.npz") as whole:
            np.savez(file, **{k: v for k, v in whole.items() if k != key})
        assert "is not a file of rankclip_jax.embed" in says(file)
    with np.load(tmp_path / "scores.npz") as whole:
        np.savez(file, **{k: v for k, v in whole.items() if k != "cosine"})
    assert "has no cosines: its collection has no captions, or it is older" in says(file)
    np.savez(file, **dict.fromkeys(("row", "name", "cosine"), np.zeros(8)), about="[]")
    assert "is not a file of rankclip_jax.embed" in says(file)
    file.write_bytes(b"PK\x03\x04")
    assert "is not a file of rankclip_jax.embed" in says(file)
    pq.write_table(pa.table({"row": [0], "name": ["a"], "cosine": [0.1]}), tmp_path / "s.parquet")
    assert "is not a file of rankclip_jax.embed" in says(tmp_path / "s.parquet")
    assert "copy it to this machine" in says("gs://mine/s.npz")
    shutil.copy(table, tmp_path / "second.csv")
    assert "one table" in says(tmp_path / "scores.npz", source=f"{tmp_path}/{{data,second}}.csv")
    for given in ("s.npz", "s.npz:", ":0.3", "s.npz:a", "s.npz:nan", "s.npz:1.5"):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, table, out, "--min-score", given)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, table, out, "--dedup", "all")
    assert stop.value.code == 2


def encoded(image, **options):
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def photograph(seed, size=(96, 72)):
    """Smooth, as photographs are: noise at 6 x 5 pixels, enlarged."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def repeated(tmp_path):
    """A folder: 0, 1, 2 differ; 3 has the bytes of 0; 4 is 1 smaller and of low quality; 5 is broken; 6 is flat, 7 flat
    of another colour, 8 is 7 as a JPEG; 9 is 2 turned over."""
    pictures = [encoded(photograph(i), format="JPEG", quality=95) for i in range(3)]
    flat = [Image.new("RGB", (30, 20), colour) for colour in ((200, 10, 10), (10, 10, 200))]
    pictures += [pictures[0], encoded(photograph(1).resize((64, 48)), format="JPEG", quality=50), pictures[1][:-200]]
    pictures += [encoded(flat[0], format="PNG"), encoded(flat[1], format="PNG"), encoded(flat[1], format="JPEG")]
    pictures.append(encoded(photograph(2).rotate(180), format="JPEG", quality=95))
    for i, data in enumerate(pictures):
        (tmp_path / f"pictures/{i}.jpg").parent.mkdir(exist_ok=True)
        (tmp_path / f"pictures/{i}.jpg").write_bytes(data)
        (tmp_path / f"pictures/{i}.txt").write_text(f"caption {i}, of {i}")
    return tmp_path / "pictures"


ALL = "--config.data.max_bad_fraction=1.0"


def test_repeated_pictures(repeated, tmp_path, monkeypatch, capsys):
    same, alike = "the same picture came before", "looks like one that came before"
    for how, stay, left_out in (
        ("exact", [0, 1, 2, 4, 6, 7, 8, 9], {same: 1}),
        ("near", [0, 1, 2, 6, 7, 9], {same: 1, alike: 2}),
    ):
        out = tmp_path / how
        run(monkeypatch, repeated, out, "--dedup", how, "--shard-size", 4, ALL)
        assert numbers(out) == stay
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["left_out"] == left_out and manifest["bad"] == {"truncated image": 1}
        assert manifest["settings"]["dedup"] == how
    # Of a low score is out first: a later copy with a good one stays.
    names = [f"{i}.jpg" for i in range(10) if i != 5]
    rows = [int(name[0]) for name in names]
    scored(tmp_path / "s.npz", names, [0.1 if row in (0, 1) else 0.9 for row in rows], 10, rows)
    flags = ("--min-score", f"{tmp_path / 's.npz'}:0.5", "--dedup", "near")
    run(monkeypatch, repeated, tmp_path / "both", *flags, ALL)
    assert numbers(tmp_path / "both") == [2, 3, 4, 6, 7, 9]


def test_a_second_start_does_not_look_again_and_leaves_the_same(repeated, tmp_path, monkeypatch):
    arguments = (repeated, tmp_path / "out", "--dedup", "near", "--shard-size", 4, ALL)
    run(monkeypatch, *arguments)
    whole = files(tmp_path / "out")
    (tmp_path / "out/00000.tfrecord").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(filtering, "look", lambda *_: pytest.fail("looked again"))
        run(patch, *arguments)
    assert files(tmp_path / "out") == whole
    for damage in (b"", b"PK", whole["left_out.npz"][:100]):
        (tmp_path / "out/left_out.npz").write_bytes(damage)
        (tmp_path / "out/00001.tfrecord").unlink()
        run(monkeypatch, *arguments)
        found = files(tmp_path / "out")
        assert {k: v for k, v in found.items() if k != "left_out.npz"} == {
            k: v for k, v in whole.items() if k != "left_out.npz"
        }
    changed = refused(monkeypatch, *arguments[:3], "exact", *arguments[4:])
    assert "other settings (dedup: 'near' -> 'exact'); give another folder" in changed


def test_inspection_counts_and_marks_them(repeated, tmp_path, monkeypatch, capsys):
    seen = []
    draw = contact_sheet.draw
    monkeypatch.setattr(contact_sheet, "draw", lambda *given: (seen.append(given), draw(*given)))
    names = [f"{i}.jpg" for i in range(10) if i != 5]
    rows = [int(name[0]) for name in names]
    scored(tmp_path / "s.npz", names, [0.1 if row == 2 else 0.5 for row in rows], 10, rows)
    flags = ("--inspect", "--dedup", "near", "--min-score", f"{tmp_path / 's.npz'}:0.3", ALL)
    run(monkeypatch, repeated, tmp_path / "look", *flags)
    said = capsys.readouterr().out
    assert "left out by --min-score and --dedup: 4 of 9 good rows" in said
    lines = {line[20:]: line[:10].strip() for line in said.splitlines()}
    assert lines["cosine below 0.3"] == lines["the same picture came before"] == "1"
    assert lines["looks like one that came before"] == "2"
    assert [line.split() for line in said.splitlines() if line.startswith("cosine ")] == [
        ["cosine", "0.1", "0.26", "0.5", "0.5", "0.5", "0.5", "0.5", "0.456"]
    ]
    ((_, _, examples),) = seen
    notes = {caption: note.split("\n")[1:] for _, caption, note in examples}
    assert notes["caption 2, of 2"] == ["cosine 0.100", "left out: cosine below 0.3"]
    assert notes["caption 3, of 3"] == ["cosine 0.500", "left out: the same picture came before"]
    assert notes["caption 9, of 9"] == ["cosine 0.500"]
    with Image.open(tmp_path / "look/contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_the_scores_are_embeds_own(table, tmp_path, monkeypatch):
    """Both commands, on one set."""
    import rankclip_jax
    from rankclip_jax import embed
    from tests.support.made_models import VIT, make_workdir

    model = rankclip_jax.load(make_workdir(tmp_path / "run", VIT))
    monkeypatch.setattr(rankclip_jax, "load", lambda *_, **__: model)
    out = tmp_path / "e.parquet"
    monkeypatch.setattr("sys.argv", ["embed", str(tmp_path / "run"), str(table), "--out", str(out)])
    embed.main()
    pictures = [tmp_path / f"images/{i}" for i in range(8)]
    z_txt = model.encode_text([caption for _, caption in samples(8)])
    cosines = np.sum(model.encode_image(pictures).astype(np.float64) * z_txt, axis=1)
    least = float(np.sort(cosines)[3:5].mean())
    run(monkeypatch, table, tmp_path / "out", "--min-score", f"{out}:{least}")
    assert numbers(tmp_path / "out") == np.flatnonzero(cosines >= least).tolist()
    assert Path(out).exists()
