"""Runs that are made longer, and what a workdir refuses, by small runs on shapes."""

import json
import math
import os

import pytest
from PIL import Image

from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import Owned
from rankclip_jax.train import loop
from rankclip_jax.train import workdir as workdirs
from tests.commands.test_train import NO_EVALUATION, SMALL, TRANSFORMER, numbers
from tests.support.made_models import VIT, make_workdir

QUICK = [flag.removeprefix("--config.") for flag in (*SMALL[1:], *TRANSFORMER, *NO_EVALUATION)]
QUICK += ["data.train=96", "checkpoint.every_steps=None"]


def quick(*changes):
    return configs.load("configs/shapes.py", [*QUICK, *changes])


@pytest.mark.slow
def test_a_longer_run_is_the_one_it_would_have_been(tmp_path, one_device, compiled_once):
    # What is ramped is a term that calls no host: three times the same program.
    common = ["optim.schedule='constant'", "loss.lambda_in=0.0", "loss.lambda_cross=0.0"]
    common += ["loss.terms={'cyclic_in_modal':{'weight':0.25,'schedule':'ramp'}}"]
    two_epochs, whole = tmp_path / "two_epochs", tmp_path / "whole"
    for epochs in (2, 4):
        loop.train(quick(*common, f"epochs={epochs}"), two_epochs)
    loop.train(quick(*common, "epochs=4", "loss.ramp_epochs=2"), whole)
    rows = [[row for row in numbers(workdir) if "loss" in row] for workdir in (two_epochs, whole)]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == list(range(1, 13))
    assert [row["rank_weight"] for row in rows[0]] == [0.0] * 3 + [2.0] * 9  # 3 (epoch - 1) / (2 - 1), at most 2
    assert [json.loads((w / "config.json").read_text())["epochs"] for w in (two_epochs, whole)] == [4, 4]
    stored = json.loads((two_epochs / "config.json").read_text())
    assert stored["loss"]["ramp_epochs"] == 2
    with pytest.raises(InputError, match="config.loss.ramp_epochs: 2 -> 4"):
        loop.train(quick(*common, "epochs=4", "loss.ramp_epochs=4"), two_epochs)


@pytest.mark.slow
def test_a_finished_cosine_cannot_be_made_longer_and_says_what_can(tmp_path, one_device, compiled_once):
    clip = "loss.objective=clip"  # sooner compiled
    loop.train(quick("epochs=2", clip), tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(InputError, match=f"at step 6 of 6, and for 9 steps .* a new --workdir .*init_from={tmp_path}"):
        loop.train(quick("epochs=3", clip), tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    loop.train(quick("epochs=2", "log_every=7", clip), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["log_every"] == 7


@pytest.mark.parametrize("step, old, new, possible", [
    (13, (18, 13), (24, 19), True),
    (14, (18, 13), (24, 19), False),
    (13, (24, 19), (18, 13), True),  # shorter
    (14, (24, 19), (18, 13), False),
    (18, (18, 13), (18, 13), True),
    (99, (18, math.inf), (24, math.inf), True),
])
def test_lengths(step, old, new, possible, tmp_path):
    if possible:
        return workdirs.check_length(tmp_path, step, old, new)
    with pytest.raises(InputError, match=f"step {step} of {old[0]}, and for {new[0]} .* from step 14 on"):
        workdirs.check_length(tmp_path, step, old, new)


def test_a_run_without_its_configuration_is_not_gone_on_with_under_another(tmp_path):
    workdir = make_workdir(tmp_path / "run", VIT)
    Owned(workdir, "train").claim(["config.json", "tokenizer.json", "metrics.jsonl", "checkpoints"])
    (workdir / "config.json").rename(tmp_path / "config.json")
    for at, changes in ((workdir, []), (tmp_path / "new", [f"checkpoint.folder={str(workdir / 'checkpoints')!r}"])):
        with pytest.raises(InputError, match="run/checkpoints has checkpoints of a run whose .*config.json is missing"):
            workdirs.check_same_run(at, quick("optim.lr=0.5", *changes))
    assert workdirs.check_same_run(tmp_path / "empty", quick()) is None


def test_what_a_run_has_lost_or_damaged_is_named(tmp_path):
    workdir = make_workdir(tmp_path / "run", VIT)
    config = workdirs.stored_config(workdir)
    for damaged in ("{", "3", "[1]"):
        (workdir / "data.json").write_text(damaged)
        with pytest.raises(InputError, match=f"^{workdir / 'data.json'} is damaged .*; bring it back from a copy, or"):
            workdirs.check_same_data(workdir, {"train": {"samples": 3, "fingerprint": "x"}}, lambda _: None)
    (workdir / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="run/tokenizer.json, the tokenizer of the run, is missing; bring it back"):
        workdirs.tokenizer_file(workdir, config)


def csv_of(path, rows):
    for i in range(64):
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (16, 16), (i, 0, 0)).save(path.parent / f"{i}.png")
    path.write_text("image,caption\n" + "".join(f"{i % 64}.png,caption {i}\n" for i in rows))
    return f"data.train={str(path)!r}"


@pytest.mark.slow
def test_data_may_move_and_must_not_change(tmp_path, one_device, compiled_once):
    run, common = tmp_path / "run", ["data.format='csv'", "epochs=1", "optim.warmup_steps=1", "loss.objective=clip"]
    loop.train(quick(*common, csv_of(tmp_path / "here" / "a.csv", range(64))), run)
    moved = csv_of(tmp_path / "there" / "b.csv", range(64))
    loop.train(quick(*common, moved), run)
    assert json.loads((run / "config.json").read_text())["data"]["train"].endswith("there/b.csv")
    csv_of(tmp_path / "there" / "b.csv", range(82))
    with pytest.raises(InputError, match=r"config.data.train has other data .*: 82 samples, and 64 samples then"):
        loop.train(quick(*common, moved), run)
    csv_of(tmp_path / "there" / "b.csv", [*range(63), 99])  # one caption
    with pytest.raises(InputError, match=r"config.data.train has other data .*: 64 samples, and the same number then"):
        loop.train(quick(*common, moved), run)
    (run / "data.json").unlink()  # of a run that is older than this file: the path alone tells
    with pytest.raises(InputError, match=r"config.data.train: .*there/b.csv' -> .*here/a.csv'"):
        loop.train(quick(*common, f"data.train={str(tmp_path / 'here' / 'a.csv')!r}"), run)


def test_a_workdir_whose_name_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"r\?n: its name is not UTF-8; rename it, or go to it by a link"):
        with workdirs.claimed(tmp_path / os.fsdecode(b"r\xfcn"), configs.complete({})):
            raise AssertionError("not reached")
    assert not list(tmp_path.iterdir())
