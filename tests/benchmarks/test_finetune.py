"""benchmarks/finetune.py: its lines are the tutorial's, its table has the right numbers, and it runs."""

import csv
import shutil

import numpy as np
import pytest
from PIL import Image

from benchmarks import finetune
from input_pipeline import shapes
from tests.docs.test_docs import REPO, commands
from tests.support.one_device import on_one_device


def test_its_recipes_are_the_lines_of_the_tutorial():
    lines = {}
    for words in commands(REPO / "docs" / "tutorials.md"):
        if words[:2] == ["rankclip", "train"] and "--workdir" in words:
            own = [" ".join(word.split()) for word in words if word.startswith("--config.")]
            lines[words[words.index("--workdir") + 1]] = own
    assert sorted(lines["runs/start"]) == sorted(finetune.START)
    for recipe, flags in finetune.RECIPES.items():
        assert sorted(lines[f"runs/{recipe}"]) == sorted(flags), recipe


def rows():
    for i, recipe in enumerate(finetune.RECIPES):
        for loss in finetune.LOSSES:
            for seed in range(3):
                new = 10.0 * i + seed + (4 + seed if loss == "rankclip" else 0)
                cost = dict(trained=1000 + i, step_ms=5.0 + seed, states_mib=2.0)
                yield dict(recipe=recipe, loss=loss, seed=seed, new=new, kept=50.0 + seed) | cost


def test_the_table_has_means_intervals_and_paired_differences(tmp_path):
    page = "# Before\n\n" + finetune.BEGIN + "old\n" + finetune.END + "\n## After\n"
    (tmp_path / "finetuning.md").write_text(page)
    for _ in range(2):  # a second time replaces the first
        finetune.write(tmp_path, (12.34, 99.0), list(rows()), "About it.")
    text = (tmp_path / "finetuning.md").read_text()
    assert text.startswith("# Before\n") and text.endswith("\n## After\n") and text.count("About it.") == 1
    assert "| the start | | | | | 12.3 | 99.0 |" in text and "old" not in text
    half = 4.303 * 1 / np.sqrt(3)  # Student's t of 2 degrees of freedom; values x, x + 1, x + 2
    assert f"| everything | clip | 1,000 | 6 | 2.00 | 1.0 ± {half:.1f} | 51.0 ± {half:.1f} |" in text
    assert f"| everything | +5.0 ± {half:.1f} | +0.0 ± 0.0 |" in text  # 4, 5 and 6 points
    with (tmp_path / "finetuning.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4 * 2 * 3


@pytest.mark.slow
def test_it_measures(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    rng, classes = np.random.default_rng(0), ["cat", "dog"]
    table = [["image", "caption", "label"]]
    for i in range(16):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(folder / f"{i}.png")
        table.append([f"{i}.png", f"a photo of a {classes[i % 2]}", i % 2])
    for name, columns in (("train", slice(2)), ("val", slice(2)), ("labels", slice(0, 3, 2))):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(row[columns] for row in table)
    (folder / "classes.json").write_text('["cat", "dog"]')
    (folder / "templates.json").write_text('["a photo of a {}"]')
    monkeypatch.setattr(finetune, "RECIPES", {"lora": finetune.RECIPES["lora"]})
    few = ("data.train=256", "data.val=128", "eval.geometry={}", "eval.retrieval={}")
    few += ("model.vision.layers=1", "model.text.layers=1")
    monkeypatch.setattr(finetune, "START", [*finetune.START, *(f"--config.{flag}" for flag in few)])
    monkeypatch.setitem(shapes.SPLITS, "seen", (2, shapes.SEEN[:2]))  # 32 scenes
    on_one_device(monkeypatch)
    monkeypatch.chdir(REPO)
    shutil.copy(REPO / "docs" / "finetuning.md", tmp_path)
    before, found = finetune.measure(folder, tmp_path / "work", steps=2, start_steps=2, seeds=1, rows=8)
    assert 0 <= before[0] <= 100 and [row["loss"] for row in found] == ["clip", "rankclip"]
    # Of rank 8: q, k, v and out of width w have 2 w rows and columns, each of the MLP's two 5 w. And the logit scale.
    trained = 8 * (4 * 2 + 2 * 5) * (96 + 128) + 1
    for row in found:
        assert row["recipe"] == "lora" and row["trained"] == trained
        assert row["states_mib"] == pytest.approx(4 * (449_953 + 2 * trained) / 2**20, abs=1e-4)  # Adam's two moments
    assert all(0 <= row["new"] <= 100 and 0 <= row["kept"] <= 100 and row["step_ms"] > 0 for row in found)
    finetune.write(tmp_path, before, found, "About it.")
    assert "adapters (LoRA) | clip |" in (tmp_path / "finetuning.md").read_text()
