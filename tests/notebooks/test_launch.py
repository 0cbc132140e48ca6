"""Runs are started and watched from a notebook."""

import json

import pytest

from notebooks import launch
from rankclip_jax.common.errors import InputError


@pytest.mark.slow
def test_a_command_gives_its_output_and_its_error(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    assert "report.html" in launch.run("rankclip_jax.report", tmp_path / "run", "--out", tmp_path / "report.html")
    with pytest.raises(InputError, match=r"rankclip_jax.report stopped with code 1: error: no folder nowhere"):
        launch.run("rankclip_jax.report", "nowhere")


def test_a_training_that_fails_says_why(tmp_path):
    training = launch.Training("nowhere.py", tmp_path / "run")
    with pytest.raises(InputError, match=r"run stopped with code 1: error: --config: no file nowhere.py"):
        list(launch.watch(training, seconds=0.1))
    assert training.step() == 0
