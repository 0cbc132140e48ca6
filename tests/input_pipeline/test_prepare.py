import csv
import hashlib
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from input_pipeline import prepare, rows, shards, sources
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import at_work
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.small_files import small_files

REPO = Path(__file__).parents[2]
GOOD, BAD = 24, {25: "no such file", 26: "an HTML page", 27: "truncated image", 28: "empty caption", 29: "empty image"}


def jpeg(level, size=(40, 30)):
    out = io.BytesIO()
    Image.effect_noise(size, 20 + level).convert("RGB").save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def mixed(tmp_path):
    """A csv of 30 rows: 0 to 23 are good JPEGs, 24 a good PNG with alpha, 25 to 29 bad as BAD says."""
    (tmp_path / "images").mkdir()
    contents = {i: jpeg(i) for i in range(GOOD)} | {26: b"<html>404</html>", 27: jpeg(9)[:-200], 28: jpeg(28), 29: b""}
    png = io.BytesIO()
    Image.new("RGBA", (10, 20), (255, 0, 0, 128)).save(png, "PNG")
    contents[24] = png.getvalue()
    for i, data in contents.items():
        (tmp_path / f"images/{i}").write_bytes(data)
    with open(tmp_path / "data.csv", "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "caption"])
        for i in range(30):
            writer.writerow([f"images/{i}", " " if i == 28 else f"caption {i}, ünïcode 🙂"])
    return tmp_path / "data.csv"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments), "--threads", "3"])
    prepare.main()


def command(*arguments):
    return [sys.executable, "-m", "input_pipeline.prepare", *map(str, arguments)]


