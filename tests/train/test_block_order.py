"""The order of a run, settled at its first start; and small runs of blocks that are cut off and resumed."""

import contextlib
import functools
import io
import json
import shutil
import types

import jax
import numpy as np
import pytest

from benchmarks import processes as trainings
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.train import loop, opening, resolve
from tests.commands.test_train import NO_EVALUATION, TRANSFORMER, numbers
from tests.input_pipeline.test_block_sources import pictures
from tests.support.source_files import WRITERS

TARS, REMOTE = "data.train=/data/*.tar", "data.train=gs://bucket/*.tar"
PART = {"path": "gs://b/*.tar", "format": "webdataset"}


def settled(*changes, old=None):
    return resolve.order(configs.load("own", list(changes)), old).data.shuffle


@pytest.mark.parametrize(
    "changes, order",
    [
        ([TARS], "rows"),
        ([REMOTE], "blocks"),
        (["data.train=['/data/0.tar','s3://b/1.tar']"], "blocks"),
        (["data.train=gs://b/x.parquet"], "blocks"),
        (["data.train=https://host/x.tfrecord"], "blocks"),
        (["data.train=gs://b/x.csv"], "rows"),
        (["data.train=gs://b/set:train", "data.format=tfds"], "rows"),
        ([REMOTE, "data.shuffle=rows"], "rows"),
        ([TARS, "data.shuffle=blocks"], "blocks"),
        ([f"data.train={dict(a=PART, b=PART | {'format': 'parquet'})}"], "blocks"),
        ([f"data.train={dict(a=PART, b=PART | {'format': 'csv'})}"], "rows"),
        ([f"data.train={dict(a=PART | {'weight': 1.0}, b=PART | {'weight': 2.0})}"], "rows"),
    ],
)
def test_the_order_is_of_blocks_where_shards_are_not_local(changes, order):
    assert settled(*changes) == order


def test_why_rows_of_a_bucket_keep_their_order_is_said(capsys):
    settled(f"data.train={dict(a=PART | {'weight': 1.0}, b=PART | {'weight': 2.0})}")
    assert capsys.readouterr().out == (
        "chosen: data.shuffle=rows: a mixture by weights has no order of blocks, so each row is a request\n"
    )


def test_fewer_blocks_than_processes_have_the_order_of_rows_unless_blocks_are_asked_for(tmp_path, monkeypatch, capsys):
    made = pictures(12)
    (tmp_path / "data").mkdir()
    path = WRITERS["webdataset"](tmp_path / "data", made)
    monkeypatch.setattr(resolve, "storage", types.SimpleNamespace(is_remote=lambda path: True))
    changes = [f"data.train={path!r}", "data.format=webdataset", "data.block_rows=4", "batch_size=8", "epochs=1"]

    def opened(processes, *more):
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        config, data = opening.open_data(configs.load("own", [*changes, *more]))
        return config.data.shuffle, config.data.lanes, data.source.blocks is not None

    assert opened(8) == ("rows", None, False)
    said = "chosen: data.shuffle=rows: the data have 4 blocks, fewer than the 8 processes, so each row is a request"
    assert [line for line in capsys.readouterr().out.splitlines() if "data.shuffle" in line] == [said]
    assert opened(2) == ("blocks", 2, True)
    assert [line for line in capsys.readouterr().out.splitlines() if "data.shuffle" in line] == [
        "chosen: data.shuffle=blocks"
    ]
    with pytest.raises(InputError, match=r"^config\.data\.lanes=8\. Expected at most 4, the number of blocks"):
        opened(8, "data.shuffle=blocks")


@pytest.mark.parametrize(
    "changes, why",
    [
        (["data.train=a.csv"], "config.data.format=csv has no blocks"),
        (["data.train=9", "data.format=shapes"], "config.data.format=shapes has no blocks"),
        ([f"data.train={dict(a=PART | {'weight': 1.0})}"], "a mixture by weights has no order of blocks"),
    ],
)
def test_blocks_of_what_has_none_are_refused(changes, why):
    with pytest.raises(InputError, match=rf"^config\.data\.shuffle=blocks: {why}\. Expected rows, or auto$"):
        settled(*changes, "data.shuffle=blocks")


def test_a_run_keeps_its_order_wherever_its_data_are():
    first = resolve.order(configs.load("own", [REMOTE]))
    stored = json.loads(configs.to_json(first))
    assert settled(TARS, old=configs.completed(stored)) == "blocks"
    for key in ("shuffle", "block_rows", "window_mb", "lanes"):  # of a run before there were blocks
        del stored["data"][key]
    assert settled(REMOTE, old=configs.completed(stored)) == "rows"


def lanes(batch, blocks=10_000, *changes, size=0):
    given = [REMOTE, "data.shuffle=blocks", f"batch_size={batch}", *changes]
    return resolve.lanes(configs.load("own", given), blocks, size)


