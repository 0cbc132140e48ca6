"""Real processes on this machine, with CPU devices and Gloo: they train, evaluate and save as one process does."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from benchmarks import processes as trainings
from input_pipeline import pipeline, sources
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.parallel import processes
from rankclip_jax.train import loop
from tests.support.one_device import on_devices
from tests.support.source_files import samples, write_tfrecord


@pytest.mark.slow
def test_two_processes_train_evaluate_and_save_as_one_does(tmp_path, capsys, monkeypatch):
    """One run for all that they do together: they index shards, pack what fits, train, evaluate, save."""
    monkeypatch.chdir(Path(trainings.__file__).parents[1])
    one, two = (write_data(tmp_path / name) for name in ("one", "two"))
    with monkeypatch.context() as patch:  # the one is this process
        on_devices(patch, 2)
        train_here(one)
    capsys.readouterr()
    first, second = trainings.train(two / "run", 2, 2, *flags_of(two))
    found = trainings.differences(one / "run", two / "run")  # of positions, too
    assert found["numbers"] < trainings.RTOL_NUMBERS and found["state"] < trainings.ATOL_STATE
    assert "2 cpu device(s) of 2 processes" in first and "step 6/6" in first
    assert "step" not in second, "only process 0 speaks"
    # Some batches did not fit into their rows on both devices: all processes padded them.
    rows = list(map(json.loads, open(two / "run" / "metrics.jsonl")))
    assert {row["padded_steps"] for row in rows if "padded_steps" in row} == {0, 1}
    evaluated = {key.split("/")[0] for key in rows[-1] if "/" in key}
    assert evaluated == {"val", "zero_shot"} and "val/gradient_cosine" in rows[-1]
    # One shard each, of both sets: beside the shards, and in the workdir for the other process.
    for folder, processes_there, shared in (one, 1, 0), (two, 2, 4):
        for shards in folder, folder / "val":
            assert len(list((shards / ".rankclip_index").glob("*.index"))) == processes_there
        assert len(list((folder / "run" / ".rankclip_index").glob("*.index"))) == shared
    # This process, with its eight devices, reads what the two have saved.
    train_here(two)
    assert "is trained to its last step, 6" in capsys.readouterr().out


def write_data(folder):
    """A folder with pictures in shards and the captions of drawn scenes, 192 to train on and 32 to validate."""
    for place, count in (folder, 192), (folder / "val", 32):
        place.mkdir()
        captions = sources.open_source(ConfigDict({"format": "shapes"}), count, image_side=8).captions()
        write_tfrecord(place, [(image, caption) for (image, _), caption in zip(samples(count), captions, strict=True)])
    return folder


def flags_of(folder):
    # Seven rows of 24 tokens for a device's 16 captions: some batches need eight, of one device or both.
    flags = ["--config.model.pack_text=on", "--config.model.pack_rows=(7,16)", "--config.data.format=tfrecord"]
    flags += ["--config.model.vision={'layers':(1,)}", "--config.eval.zero_shot.held_out.path=held_out:32"]
    shards = "{00000..00001}.tfrecord"
    return [*flags, f"--config.data.train={folder}/{shards}", f"--config.data.val={folder}/val/{shards}"]


def train_here(folder):
    fields = [flag.removeprefix("--config.") for flag in (*trainings.SMALL[1:], *flags_of(folder))]
    loop.train(configs.load("configs/shapes.py", fields), folder / "run")


def test_where_another_number_of_processes_resumes():
    # Of batches of 8: two processes have read 12 samples each, three whole batches of 4.
    assert pipeline.resume_at([12, 12], 8, (1, 2)) == (12, 0)
    assert [pipeline.resume_at([12, 12], 8, (i, 4)) for i in range(4)] == [(6, 0)] * 4
    assert pipeline.resume_at([12, 12], 8, (0, 1)) == (24, 0)
    # One passed over a bad sample, and so is one ahead: the fourth batch is begun already, by one sample.
    assert pipeline.resume_at([13, 12], 8, (0, 2)) == (13, 0)
    assert pipeline.resume_at([13, 12], 8, (0, 1)) == (32, 7)


def test_flags_that_do_not_fit_together_are_refused():
    with pytest.raises(InputError, match="--coordinator, --num_processes and --process_id go together"):
        processes.start("127.0.0.1:1", 2, None)
    with pytest.raises(InputError, match="write HOST:PORT"):
        processes.start("somewhere", 2, 0)


@pytest.mark.parametrize(
    "env, alone",
    [
        ({"SLURM_NTASKS": "1"}, True),
        ({"SLURM_NTASKS": "4"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, False),
    ],
)
def test_what_looks_like_a_cluster_and_is_one_process(env, alone):
    assert processes._alone(env) is alone
