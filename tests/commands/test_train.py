"""The command line as a user has it: in processes of its own, on one CPU device, with a small run on shapes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.quick_compile import XLA_FLAGS
from rankclip_jax import config as configs
from rankclip_jax import evaluation
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.metrics_file import OF_THE_MACHINE
from rankclip_jax.evaluation import results_file
from rankclip_jax.train import evaluate, loop
from rankclip_jax.train import workdir as workdirs
from tests.support.made_models import VIT, make_workdir

REPO = Path(__file__).parents[2]
ENV = os.environ | {"XLA_FLAGS": XLA_FLAGS, "JAX_PLATFORMS": "cpu"}
SMALL = [
    "--config=configs/shapes.py",
    "--config.batch_size=32",
    "--config.data.train=192",
    "--config.data.val=32",
    "--config.epochs=3",
    "--config.log_every=1",
    "--config.optim.warmup_steps=2",
    "--config.model.image_size=16",
    "--config.model.vision={'layers':(1,1),'width':8,'stem':'small'}",
    "--config.model.text={'layers':1,'width':32,'heads':2}",
    "--config.checkpoint.every_steps=2",
    "--config.eval.diagnostics=True",
    "--config.eval.every_epochs=1",
    "--config.eval.retrieval={'scenes':{'format':'shapes','path':41}}",
    "--config.eval.geometry={'scenes':{'format':'shapes','path':41}}",
    "--config.eval.every.retrieval=3",
    "--config.eval.every.geometry=3",
    "--config.eval.zero_shot={'seen':{'format':'shapes','path':'seen:224'},'held_out':{'format':'shapes','path':"
    "'held_out:32'}}",
]
# For tests of something else than the model and what it is worth: after SMALL. A transformer compiles faster.
TRANSFORMER = [
    "--config.model.name=ViT-tiny",
    "--config.model.vision={'layers':1,'width':32,'heads':2,'patch_size':8}",
]
NO_EVALUATION = [
    "--config.data.val=None",
    "--config.eval.diagnostics=False",
    "--config.eval.zero_shot={}",
    "--config.eval.retrieval={}",
    "--config.eval.geometry={}",
]


def start(workdir, *flags, env=ENV):
    command = [sys.executable, "-m", "rankclip_jax.train", *SMALL, f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(workdir, *flags, env=ENV):
    process = start(workdir, *flags, env=env)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def numbers(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    code, output = finish(workdir)
    assert code == 0, output
    return workdir, output


@pytest.mark.slow
def test_a_run_leaves_what_the_contract_names(trained):
    workdir, output = trained
    for name in ("metrics.jsonl", "config.json", "tokenizer.json", "checkpoints", "curves.png"):
        assert (workdir / name).exists(), name
    assert list(workdir.glob("events.out.tfevents.*"))
    rows = numbers(workdir)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 19))
    last = [row for row in rows if "loss" in row][-1]
    assert {"clip", "rank_in_modal", "rank_cross_modal", "grad_norm", "logit_scale", "learning_rate"} <= last.keys()
    evaluated = [row for row in rows if "zero_shot/seen/top1" in row]
    assert [row["step"] for row in evaluated] == [6, 12, 18]
    assert {"val/clip", "val/spearman_in_modal", "val/gradient_cosine", "val/modality_gap"} <= evaluated[0].keys()
    assert -1 <= evaluated[0]["val/gradient_cosine"] <= 1
    assert re.search(r"step 18/18 .* images/s .* left", output)


@pytest.mark.slow
def test_evaluation_says_digit_for_digit_what_training_said(trained):
    workdir, _ = trained
    code, output = finish(workdir, "--mode=eval")
    assert code == 0, output
    results = results_file.latest(workdir / "eval.json")
    assert results["step"] == 18
    said = next(row for row in numbers(workdir) if row["step"] == 18 and "zero_shot/seen/top1" in row)
    assert {name: row["n"] for name, row in results["zero_shot"].items()} == {"seen": 224, "held_out": 32}
    numbers_of_eval = evaluation.flat(results)
    assert numbers_of_eval == {key: said[key] for key in numbers_of_eval}
    kinds = {key.split("/")[0] for key in numbers_of_eval}
    assert kinds == {"zero_shot", "retrieval", "geometry"} and results["missing"] == {}
    assert re.search(r"held_out +\d+\.\d\d %", output)


@pytest.mark.slow
def test_eight_devices_evaluate_as_one_does(trained, tmp_path):
    """Those of this process; the run had one."""
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    evaluate.evaluate(evaluate.settings(None, workdir, []), workdir)
    said = next(row for row in numbers(workdir) if row["step"] == 18 and "zero_shot/seen/top1" in row)
    for key, value in evaluation.flat(results_file.latest(workdir / "eval.json")).items():
        exact = key.startswith(("zero_shot/", "retrieval/"))  # hits are counted; geometry adds floats up
        assert value == (said[key] if exact else pytest.approx(said[key], rel=1e-4, abs=1e-5)), key


@pytest.mark.slow
def test_a_workdir_that_cannot_be_written_is_evaluated_into_a_file(trained, tmp_path, monkeypatch):
    workdir = shutil.copytree(trained[0], tmp_path / "run", ignore=shutil.ignore_patterns("eval*"))
    settings = evaluate.settings(None, workdir, ["eval.geometry={}", "eval.retrieval={}"])
    monkeypatch.setattr(os, "access", lambda *_: False)  # for root it never is so
    before = sorted(workdir.rglob("*"))
    with pytest.raises(InputError, match="run cannot be written; give --out FILE for the results"):
        evaluate.evaluate(settings, workdir)
    results = evaluate.evaluate(settings, workdir, tmp_path / "eval.json")
    assert results_file.latest(tmp_path / "eval.json")["zero_shot"] == results["zero_shot"]
    assert sorted(workdir.rglob("*")) == before


@pytest.mark.slow
def test_weights_from_elsewhere_are_evaluated_as_the_workdir_they_came_from(trained, tmp_path):
    from rankclip_jax.weights import formats, pretrained

    read = pretrained.read(trained[0])
    (tmp_path / "export").mkdir()
    formats.write_openai(tmp_path / "export", read.config, read.variables)
    weights, out = next((tmp_path / "export").glob("*.safetensors")), tmp_path / "out"
    given = {"eval.model": weights, "tokenizer.path": trained[0] / "tokenizer.json"}
    evaluate.evaluate(small(**given), out)
    results = results_file.latest(out / "eval.json")
    assert results["model"] == str(weights)
    said = next(row for row in numbers(trained[0]) if row["step"] == 18 and "zero_shot/seen/top1" in row)
    assert results["zero_shot"]["seen"]["top1"] == pytest.approx(said["zero_shot/seen/top1"], abs=2 / 224)
    assert results["geometry"]["scenes"]["alignment"] == pytest.approx(said["geometry/scenes/alignment"], rel=1e-3)
    with pytest.raises(InputError, match="has no tokenizer; give --config.tokenizer.path"):
        evaluate.evaluate(small(**{"eval.model": weights}), out)


def test_the_command_line_prints_one_line_about_wrong_input(tmp_path):
    code, output = finish(tmp_path / "run", "--config.batchsize=3")
    assert code == 1 and "Traceback" not in output
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [
        "error: config.batchsize does not exist; the nearest key is config.batch_size"
    ]


def small(config="configs/shapes.py", **overrides):
    flags = [flag.removeprefix("--config.") for flag in SMALL[1:]]
    return configs.load(str(REPO / config), [*flags, *(f"{key}={value}" for key, value in overrides.items())])


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"optim.warmup_steps": 99}, r"warmup_steps = 99 must be fewer than the run's 18 steps"),
        ({"model.image_size": 15}, r"image_size 15 is not a multiple of the vision tower's stride 2"),
        ({"model.text": {"widht": 3}}, r"did you mean 'width'"),
        ({"model.name": "ViT-B/31"}, r"unknown model 'ViT-B/31'; did you mean 'ViT-B/32'"),
        ({"batch_size": 512}, r"batch_size=512 is more than the 192 training samples"),
        ({"batch_size": 12}, r"batch_size=12 does not divide over 8 devices. Try 8"),
        ({"tokenizer.path": "gone/tokenizer.json"}, r"no file gone/tokenizer.json"),
        ({"data.format": "csv", "data.train": "gone.csv"}, r"no such file: gone.csv \(in .*\); give a csv"),
        ({"mesh": {"data": 3}}, r"takes 3 devices; there are 8"),
        ({"data.train": 0}, r"a number of scenes above 0"),
        ({"sharding": "fsdp"}, r"asks for an axis 'fsdp', which config.mesh lacks"),
    ],
)  # fmt: skip
def test_wrong_input_is_refused_before_anything_is_written(tmp_path, overrides, message):
    with pytest.raises(InputError, match=message):
        loop.train(small(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_cc3m_says_what_it_is_and_how_to_get_it(tmp_path):
    config = configs.load(str(REPO / "configs/cc3m.py"))
    with pytest.raises(InputError, match=r"no such file: data/cc3m/train.csv \(in .*\); CC3M .*img2dataset"):
        loop.train(config, tmp_path)


def test_an_image_size_that_the_patch_does_not_divide(tmp_path):
    config = configs.load(str(REPO / "configs/cc3m.py"), ["model.image_size=225"])
    with pytest.raises(InputError, match=r"image_size 225 is not a multiple of .* patch size 32; try 224"):
        loop.train(config, tmp_path)


def test_a_workdir_of_another_configuration_says_what_differs(tmp_path):
    workdir = make_workdir(tmp_path / "run", VIT, optim=dict(lr=0.002, warmup_steps=1))
    with pytest.raises(InputError, match=r"another configuration \(config.optim.lr: 0.002 -> 0.5\); .*--workdir"):
        loop.train(workdirs.settings(None, workdir, ["optim.lr=0.5"]), workdir)


def test_evaluating_an_empty_workdir_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no trained run"):
        evaluate.evaluate(small(), tmp_path)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, one_device):
    fields = [flag.removeprefix("--config.") for flag in (*SMALL[1:], *TRANSFORMER, *NO_EVALUATION)]
    config = configs.load(str(REPO / "configs/shapes.py"), [*fields, "loss.objective=clip", "optim.lr=1e30"])
    with pytest.raises(InputError, match=r"step \d+: loss .* The last good checkpoint is kept") as stopped:
        loop.train(config, tmp_path / "run")
    step = int(re.match(r"step (\d+)", str(stopped.value))[1])
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert all(s < step for s in saved)
