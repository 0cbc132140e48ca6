"""docs/results.md has the tables that docs/study_page.py makes of the studies' runs."""

import importlib.util
import json
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("study_page", DOCS / "study_page.py")
study_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study_page)
AGAIN = "run: python docs/study_page.py, and take its tables into docs/results.md"


@pytest.mark.parametrize("name", study_page.STUDIES)
def test_the_tables_are_those_of_the_runs(name):
    page = (DOCS / "results.md").read_text().splitlines()
    made = study_page.primary(name) + study_page.means(name)
    assert not [line for line in made if line not in page], AGAIN
    runs = study_page.read(name)
    arms = {(run["condition"], run["objective"]) for run in runs}
    assert len(runs) == 16 * len(arms) == 16 * {"study_ranking": 21, "study_cifar10_noise": 10}[name]


def test_the_runs_are_taken_from_a_workdir(tmp_path, monkeypatch):
    run = {"condition": "base", "objective": "clip", "seed": 3, "final": {"zero_shot/cifar10": 0.5, "other": 1}}
    (tmp_path / "results.json").write_text(json.dumps({"runs": [run]}))
    monkeypatch.setattr(study_page, "DOCS", tmp_path)
    study_page.take(str(tmp_path), "mine")
    assert (tmp_path / "mine.csv").read_text() == "condition,objective,seed,zero_shot/cifar10\nbase,clip,3,0.50000\n"
    (run,) = study_page.read("mine")
    assert run["seed"] == 3 and run["final"] == {"zero_shot/cifar10": 0.5}