def records(folder):
    """Records of all shards in order: feature -> bytes, int, or list of several."""
    found = []
    for path in sorted(Path(folder).glob("*.tfrecord")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            values = {k: list(f.bytes_list.value) or list(f.int64_list.value) for k, f in features.items()}
            found.append({key: value[0] if len(value) == 1 else value for key, value in values.items()})
    return found


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


ALL = ("--config.data.max_bad_fraction=1.0",)


def test_every_good_row_comes_once_with_img2datasets_keys(mixed, tmp_path, monkeypatch, capsys):
    run(monkeypatch, mixed, tmp_path / "out", "--shard-size", 7, *ALL)
    got = records(tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tfrecord"))
    assert names == [f"0000{i}.tfrecord" for i in range(4)]
    assert [record["txt"].decode() for record in got] == [f"caption {i}, ünïcode 🙂" for i in range(25)]
    assert [record["key"].decode() for record in got] == [f"{i // 7:05d}{i % 7}" for i in range(25)]
    for i, record in enumerate(got[:GOOD]):
        data = (mixed.parent / f"images/{i}").read_bytes()
        assert record["jpg"] == data and record["sha256"].decode() == hashlib.sha256(data).hexdigest()
        assert [record[f"{o}{side}"] for o in ("", "original_") for side in ("width", "height")] == [40, 30, 40, 30]
    assert "jpg" not in got[24] and Image.open(io.BytesIO(got[24]["png"])).mode == "RGB"
    assert "25 samples in 4 shards" in capsys.readouterr().out


def test_the_words_to_train_with_can_be_pasted(mixed, tmp_path, monkeypatch, capsys):
    out = tmp_path / "it's [1] {a,b}"
    run(monkeypatch, mixed, out, "--shard-size", 7, *ALL)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("train with: "))
    assert words == ["--config.data.format=tfrecord", f"--config.data.train={out}"]
    data = configs.complete({"data": {"format": "tfrecord"}}).data
    assert sources.open_source(data, str(out), image_side=8).size == 25


def test_bad_rows_are_counted_and_named(mixed, tmp_path, monkeypatch, capsys):
    run(monkeypatch, mixed, tmp_path / "out", "--shard-size", 7, *ALL)
    lines = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    assert {line["row"]: line["reason"] for line in lines} == BAD
    assert all(f"images/{line['row']}" in line["where"] for line in lines)
    written = json.loads((tmp_path / "out/manifest.json").read_text())
    assert written["complete"] and written["samples"] == 25 and written["bad"] == dict(Counter(BAD.values()))
    # The shard of rows 28 and 29 has no sample: no file, but an entry.
    assert [shard["samples"] for shard in written["shards"]] == [7, 7, 7, 4, 0]
    for shard in written["shards"][:4]:
        data = (tmp_path / "out" / shard["name"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    out = capsys.readouterr().out
    assert "5 rows left out" in out and all(reason in out for reason in BAD.values())


def test_what_was_prepared_is_a_source_of_the_same_samples(mixed, tmp_path, monkeypatch):
    run(monkeypatch, mixed, tmp_path / "out", *ALL)
    spec = prepare.configs.complete({"data": {"format": "tfrecord"}}).data
    source = sources.open_source(spec, str(tmp_path / "out/*.tfrecord"), image_side=8)
    got = [row for row in rows.read_rows(source, range(source.size))]
    assert [row.captions for row in got] == [(f"caption {i}, ünïcode 🙂",) for i in range(25)]
    assert [row.image for row in got[:GOOD]] == [(mixed.parent / f"images/{i}").read_bytes() for i in range(GOOD)]


def test_truncated_images_are_recovered_where_asked(mixed, tmp_path, monkeypatch):
    run(monkeypatch, mixed, tmp_path / "out", "--short-side", 15, "--config.data.recover_truncated=True", *ALL)
    reasons = json.loads((tmp_path / "out/manifest.json").read_text())["bad"]
    assert reasons == dict(Counter(reason for row, reason in BAD.items() if row != 27))
    (record,) = [r for r in records(tmp_path / "out") if r["txt"].startswith(b"caption 27")]
    assert Image.open(io.BytesIO(record["jpg"])).size == (20, 15)


def test_short_side_and_quality_reach_the_images(mixed, tmp_path, monkeypatch):
    run(monkeypatch, mixed, tmp_path / "out", "--short-side", 15, "--quality", 50, *ALL)
    got = records(tmp_path / "out")
    assert [(r["width"], r["height"]) for r in got[:GOOD]] == [(20, 15)] * GOOD
    assert all(Image.open(io.BytesIO(r["jpg"])).size == (20, 15) for r in got[:GOOD])
    assert (got[0]["original_width"], got[0]["original_height"]) == (40, 30)
    best = tmp_path / "best"
    run(monkeypatch, mixed, best, "--short-side", 15, "--quality", 95, *ALL)
    assert all(len(a["jpg"]) < len(b["jpg"]) for a, b in zip(got[:GOOD], records(best), strict=False))


def test_tokens_are_those_of_the_tokenizer_and_it_is_kept(mixed, tmp_path, monkeypatch):
    Tokenizer.train([f"caption {i}" for i in range(30)], 300).save(tmp_path / "mine.json")
    options = ("--tokenizer", tmp_path / "mine.json", "--context-length", 12, *ALL)
    run(monkeypatch, mixed, tmp_path / "out", *options)
    got = records(tmp_path / "out")
    expected = Tokenizer.load(str(tmp_path / "mine.json"))([r["txt"].decode() for r in got], 12)
    assert np.array_equal([r["tokens"] for r in got], expected)
    again = Tokenizer.load(str(tmp_path / "out/tokenizer.json"))
    assert np.array_equal(again([r["txt"].decode() for r in got], 12), expected)


def of_captions(captions):
    image = jpeg(3)
    captions = tf.ragged.constant(captions)
    return sources.Source(
        captions.shape[0], lambda row: {"image": tf.constant(image), "caption": captions[row]}, str, lambda: []
    )


def test_several_captions_of_an_image_are_kept_together(tmp_path):
    captions = [["one", "two", "three"], ["four"], ["five", "six"]]
    prepare.prepare(of_captions(captions), tmp_path / "out", prepare.Options(), {}, 2)
    assert [r["txt"] for r in records(tmp_path / "out")] == [[b"one", b"two", b"three"], b"four", [b"five", b"six"]]
    tokenized = prepare.Options(tokenizer=Tokenizer.train(["one two three"], 300))
    with pytest.raises(InputError, match="0 has several captions, .* omit --tokenizer"):
        prepare.prepare(of_captions(captions), tmp_path / "tokens", tokenized, {}, 2)


def test_a_stopped_run_resumes_and_leaves_what_an_unbroken_one_leaves(mixed, tmp_path, monkeypatch):
    arguments = ("--shard-size", 6, *ALL)
    run(monkeypatch, mixed, tmp_path / "whole", *arguments)
    write, calls = shards.write_shard, []

    def torn(path, records):
        calls.append(path.name)
        if len(calls) == 3:  # as a kill leaves it: half a shard under its temporary name, the rest not there
            path.with_name(path.name + ".part").write_bytes(b"half of it")
            raise KeyboardInterrupt
        return write(path, records)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(shards, "write_shard", torn)
        run(patched, mixed, tmp_path / "out", *arguments)
    assert stop.value.code == 130
    assert not json.loads((tmp_path / "out/manifest.json").read_text())["complete"]
    assert [path.name for path in (tmp_path / "out").glob("*.tfrecord")] == ["00000.tfrecord", "00001.tfrecord"]
    kept = os.stat(tmp_path / "out/00000.tfrecord").st_mtime_ns
    # A kill between bad_samples.jsonl and manifest.json, in the middle of a line.
    with open(tmp_path / "out/bad_samples.jsonl", "a") as out:
        out.write(json.dumps({"row": 26, "where": "x", "reason": "y", "detail": ""}) + '\n{"row": 27, "whe')
    run(monkeypatch, mixed, tmp_path / "out", *arguments)
    assert os.stat(tmp_path / "out/00000.tfrecord").st_mtime_ns == kept
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_shard_that_changed_or_is_gone_is_made_again(mixed, tmp_path, monkeypatch, capsys):
    arguments = ("--shard-size", 6, *ALL)
    run(monkeypatch, mixed, tmp_path / "out", *arguments)
    whole = files(tmp_path / "out")
    flipped = bytearray(whole["00001.tfrecord"])
    flipped[1000] ^= 1  # same size
    (tmp_path / "out/00001.tfrecord").write_bytes(flipped)
    (tmp_path / "out/00002.tfrecord").unlink()
    (tmp_path / "out/00003.tfrecord").write_bytes(whole["00003.tfrecord"][:-1])
    run(monkeypatch, mixed, tmp_path / "out", *arguments)
    assert files(tmp_path / "out") == whole
    assert capsys.readouterr().err.count("written again") == 3


def test_too_many_bad_rows_stop_it(tmp_path, monkeypatch):
    (tmp_path / "bad.csv").write_text("image,caption\n" + "gone.jpg,a caption\n" * 120)
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, tmp_path / "bad.csv", tmp_path / "out")
    message = stop.value.code
    assert "rows are unusable, more than config.data.max_bad_fraction = 0.1" in message
    assert "gone.jpg" in message and "no such file" in message and "\n" not in message
    assert not list((tmp_path / "out").glob("*tfrecord*"))
    (tmp_path / "few.csv").write_text("image,caption\n" + "gone.jpg,a caption\n" * 3)
    message = refused(monkeypatch, tmp_path / "few.csv", tmp_path / "few")
    where = f"{tmp_path}/few.csv row 0: {tmp_path}/gone.jpg"
    said = f"none of the 3 rows could be used; for example {where}: no such file"
    assert message == f"error: {said}; {tmp_path}/few/bad_samples.jsonl has the reasons"


def test_a_name_that_is_there_is_no_number_and_no_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("2024").mkdir()
    Path("2024/a.jpg").write_bytes(jpeg(1))
    Path("2024/a.txt").write_text("a cat")
    Path("mine{1}.csv").write_text("image,caption\n2024/a.jpg,a cat\n")
    for number, source in enumerate(("2024", "mine{1}.csv")):
        run(monkeypatch, source, f"out{number}")
        assert [record["txt"] for record in records(Path(f"out{number}"))] == [b"a cat"]


def refused(monkeypatch, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, *arguments)
    assert "\n" not in stop.value.code
    return stop.value.code


def test_a_second_start_in_the_folder_is_refused(mixed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    with at_work(out, "prepare", ""):
        message = refused(monkeypatch, mixed, out, *ALL)
        assert message == f"error: another prepare is at work in {out}; wait for its end, or give another OUT_DIR"
        assert not list(out.iterdir())


def test_what_cannot_be_reached_is_said_or_stops_it(tmp_path, capsys, monkeypatch):
    (tmp_path / "data").mkdir()
    record = shards.example({"jpg": jpeg(1), "txt": "a cat"})
    shards.write_shard(tmp_path / "data/0.tfrecord", [record] * 90)
    shards.write_shard(tmp_path / "data/1.tfrecord", [record] * 10)
    with open(tmp_path / "data/1.tfrecord", "r+b") as torn:
        torn.truncate((len(record) + 16) * 5 + 7)
    run(monkeypatch, tmp_path / "data", tmp_path / "out")
    said = capsys.readouterr()
    assert "95 samples in 1 shards" in said.out
    assert f"lost: about 1 samples of {tmp_path}/data/1.tfrecord: truncated" in said.err
    message = refused(monkeypatch, tmp_path / "data", tmp_path / "new", "--config.data.max_bad_fraction=0.005")
    assert "more lost than config.data.max_bad_fraction = 0.005; about 1 samples of" in message


def test_a_folder_of_other_shards_is_refused(mixed, tmp_path, monkeypatch):
    run(monkeypatch, mixed, tmp_path / "out", *ALL)
    before = files(tmp_path / "out")
    message = refused(monkeypatch, mixed, tmp_path / "out", "--short-side", 15, *ALL)
    assert "other settings (short_side: None -> 15); give another folder" in message
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/00000.tfrecord").write_bytes(b"mine")
    assert "no manifest.json" in refused(monkeypatch, mixed, tmp_path / "foreign", *ALL)
    (tmp_path / "foreign/manifest.json").write_text("[]")
    assert "is not a manifest of prepare" in refused(monkeypatch, mixed, tmp_path / "foreign", *ALL)
    assert files(tmp_path / "out") == before and (tmp_path / "foreign/00000.tfrecord").read_bytes() == b"mine"


def test_a_source_that_has_changed_is_refused(mixed, tmp_path, monkeypatch):
    run(monkeypatch, mixed, tmp_path / "out", *ALL)
    mixed.write_text(mixed.read_text().replace("caption 3", "corrected"))
    (tmp_path / "out/00000.tfrecord").unlink()
    before = files(tmp_path / "out")
    message = refused(monkeypatch, mixed, tmp_path / "out", *ALL)
    assert message == f"error: {tmp_path}/out has shards of other data: SOURCE has changed since; give another folder"
    assert files(tmp_path / "out") == before
    found = json.loads((tmp_path / "out/manifest.json").read_text())
    del found["settings"]["fingerprint"]  # as earlier versions wrote it
    (tmp_path / "out/manifest.json").write_text(json.dumps(found))
    run(monkeypatch, mixed, tmp_path / "out", *ALL)


def test_wrong_input_is_said_in_one_line(mixed, tmp_path, monkeypatch):
    assert "cannot infer the format" in refused(monkeypatch, tmp_path / "data.xyz", tmp_path / "out")
    assert "no such file" in refused(monkeypatch, tmp_path / "gone.csv", tmp_path / "out")
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refused(monkeypatch, mixed, tmp_path / "file/out")
    key = refused(monkeypatch, mixed, tmp_path / "out", "--config.data.imag_key=x")
    assert "config.data.imag_key does not exist; the nearest key is config.data.image_key" in key
    for flags in ("--short-side 0", "--quality 101", "--shard-size -1", "--nothing", "--ray --workers 2"):
        with pytest.raises(SystemExit) as stop:
            run(monkeypatch, mixed, tmp_path / "out", *flags.split())
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, mixed)
    assert stop.value.code == 2


def test_a_full_disk_is_one_clear_line_and_leaves_no_half_shard(tmp_path):
    says = r"^cannot write .*00000.tfrecord: File too large; make room, and start the same command again[^\n]*$"
    with small_files(100_000), pytest.raises(InputError, match=says):
        shards.write_shard(tmp_path / "00000.tfrecord", [b"x" * 1000] * 1000)
    assert not list(tmp_path.iterdir())


# The command, killed when its fourth shard is written and has not got its name.
KILLED = """
import os, signal, sys
def heard(event, args):
    if event == "os.rename" and str(args[1]).endswith("00003.tfrecord"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(heard)
from input_pipeline.prepare import main
main()
"""


@pytest.mark.slow
def test_a_killed_command_resumes_where_it_was(tmp_path, monkeypatch, capsys):
    with open(tmp_path / "many.csv", "w") as out:
        out.write("image,caption\n")
        for i in range(70):
            out.write(f"{i % 50}.jpg,caption {i}\n")
    for i in range(50):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i, (320, 240)))
    arguments = (tmp_path / "many.csv", tmp_path / "out", "--shard-size", 10, "--short-side", 100)
    killed = subprocess.run([sys.executable, "-c", KILLED, *map(str, arguments)], cwd=REPO, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tfrecord")}
    assert len(finished) == 3
    run(monkeypatch, *arguments)
    assert "70 samples in 7 shards" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in finished.items())
    got = records(tmp_path / "out")
    assert [r["txt"].decode() for r in got] == [f"caption {i}" for i in range(70)]
    assert not list((tmp_path / "out").glob("*.part"))
