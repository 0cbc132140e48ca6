"""Real processes on this machine, with CPU devices and Gloo: they train, evaluate and save as one process does."""

import json
from pathlib import Path

import pytest

from benchmarks import processes as trainings
from input_pipeline import pipeline
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.parallel import processes
from rankclip_jax.train import loop
from tests.commands.test_train import NO_EVALUATION, TRANSFORMER
from tests.support.source_files import samples, write_tfrecord


@pytest.mark.slow
def test_two_processes_train_evaluate_and_save_as_one_does(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(Path(trainings.__file__).parents[1])
    one, two = tmp_path / "one", tmp_path / "two"
    trainings.train(one, 1, 2)
    first, second = trainings.train(two, 2, 2)
    found = trainings.differences(one, two)
    assert found["numbers"] < trainings.RTOL_NUMBERS and found["state"] < trainings.ATOL_STATE
    assert "2 cpu device(s) of 2 processes" in first and "step 6/6" in first
    assert "step" not in second, "only process 0 speaks"
    # This process, with its eight devices, reads what the two have saved.
    loop.train(configs.load("configs/shapes.py", [flag.removeprefix("--config.") for flag in trainings.SMALL[1:]]), two)
    assert "is trained to its last step, 6" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_agree_on_what_does_not_fit(tmp_path):
    # Seven rows of 24 tokens for a device's 16 captions: some batches need eight, of one device or both.
    flags = ["--config.model.pack_text=on", "--config.model.pack_rows=(7,16)", *TRANSFORMER]
    flags += [*NO_EVALUATION, "--config.loss.objective=clip"]
    one, two = tmp_path / "one", tmp_path / "two"
    trainings.train(one, 1, 2, *flags)
    trainings.train(two, 2, 2, *flags)
    found = trainings.differences(one, two)  # of positions, too
    assert found["numbers"] < trainings.RTOL_NUMBERS and found["state"] < trainings.ATOL_STATE
    padded = [row["padded_steps"] for row in map(json.loads, open(two / "metrics.jsonl")) if "padded_steps" in row]
    assert set(padded) == {0, 1}


@pytest.mark.slow
def test_two_processes_index_the_shards_together(tmp_path):
    runs = []
    for count in (1, 2):
        data, run = tmp_path / f"data{count}", tmp_path / f"run{count}"
        data.mkdir()
        flags = ["--config.data.format=tfrecord", f"--config.data.train={write_tfrecord(data, samples(192))}"]
        trainings.train(run, count, 2, *flags, *TRANSFORMER, *NO_EVALUATION, "--config.loss.objective=clip")
        runs.append(run)
        # One shard each: beside the shards, and in the workdir for the other process.
        assert len(list((data / ".rankclip_index").glob("*.index"))) == count
        assert len(list((run / ".rankclip_index").glob("*.index"))) == (2 if count > 1 else 0)
    found = trainings.differences(*runs)
    assert found["numbers"] < trainings.RTOL_NUMBERS and found["state"] < trainings.ATOL_STATE


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
