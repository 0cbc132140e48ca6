"""A workdir in a bucket: trained, cut off, resumed, evaluated and reported there, with the numbers of a local one."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankclip_jax import config as configs
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.train import loop
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.weights import saving
from tests.commands.test_train import NO_EVALUATION, SMALL, TRANSFORMER, numbers
from tests.support.real_clients import real_clients
from tests.support.source_files import samples, write_csv, write_tar

REPO = Path(__file__).parents[2]
OF_TARS = [flag for flag in SMALL if ".data." not in flag and ".eval." not in flag] + [
    *TRANSFORMER,
    *NO_EVALUATION,
    "--config.loss.objective=clip",  # whose step JAX can cache
    "--config.data.format=webdataset",
    "--config.data.shuffle=blocks",
    "--config.data.block_rows=8",
    "--config.batch_size=16",
    "--config.eval.suite=None",
    "--config.checkpoint.keep=50",
]


# Commands of one process, which has its imports once; each one's output ends with a line of its exit code, or error.
# Each waits for a line of the input.
IN_TURN = """
import importlib, json, sys
from rankclip_jax.parallel import processes
processes.start = lambda *flags: None  # only a fresh process may join others
for name, flags in json.loads(sys.argv[1]):
    sys.argv = [name, *flags]
    input()
    try:
        code = importlib.import_module(f"rankclip_jax.{name}").main() or 0
    except SystemExit as stop:
        code = stop.code or 0
    print(f"exit: {code}", flush=True)
