"""prepare's shards as tasks: on many workers, killed ones among them, and to buckets; the bytes are the same."""

import csv
import json
import os
import pickle
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from input_pipeline import prepare, shard_tasks, shards, sources
from rankclip_jax.common import storage, tasks
from rankclip_jax.common.errors import InputError
from tests.support.rays import two_workers_of_ray
from tests.support.s3 import served_s3

ROWS, SIZE, BAD = 40, 6, (3, 17, 18, 31)


@pytest.fixture
def data(tmp_path):
    """A csv of ROWS rows in a folder of its own; the pictures of BAD are not there."""
    folder = tmp_path / "data"
    folder.mkdir()
    with open(folder / "data.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "caption"])
        for i in range(ROWS):
            writer.writerow([f"{i}.jpg", f"caption {i}"])
            if i not in BAD:
                picture = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
                Image.fromarray(picture).save(folder / f"{i}.jpg")
    return folder / "data.csv"


def run(monkeypatch, *arguments):
    flags = ("--shard-size", SIZE, "--config.data.max_bad_fraction=0.5")
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, (*arguments, *flags))])
    prepare.main()


def files(folder):
    """What an equal run leaves too: not the index, which has the shards' times."""
    found = (path for path in Path(folder).rglob("*") if path.is_file() and ".rankclip_index" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


LAST = (ROWS - 1) // SIZE


class KillsItsWorker:
    """A shard_tasks.Worker that is killed once, in the middle of the last shard.

    The others are there by then: one worker comes after the killed ones, and not two, which take seconds to start.
    """

    def __init__(self, worker, marker):
        self.worker, self.marker = worker, marker

    def __call__(self, task, threads):
        if task.number == LAST and not os.path.exists(self.marker):
            Path(self.marker).touch()
            where, end = Path(self.worker.where), time.monotonic() + 60
            while len(list(where.glob("*.tfrecord"))) < LAST and time.monotonic() < end:
                time.sleep(0.05)
            shards.part_of(where / shards.name(LAST)).write_bytes(b"half a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.worker(task, threads)


def run_with_a_kill(monkeypatch, marker, *arguments):
    """`run`, in which the worker of the last shard is killed once."""
    with monkeypatch.context() as patched:
        kills = lambda *given: KillsItsWorker(shard_tasks.Worker(*given), str(marker))  # noqa: E731
        patched.setattr(prepare, "Worker", kills)
        run(patched, *arguments)
    assert marker.exists()


def test_half_a_shard_is_written_again(data, tmp_path, monkeypatch):
    for folder in "one", "two":
        run(monkeypatch, data, tmp_path / folder)
    (tmp_path / "two" / shards.name(2)).unlink()
    shards.part_of(tmp_path / "two" / shards.name(2)).write_bytes(b"half a shard")
    run(monkeypatch, data, tmp_path / "two")
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.slow  # above and tests/common/test_tasks.py: each half of it
def test_two_processes_one_of_which_is_killed_write_what_one_does(data, tmp_path, monkeypatch):
    run(monkeypatch, data, tmp_path / "one", "--workers", 1)
    run_with_a_kill(monkeypatch, tmp_path / "killed", data, tmp_path / "two", "--workers", 2)
    assert files(tmp_path / "two") == files(tmp_path / "one")
    lines = (tmp_path / "two/bad_samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == list(BAD)


def test_a_killed_worker_of_ray_changes_nothing(data, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    run(monkeypatch, data, tmp_path / "one")
    with two_workers_of_ray(monkeypatch):
        run_with_a_kill(monkeypatch, tmp_path / "killed", data, tmp_path / "two", "--ray", "--threads", 1)
        assert files(tmp_path / "two") == files(tmp_path / "one")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").glob("*.tfrecord")}
        (tmp_path / "two/00004.tfrecord").unlink()
        run(monkeypatch, data, tmp_path / "two", "--ray", "--threads", 1)
        assert files(tmp_path / "two") == files(tmp_path / "one")
        changed = [path.name for path, when in before.items() if path.stat().st_mtime_ns != when]
        assert changed == ["00004.tfrecord"]
        with pytest.raises(InputError, match="every machine needs the same source"):
            worker = shard_tasks.Worker(_spec(data).to_json(), ROWS + 1, prepare.Options(), str(tmp_path))
            task = shard_tasks.Task(0, range(2), range(2), None)
            list(tasks.run_by_ray(worker, [task], address="", threads=1))


def _spec(data):
    return prepare.configs.complete({"data": {"format": "csv", "train": str(data)}}).data


@pytest.fixture
def here(monkeypatch):
    """--workers are this process, which has imported TensorFlow; the work goes to it as to another."""

    def run(work, all_of, workers, threads):
        return (pickle.loads(pickle.dumps(work))(task, threads) for task in all_of)

    monkeypatch.setattr(tasks, "run", run)


def test_too_many_bad_rows_stop_many_workers(tmp_path, monkeypatch, here):
    (tmp_path / "bad.csv").write_text("image,caption\n" + "gone.jpg,a caption\n" * 130)
    with pytest.raises(SystemExit, match=r"\d+ of \d+ rows are unusable, more than .*gone.jpg: no such file") as stop:
        monkeypatch.setattr(sys, "argv", ["prepare", str(tmp_path / "bad.csv"), str(tmp_path / "out"), "--workers=2"])
        prepare.main()
    assert "\n" not in stop.value.code


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_a_bucket_gets_what_a_folder_gets(kind, data, tmp_path, monkeypatch, request, capsys):
    run(monkeypatch, data, tmp_path / "one")
    capsys.readouterr()
    if kind == "gs":
        folder = request.getfixturevalue("bucket").folder / "out"
        contents = lambda: files(folder)  # noqa: E731
    else:
        client = request.getfixturevalue("s3")

        def contents():
            listed = client.list_objects_v2(Bucket="mine", Prefix="out/")["Contents"]
            return {
                one["Key"][4:]: client.get_object(Bucket="mine", Key=one["Key"])["Body"].read()
                for one in listed
                if ".rankclip_index" not in one["Key"]
            }

    url = f"{kind}://mine/out"
    with monkeypatch.context() as patched, pytest.raises(SystemExit, match="130"):
        write = shards.write_shard
        stop = lambda path, records: _stop() if path.name == "00003.tfrecord" else write(path, records)  # noqa: E731
        patched.setattr(shards, "write_shard", stop)
        run(patched, data, url)
    assert sorted(name for name in contents() if name.endswith("tfrecord")) == [shards.name(i) for i in range(3)]
    assert not json.loads(contents()["manifest.json"])["complete"]
    storage.delete(f"{url}/00001.tfrecord")
    made = []
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_shard", lambda path, records: made.append(path.name) or write(path, records))
        run(patched, data, url)
    assert made == [shards.name(i) for i in (1, 3, 4, 5, 6)]  # what was missing
    assert contents() == files(tmp_path / "one")
    said = capsys.readouterr()
    assert f"36 samples in 7 shards, 0.1 MB: {url}\n" in said.out
    assert f" --config.data.train={url}" in said.out
    assert "00001.tfrecord is missing or differs from manifest.json: written again" in said.err
    source = sources.open_source(prepare.configs.complete({"data": {"format": "tfrecord"}}).data, url, image_side=8)
    assert source.size == 36
    with pytest.raises(SystemExit, match=rf"{url} has shards of other settings \(quality: 95 -> 90\)"):
        run(monkeypatch, data, url, "--quality", 90)


def _stop():
    raise KeyboardInterrupt


@pytest.fixture
def s3(tmp_path, monkeypatch):
    with served_s3(tmp_path, monkeypatch) as client:
        yield client


@pytest.mark.parametrize("workers", ["here", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_bucket_is_written_by_workers_too_also_without_repeated_pictures(
    workers, data, tmp_path, monkeypatch, bucket, request
):
    if workers == "here":
        request.getfixturevalue("here")
    shutil.copy(data.parent / "5.jpg", data.parent / "20.jpg")
    run(monkeypatch, data, tmp_path / "one", "--dedup", "exact")
    run(monkeypatch, data, "gs://mine/out", "--dedup", "exact", "--workers", 2)
    assert files(bucket.folder / "out") == files(tmp_path / "one")
    manifest = json.loads((bucket.folder / "out/manifest.json").read_text())
    assert manifest["left_out"] == {"the same picture came before": 1}
    assert sum(shard["samples"] for shard in manifest["shards"]) == ROWS - len(BAD) - 1
    assert manifest["shards"][20 // SIZE]["left_out"] == {"the same picture came before": 1}
    assert list((bucket.folder / "out/.rankclip_index").iterdir())
    bucket.requests.clear()
    spec = prepare.configs.complete({"data": {"format": "tfrecord"}}).data
    assert sources.open_source(spec, "gs://mine/out", image_side=8).size == 35
    assert not bucket.read_bytes("out/00006")  # the index tells where its rows are; the first rows tell the keys


def test_a_bucket_with_files_of_others_is_refused(data, monkeypatch, bucket):
    (bucket.folder / "out").mkdir()
    (bucket.folder / "out/mine.txt").write_text("mine")
    message = r"gs://mine/out holds files that prepare did not write \(mine.txt \.\.\.\); give a new folder"
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, data, "gs://mine/out")
    with pytest.raises(SystemExit, match="nothing can be written to an http address"):
        run(monkeypatch, data, "http://mine/out")
    bucket.refused = 403
    with pytest.raises(SystemExit, match="no permission in gs://mine"):
        run(monkeypatch, data, "gs://mine/new")
    assert files(bucket.folder) == {"out/mine.txt": b"mine"}
