"""eval.json: evaluations add up, by model, step and set."""

import json

import pytest

from rankclip_jax.common.errors import InputError
from rankclip_jax.evaluation import results_file


def test_evaluations_add_up(tmp_path):
    path = tmp_path / "eval.json"
    assert results_file.latest(path) == {}
    results_file.add(path, "run", 8, {"zero_shot": {"a": {"top1": 0.5}}, "missing": {"zero_shot/b": "gone"}})
    results_file.add(path, "run", 8, {"zero_shot": {"b": {"top1": 0.25}}, "missing": {}})
    results_file.add(path, "run", 8, {"retrieval": {"a": {"r1": 0.1}}, "missing": {"zero_shot/a": "gone"}})
    results_file.add(path, "x.pt", 0, {"zero_shot": {"a": {"top1": 1.0}}, "missing": {}})
    expected = {"zero_shot": {"a": {"top1": 0.5}, "b": {"top1": 0.25}}, "retrieval": {"a": {"r1": 0.1}}, "missing": {}}
    assert results_file.read(path) == {
        "run": {"8": expected},
        "x.pt": {"0": {"zero_shot": {"a": {"top1": 1.0}}, "missing": {}}},
    }
    assert results_file.latest(path) == {"model": "run", "step": 8, **expected}
    results_file.add(path, "run", 8, {"zero_shot": {"a": {"top1": 0.75}}, "missing": {}})
    assert results_file.latest(path)["zero_shot"] == {"a": {"top1": 0.75}, "b": {"top1": 0.25}}


def test_the_last_evaluation_counts_and_the_runs_own_before_others(tmp_path):
    path = tmp_path / "eval.json"
    results_file.add(path, "a.pt", 0, {"zero_shot": {}, "missing": {}})
    results_file.add(path, "b.pt", 0, {"zero_shot": {}, "missing": {}})
    results_file.add(path, "a.pt", 0, {"zero_shot": {}, "missing": {}})
    assert results_file.latest(path)["model"] == "a.pt"
    for step in (16, 8):  # the best may be before the newest
        results_file.add(path, "run", step, {"zero_shot": {}, "missing": {}})
    results_file.add(path, "b.pt", 0, {"zero_shot": {}, "missing": {}})
    assert (results_file.latest(path)["model"], results_file.latest(path)["step"]) == ("run", 8)


def test_a_model_in_a_folder_of_this_name_is_not_the_workdirs_own(tmp_path):
    assert [results_file.key(model) for model in (None, "run", "runs/run", "x.pt")] == [
        "run", "./run", "runs/run", "x.pt"
    ]  # fmt: skip


def test_a_file_of_one_evaluation_as_it_was_at_first(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"step": 8, "zero_shot": {"a": {"top1": 0.5}}, "missing": {}}))
    assert results_file.latest(path) == {"model": "run", "step": 8, "zero_shot": {"a": {"top1": 0.5}}, "missing": {}}
    results_file.add(path, "run", 9, {"zero_shot": {}, "missing": {}})
    assert list(results_file.read(path)["run"]) == ["8", "9"]


def test_what_is_damaged_in_a_file_costs_neither_new_results_nor_its_step(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps({"run": {"8": {"zero_shot": [1], "step": "x", "model": 3, "geometry": {"b": {}}}}}))
    assert (results_file.latest(path)["step"], results_file.latest(path)["model"]) == (8, "run")
    results_file.add(path, "run", 8, {"zero_shot": {"a": {"top1": 0.5}}, "missing": {}})
    found = results_file.read(path)["run"]["8"]
    assert found == {"geometry": {"b": {}}, "zero_shot": {"a": {"top1": 0.5}}, "missing": {}}


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"a": 1}', '{"a": {"8": []}}', '{"model_type": "clip"}'])
def test_another_file_is_not_touched(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"results\.json (is not JSON|holds no results of evaluations); move it away"):
        results_file.add(path, "run", 8, {})
    assert path.read_text() == text