"""


def test_a_copy_of_a_workdir_goes_and_comes_back(bucket, capsys):
    with storage.workdir("gs://mine/runs/a/") as folder:
        assert folder.name == "a" and list(folder.glob("[!.]*")) == []
        assert storage.origin(folder) == storage.shown(folder) == "gs://mine/runs/a"
        (folder / "metrics.jsonl").write_text("1\n")
        (folder / "eval").mkdir()
        (folder / "eval" / "x.npz").write_bytes(b"x")
        (folder / "config.json").write_text("{}")
        (folder / ".lock").touch()
        storage.push(folder)
        writes = [name for kind, name, _ in bucket.requests if kind == "write"]
        assert writes == ["runs/a/eval/x.npz", "runs/a/metrics.jsonl", "runs/a/config.json"]
        (folder / "metrics.jsonl").write_text("1\n2\n")
        bucket.requests.clear()
    assert [name for kind, name, _ in bucket.requests if kind == "write"] == ["runs/a/metrics.jsonl"]
    (bucket.folder / "runs/a/checkpoints/1").mkdir(parents=True)
    (bucket.folder / "runs/a/checkpoints/1/large").write_bytes(b"x" * 1000)
    bucket.requests.clear()
    with pytest.raises(InputError, match=r"^gs://mine/runs/a/config.json is wrong$"):
        with storage.workdir("gs://mine/runs/a") as again:
            assert (again / "metrics.jsonl").read_text() == "1\n2\n" and (again / "eval" / "x.npz").exists()
            assert not (again / "checkpoints").exists()
            (again / "bad_samples.jsonl").write_text("what was found before the error")
            raise InputError(f"{again}/config.json is wrong")
    assert (bucket.folder / "runs/a/bad_samples.jsonl").exists()
    assert not [name for kind, name, _ in bucket.requests if kind == "read" and "checkpoints" in name]


def test_a_copy_that_stays_takes_only_its_own_clean_up_back(tmp_path, bucket):
    script = """if True:
        import atexit, os, shutil
        from rankclip_jax.common import storage
        os.mkdir("of_others")
        atexit.register(shutil.rmtree, "of_others")
        with storage.workdir("gs://mine/run") as copy:
            (copy / "metrics.jsonl").write_text("not saved yet")
            print(copy, flush=True)
            input()
            raise ValueError("while training")
    """
    for refused, stays in ((403, True), (None, False)):
        bucket.refused = None
        command = [sys.executable, "-c", script]
        env = os.environ | {"PYTHONPATH": str(REPO)}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        child = subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **pipes)
        copy = Path(child.stdout.readline().strip())
        assert (tmp_path / "of_others").exists() and copy.exists()
        bucket.refused = refused
        said = child.communicate("\n", timeout=60)[1]
        assert (f"not all of {copy} could be copied to the bucket, so it stays: " in said) == stays
        assert (copy / "metrics.jsonl").exists() == copy.parent.exists() == stays
        assert not (tmp_path / "of_others").exists()
        shutil.rmtree(copy.parent, ignore_errors=True)
    assert (bucket.folder / "run/metrics.jsonl").read_text() == "not saved yet"


def test_the_last_training_that_comes_has_a_workdir_in_a_bucket(bucket, capsys):
    config, url = configs.complete({}), "gs://mine/run"
    with pytest.raises(InputError, match=f"^another training began in {url}, and resumes from the last checkpoint; so"):
        with storage.workdir(url) as first, workdirs.claimed(first, config):
            (first / "metrics.jsonl").write_text("of the first\n")
            storage.push(first)
            storage.check_ours(first)
            with storage.workdir(url) as looks:  # --mode=eval, or report: takes nothing
                assert (looks / "metrics.jsonl").read_text() == "of the first\n"
            storage.check_ours(first)
            with storage.workdir(url) as second, workdirs.claimed(second, config):
                (second / "metrics.jsonl").write_text("of the first\nof the second\n")
                storage.push(second)
                (first / "metrics.jsonl").write_text("of the first\nand unsaved\n")
                storage.check_ours(second)
                bucket.requests.clear()
                storage.check_ours(first)
    assert not [name for kind, name, _ in bucket.requests if kind in ("write", "delete")]
    assert (bucket.folder / "run/metrics.jsonl").read_text() == "of the first\nof the second\n"
    kept = Path(re.search(r"not all of (.*) could be copied to the bucket, so it stays", capsys.readouterr().err)[1])
    assert (kept / "metrics.jsonl").read_text() == "of the first\nand unsaved\n"
    shutil.rmtree(kept.parent)
    with storage.workdir(url) as again, workdirs.claimed(again, config):  # of a machine that is gone
        storage.push(again)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_training_that_lost_its_workdir_in_a_bucket_stops_before_it_saves(bucket, capsys, monkeypatch):
    monkeypatch.setattr(saving, "probe", lambda folder: None)  # Orbax's client has no part in this
    saved = []

    class Checkpoints(contextlib.nullcontext):
        def __init__(self, *_):
            super().__init__(self)
            self.steps = 0

        def score(self, *_):
            pass

        def check(self):  # after every step
            self.steps += 1
            if self.steps == 5:
                storage.write("gs://mine/run/.lock", b"somebody else")

        def save(self, step, state, position):
            saved.append(step)

    monkeypatch.setattr(loop, "Checkpoints", Checkpoints)
    monkeypatch.setattr(loop.opening.checkpoint, "restore", lambda *_: None)
    fields = [flag.removeprefix("--config.") for flag in (*SMALL[1:], *TRANSFORMER, *NO_EVALUATION)]
    fields += ["loss.objective=clip", "epochs=1"]  # a program that is kept for the run below
    with pytest.raises(InputError, match="^another training began in gs://mine/run"):
        with storage.workdir("gs://mine/run") as folder:
            loop.train(configs.load("configs/shapes.py", fields), folder)
    assert saved == [2, 4]
    shutil.rmtree(re.search(r"not all of (\S+)/run could", capsys.readouterr().err)[1])


def test_where_no_checkpoints_can_be_saved_is_said_first(tmp_path, bucket, monkeypatch):
    from etils import epath

    with pytest.raises(InputError, match="--workdir=s3://mine/run: Orbax saves no checkpoints there; give gs://"):
        with storage.workdir("s3://mine/run"):
            pass
    with pytest.raises(InputError, match="s3://mine/run: Orbax saves no checkpoints there"):
        saving.probe(epath.Path("s3://mine/run"))
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(InputError, match=r"need the package google-cloud-storage; pip install -e '\.\[gcs\]'"):
        saving.probe(epath.Path("gs://mine/run"))
    monkeypatch.setitem(sys.modules, "google.cloud.storage", object())
    bucket.refused = 403
    with pytest.raises(InputError, match="no permission in gs://mine"):
        saving.probe(epath.Path("gs://mine/run"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot save in"):
        saving.probe(epath.Path(tmp_path / "file" / "checkpoints"))
    saving.probe(epath.Path(tmp_path / "checkpoints"))
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.slow
def test_a_run_in_a_bucket_loses_its_machine_and_has_the_numbers_of_a_local_one(tmp_path):
    folder = tmp_path / "bucket"
    (folder / "tars").mkdir(parents=True)
    write_tar(folder / "tars", samples(96))
    write_csv(folder, samples(24, seed=1))
    with real_clients(folder, tmp_path) as (seen, enter, env):
        env |= dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "compiled"))
        env |= dict(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0", JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0")

        def on_machine(name):
            """With what a machine holds of its own."""
            (tmp_path / name).mkdir()
            env.update(XDG_CACHE_HOME=str(tmp_path / name / "cache"), TMPDIR=str(tmp_path / name))

        def command(*commands):
            return [*enter, sys.executable, "-c", IN_TURN, json.dumps(commands)]

        def in_turn(*commands):
            lines = "\n" * len(commands)
            done = subprocess.run(command(*commands), cwd=REPO, env=env, input=lines, capture_output=True, text=True)
            said = done.stdout.split("exit: ")
            assert done.returncode == 0 and len(said) == len(commands) + 1, done.stdout + done.stderr
            return said

        local = tmp_path / "local"
        on_machine("one")
        train = [*OF_TARS, "--config.data.train=gs://mine/tars/*.tar", "--workdir=gs://mine/run"]
        train_here = [*OF_TARS, f"--config.data.train={folder}/tars/*.tar", f"--workdir={local}"]
        with open(tmp_path / "said", "w") as said:
            first = subprocess.Popen(
                command(("train.__main__", train_here), ("train.__main__", train)),
                cwd=REPO, env=env, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

        def go_on(until):
            first.stdin.write("\n")
            first.stdin.flush()
            for _ in range(6000):
                if first.poll() is not None or until():
                    break
                time.sleep(0.1)
            assert first.poll() is None, f"it ended before it could be cut off: {(tmp_path / 'said').read_text()}"

        go_on(lambda: "exit: " in (tmp_path / "said").read_text())
        assert "exit: 0\n" in (tmp_path / "said").read_text() and not seen.requests
        go_on(lambda: list(folder.glob("run/checkpoints/[468]/commit_success.txt")))
        first.send_signal(signal.SIGKILL)
        first.wait()
        shutil.rmtree(tmp_path / "one")
        on_machine("another")
        runs = "gs://mine/run", str(local)
        own = [{"own": {"format": "csv", "path": f"{place}/data.csv"}} for place in ("gs://mine", folder)]
        said = in_turn(
            ("train.__main__", train),
            ("train.__main__", [*train, "--config.seed=7"]),
            *(
                ("train.__main__", [f"--workdir={workdir}", "--mode=eval", f"--config.eval.geometry={sets}"])
                for workdir, sets in zip(runs, own, strict=True)
            ),
            ("report.__main__", [runs[0], "--out", str(tmp_path / "report.html")]),
            ("convert", [runs[0], str(tmp_path / "exported"), "--to", "openai"]),
        )
        resumed, ended, refused, *fine = said
        assert re.search(r"resuming from step ([4-9]|1\d) of 18 in gs://mine/run", resumed), resumed
        assert "--workdir gs://mine/run --mode=eval" in resumed
        assert numbers(folder / "run") == numbers(local)
        stored = [json.loads((where / "config.json").read_text()) for where in (folder / "run", local)]
        assert stored[0].pop("data") != stored[1].pop("data") and stored[0] == stored[1]
        assert refused.startswith("error: gs://mine/run holds a run with another configuration"), refused
        assert all(text.startswith("0\n") for text in (ended, *fine)), said
        assert all(f"step 18 of {workdir}" in text for workdir, text in zip(runs, said[2:4], strict=True))
        measured = [json.loads((where / "eval.json").read_text())["run"]["18"] for where in (folder / "run", local)]
        assert measured[0]["geometry"]["own"] == measured[1]["geometry"]["own"]
        assert {name.split("/")[1] for kind, name, _ in seen.requests if kind == "write"} >= {"checkpoints"}
        assert (tmp_path / "report.html").stat().st_size > 10_000
        assert list((tmp_path / "exported").glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_checkpoints_elsewhere_tell_whose_they_are_when_the_workdir_is_lost(tmp_path, capsys):
    flags = (*SMALL[1:], *TRANSFORMER, *NO_EVALUATION, "--config.loss.objective=clip", "--config.epochs=1")
    flags += (f"--config.checkpoint.folder={tmp_path / 'kept'}",)

    def train(name, *changes):
        fields = [flag.removeprefix("--config.") for flag in (*flags, *changes)]
        loop.train(configs.load("configs/shapes.py", fields), tmp_path / name)

    train("lost")
    assert {"config.json", "tokenizer.json", "6"} <= {path.name for path in (tmp_path / "kept").iterdir()}
    shutil.rmtree(tmp_path / "kept" / "6")
    with pytest.raises(InputError, match=r"holds a run with another configuration \(config.seed: 0 -> 7\)"):
        train("other", "--config.seed=7")
    train("again")
    assert "resuming from step 4" in capsys.readouterr().out
    assert numbers(tmp_path / "again")[-1] == numbers(tmp_path / "lost")[-1]