@pytest.mark.parametrize(
    "batch, blocks, count",
    [(4096, 10_000, 64), (96, 10_000, 32), (7, 10_000, 1), (64, 511, 32), (64, 3, 1), (64, 64, 8)],
)
def test_lanes_are_a_divisor_of_64_and_of_the_batch(batch, blocks, count):
    assert lanes(batch, blocks).data.lanes == count
    assert resolve.lanes(configs.load("own", [TARS, "data.shuffle=rows"]), 0, 0).data.lanes is None


@pytest.mark.parametrize("megabytes, count", [(1, 64), (16, 64), (17, 32), (60, 16), (1000, 1), (2000, 1)])
def test_a_window_has_room_for_a_block_of_each_lane(megabytes, count):
    assert lanes(64, 1000, "data.window_mb=1024", size=1000 * megabytes << 20).data.lanes == count
    assert lanes(64, 1000, "data.lanes=64", size=1000 * megabytes << 20).data.lanes == 64  # if so given


def test_lanes_that_do_not_divide_are_refused(monkeypatch):
    with pytest.raises(InputError, match=r"^config\.data\.lanes=10\. Expected a divisor of config\.batch_size=64$"):
        lanes(64, 10_000, "data.lanes=10")
    with pytest.raises(InputError, match=r"^config\.data\.lanes=64\. Expected at most 10, the number of blocks"):
        lanes(64, 10, "data.lanes=64")
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    assert lanes(64, 4).data.lanes == 4  # a lane for each, though there are few blocks
    with pytest.raises(InputError, match=r"^config\.data\.lanes=4\. Expected at most 3, the number of blocks"):
        lanes(64, 3)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    assert lanes(96).data.lanes == 48 and lanes(96, 100).data.lanes == 12  # divisors of the batch for all three
    with pytest.raises(InputError) as refused:
        lanes(96, 10_000, "data.lanes=32")
    assert str(refused.value) == (
        "config.data.lanes=32 does not divide over 3 processes, each of which reads whole lanes. Start a number that "
        "divides it; or, in a new run, set config.data.lanes=24"
    )


def cut_off(whole, cut, step):
    """A copy of a workdir as it was after this step."""
    shutil.copytree(whole, cut)
    for folder in (cut / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    lines = (cut / "metrics.jsonl").read_text().splitlines(keepends=True)
    (cut / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """run(kind) -> (its flags, the workdir of a run on one device over pictures of which one is bad, what it said)."""

    @functools.cache
    def run(kind):
        folder, made = tmp_path_factory.mktemp(kind), pictures(96, side=24)
        made[5] = (b"no picture", made[5][1])
        (folder / "data").mkdir()
        flags = [f"data.train={WRITERS[kind](folder / 'data', made)}", f"data.format={kind}", "data.shuffle=blocks"]
        flags += ["data.block_rows=4", "data.lanes=8", "batch_size=16", "epochs=2", "checkpoint.every_steps=5"]
        flags += ["checkpoint.keep=50", "loss.objective=clip"]  # sooner compiled
        flags = [*TRANSFORMER, *NO_EVALUATION, *(f"--config.{flag}" for flag in flags)]
        with contextlib.redirect_stdout(io.StringIO()) as said:
            loop.train(config_of(flags), folder / "whole")
        return flags, folder / "whole", said.getvalue()

    return run


def config_of(flags):
    return configs.load(
        "configs/shapes.py", [flag.removeprefix("--config.") for flag in (*trainings.SMALL[1:], *flags)]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_run_that_is_cut_off_has_the_numbers_of_one_that_is_not(kind, whole_runs, tmp_path, capsys):
    flags, whole, said = whole_runs(kind)
    cut = tmp_path / "cut"
    blocks = "14 blocks of up to 7 rows" if kind == "parquet" else "24 blocks of up to 4 rows"
    assert f"{blocks}, in 8 lanes with windows of" in said
    cut_off(whole, cut, 5)
    loop.train(config_of(flags), cut)
    assert "resuming from step 5 of 12" in capsys.readouterr().out
    assert numbers(cut) == numbers(whole) and len(numbers(whole)) >= 12
    positions = [trainings._positions(workdir, 12) for workdir in (whole, cut)]
    assert positions[0] == positions[1] and len(positions[0]) == 8
    stored = json.loads((cut / "config.json").read_text())["data"]
    assert (stored["shuffle"], stored["lanes"]) == ("blocks", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_processes_train_on_blocks_as_one_does(whole_runs, tmp_path):
    flags, one, _ = whole_runs("webdataset")
    two = tmp_path / "two"
    cut_off(one, two, 5)  # two resume what one has saved
    said, _ = trainings.train(two, 2, 2, *flags)
    assert "resuming from step 5 of 12" in said and "of 2 processes" in said
    losses = [[row["loss"] for row in numbers(workdir) if "loss" in row] for workdir in (one, two)]
    np.testing.assert_allclose(*losses, rtol=trainings.RTOL_NUMBERS)
    (_, state), (_, theirs) = (trainings._last_state(workdir) for workdir in (one, two))
    assert len(losses[0]) == 12
    assert max(np.abs(state[name] - theirs[name]).max() for name in state) < trainings.ATOL_STATE
    assert trainings._positions(one, 12) == trainings._positions(two, 12)
