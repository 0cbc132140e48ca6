"""The command for whoever has a GPU (benchmarks/gpu.py): formulas, time, failures, and a small run on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu, gpu_checks, gpu_report, ranking_loss, train_contenders, train_step
from rankclip_jax.models import attention

REPO = Path(__file__).parents[2]
ABSENT = "tensorflow tensorflow_datasets keras clu PIL tokenizers torch transformers matplotlib pandas allrank rax"


@pytest.fixture
def clock(monkeypatch):
    """time.monotonic(), which only moves when the test says so."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    return Clock


def test_rates_and_ratios_of_a_step():
    facts = {"batch": 256, "device": "H100", "flops": 4e12, "peak": 989}
    found = {
        "clip": {"seconds": [0.03, 0.02, 0.01], "memory": 10},
        "rankclip": {"seconds": [0.05, 0.025, 0.025], "memory": 12},
        "transformers, compiled": {"error": "it died"},
    }
    clip, rankclip = train_step.rows(facts, found)
    assert clip["images_per_second"] == 256 / 0.02 and clip["range"] == [0.01, 0.03] and clip["ratio"] == 1
    assert clip["tflops"] == pytest.approx(4 / 0.02) and clip["mfu"] == pytest.approx(4 / 0.02 / 989)
    assert rankclip["ratio"] == pytest.approx(0.025 / 0.02) and rankclip["memory"] == 12
    assert train_step.rows(facts | {"peak": None}, found)[0]["mfu"] is None
    assert train_step.rows({}, {"transformers, compiled": {"seconds": [1.0], "memory": 1}}) == []
    row = {"model": "ViT-B/32", "batch": 256, "found": found, "numbers": [clip, rankclip]}
    assert gpu_report.training_headline(row).endswith("the time of RankCLIP's step is 1.25 times CLIP.**")
    text = "\n".join(gpu_report.training([row, {"model": "RN50", "batch": 8, "left_out": "no time"}]))
    assert "| clip | 1.28e+04 | 0.02 (0.01 to 0.03) | 1.00 | 200 | 20.2 % | 0.0 |" in text
    assert "Left out: transformers, compiled, it died." in text and "RN50, batch 8: no time." in text
    assert gpu_report.training_headline(row | {"numbers": [rankclip]}) is None


@pytest.mark.slow
def test_scaling_compiles_the_step_for_fake_devices(capsys):
    train_step.scaling("ViT-tiny", [2])
    replicated, fsdp = capsys.readouterr().out.splitlines()[-2:]
    states = [float(line.split("|")[4]) for line in (replicated, fsdp)]
    assert replicated.startswith("| 2 | 32 | replicated |") and states[1] == pytest.approx(states[0] / 2, abs=1)
    assert "all-reduce" in replicated and "all-gather" in fsdp


def test_lines_of_the_loss():
    ours, plain = {"seconds": [1.0, 2.0, 9.0], "mb": 100}, {"seconds": [4.0, 8.0], "mb": 1600}
    small = {"batch": 1024, "turns": [["ours", "plain JAX"]], "found": {"ours": ours, "plain JAX": plain}}
    large = {"batch": 8192, "turns": [["ours"], ["x"]], "found": {"ours": ours, "plain JAX": "needs more than 71 GiB"}}
    lines = list(gpu_report.loss([small, large, {"batch": 16384, "left_out": "no time"}]))
    assert lines[0].strip() == "**B = 1,024: ours takes 0.33 times plain JAX's time and 0.062 times its memory.**"
    assert lines[1] == "| B | ours | plain JAX |\n|---|---|---|"
    assert lines[2] == "| 1,024 | 2 s, 100 MB | 6 s, 1,600 MB |"
    assert lines[3] == "| 8,192 (in turns: ours; then x) | 2 s, 100 MB | needs more than 71 GiB |"
    assert lines[4] == "| 16,384 | no time | |"


def test_who_shares_the_card():
    gib = 2**30
    assert gpu.groups(gpu.LOSSES, 1024, 71 * gib) == [list(gpu.LOSSES)]
    # 16,384: 70 x 2^28 bytes are 17.5 GiB, 160 are 40 and 260 are 65.
    assert gpu.groups(gpu.LOSSES, 16384, 71 * gib) == [["ours", "plain JAX", "plain PyTorch"], ["PyTorch allrank"]]
    assert gpu.groups(gpu.LOSSES, 32768, 71 * gib) == [["ours", "plain JAX"]]
    assert gpu.groups(gpu.LOSSES, 32768, 16 * gib) == [["ours"]]


def test_batches_that_no_longer_fit_in_the_time(clock, monkeypatch):
    asked = []

    def measure(batch, names, rounds, turn, end):
        asked.append((batch, list(names)))
        clock.now += 20 + 6 * (batch / 1024) ** 2
        found = {name: {"seconds": [(batch / 1024) ** 2] * rounds, "mb": 1} for name in names}
        return found | {name: "not installed (why)" for name in names if "PyTorch" in name}

    monkeypatch.setattr(ranking_loss, "measure", measure)
    sizes = gpu.Sizes(batches=(1024, 2048, 4096), rounds=5)
    rows = list(gpu.loss(sizes, 71 * 2**30, clock.now + 150))
    # After 26 s: a call takes 1 s, two contenders have six each, four times as long: 26 + 3 * 6 * 2 = 62 s. After 70 s:
    # 44 + 3 * 6 * 2 * 4 = 188 s.
    assert asked == [(1024, list(gpu.LOSSES)), (2048, ["ours", "plain JAX"])]
    assert rows[2] == {"batch": 4096, "left_out": "no time: it takes about 188 s, and 80 s are left"}
    assert rows[1]["found"]["plain PyTorch"] == "not installed (why)"


def test_models_that_no_longer_fit_in_the_time(clock, monkeypatch):
    def measure(model, contenders, batch, rounds, steps, end):
        clock.now += 30 * len(contenders)
        return {}, {contender: {"error": "it died"} for contender in contenders}

    monkeypatch.setattr(train_step, "measure", measure)
    rows = list(gpu.training(gpu.Sizes(), clock.now + 170))
    assert [row.get("left_out") for row in rows[:2]] == [None, None]
    assert [row["left_out"] for row in rows[2:]] == ["no time: it takes about 60 s, and 20 s are left"] * 2


def report(**sections):
    return {"header": {"device": "cpu"}, "small": True, "sizes": gpu.SMALL._asdict(), "sections": sections}


def test_a_section_that_fails_is_a_line(tmp_path):
    def rows():
        yield {"arrays": 2, "bytes": 8, "different": [], "ok": True}
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS\nand more")

    found, out = report(), str(tmp_path / "out")
    gpu.take("checkpoint", rows(), found, out)
    gpu.take("loss", iter([{"batch": 32, "left_out": "no time"}]), found, out)
    text = (tmp_path / "out.md").read_text()
    assert "2 arrays, 8 bytes: all are equal." in text and "no time" in text
    assert "**This section failed: RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS and more**" in text
    assert json.loads((tmp_path / "out.json").read_text())["sections"] == found["sections"]
    assert gpu.failed(found) == ["checkpoint"]


def test_what_fails_the_command():
    good, bad = {"rows": [{"ok": True}, {"left_out": ""}]}, {"rows": [{"ok": True}, {"ok": False}]}
    assert gpu.failed(report(agreement=good, checkpoint=good, loss={"rows": [], "error": "e"})) == []
    assert gpu.failed(report(agreement=bad, checkpoint=good)) == ["agreement"]
    assert gpu.failed(report(agreement=good, checkpoint=good | {"error": "out of time"})) == ["checkpoint"]
    assert gpu.failed(report(agreement={"rows": []})) == ["agreement"]


def test_differences_and_tolerances():
    expected = [{"loss": 2.0, "grad_norm": 4.0}, {"loss": -1.0, "grad_norm": 4.0}]
    found = [{"loss": 2.0, "grad_norm": 4.5}, {"loss": -1.5, "grad_norm": 4.0}]
    assert gpu_checks.difference(found, expected) == {"loss": 0.5, "grad_norm": 0.125}
    limits = {"loss": 0.5, "grad_norm": 0.125}
    assert gpu_checks.checked("a", "b", lambda: limits, limits)["ok"]
    for nan in (float("nan"), float("inf")):
        error = gpu_checks.difference([{"loss": 1.0}, {"loss": nan}, {"loss": 1.0}], [{"loss": 1.0}] * 3)
        row = gpu_checks.checked("a", "b", lambda error=error: error, {"loss": 0.5})
        assert not row["ok"] and row["errors"] == {"loss": str(nan)}
        assert "FAILED" in "".join(gpu_report.agreement([row]))
    row = gpu_checks.checked("a", "b", lambda: 1 / 0, limits)
    assert not row["ok"] and row["error"] == "ZeroDivisionError: division by zero"
    assert "ZeroDivisionError" in "".join(gpu_report.agreement([row]))


def test_arrays_are_compared_by_their_bits():
    zero = jnp.zeros(2)
    assert gpu_checks.same(zero, jnp.zeros(2)) and gpu_checks.same(zero * jnp.nan, zero * jnp.nan)
    assert not gpu_checks.same(zero, -zero) and not gpu_checks.same(zero, jnp.zeros(2, jnp.int32))
    assert not gpu_checks.same(zero, jax.device_put(zero, jax.devices()[1]))


@pytest.mark.slow
def test_a_wrong_attention_is_beyond_the_tolerance(monkeypatch):
    """A row too many, or no mask: what cuDNN would do if it left out the lengths or the mask that it is given."""
    cpu, right = jax.devices()[0], attention.attend_fused

    def errors(length, causal):
        found = gpu_checks.attention(cpu, length, causal, "xla")
        assert found.keys() == gpu_checks.ATTENTION_TOLERANCE.keys()
        return [found[key] / limit for key, limit in gpu_checks.ATTENTION_TOLERANCE.items()]

    def a_row_too_many(q, k, v, heads, causal, implementation):
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0))) for x in (q, k, v))
        return right(q, k, v, heads, causal, implementation)[:, :-1]

    assert max(errors(9, True) + errors(17, False)) < 0.5
    monkeypatch.setattr(attention, "attend_fused", a_row_too_many)
    assert min(errors(17, False)) > 2
    monkeypatch.setattr(attention, "attend_fused", lambda q, k, v, heads, _, how: right(q, k, v, heads, False, how))
    assert min(errors(9, True)) > 10


def test_who_does_not_answer_is_killed():
    child = train_step.Child("ViT-B/32", "clip", 4, end=time.monotonic())
    assert child.run(1) == {"error": "out of time"}
    child.end()
    contender = ranking_loss.Contender("ours", end=time.monotonic())
    assert contender.state == "out of time"
    contender.close()
    with pytest.raises(RuntimeError, match="out of time"):
        list(gpu.checks("agreement", time.monotonic()))


def test_who_cannot_run_says_why():
    child = train_step.Child("ViT-B", "clip", 4)
    assert child.run(1)["error"].startswith("ValueError: unknown model 'ViT-B'")
    child.end()
    with pytest.raises(RuntimeError, match="KeyError: 'nothing'"):
        list(gpu.checks("nothing"))


@pytest.mark.parametrize("given, expected", [("cuda", "cuda,cpu"), ("cpu", "cpu"), ("cuda,cpu", "cuda,cpu"), ("", "")])
def test_a_cpu_beside_the_gpu(given, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", {"JAX_PLATFORMS": given, "XLA_PYTHON_CLIENT_PREALLOCATE": "true"})
    gpu.set_environment()
    assert os.environ == train_step.ENVIRONMENT | {"JAX_PLATFORMS": expected, "XLA_PYTHON_CLIENT_PREALLOCATE": "true"}


def test_what_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "set_environment", lambda: None)
    monkeypatch.setattr(gpu, "checks", lambda name: iter([{"platform": "cpu", "device": "cpu", "memory": 1}]))
    monkeypatch.setattr(sys, "argv", ["gpu", str(tmp_path / "out")])
    assert gpu.main() == 2 and "JAX finds no GPU, only cpu" in capsys.readouterr().err
    (tmp_path / "out.json").write_text("an hour on a GPU")
    assert gpu.main() == 2 and "is there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def blocked(folder, names):
    """PYTHONPATH for processes that find this repository but none of these packages."""
    for name in names.split():
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is blocked')")
    return os.pathsep.join([str(folder), str(REPO), os.environ.get("PYTHONPATH", "")])


def test_little_is_needed(tmp_path):
    environment = os.environ | {"PYTHONPATH": blocked(tmp_path, ABSENT)}
    modules = "models losses config train.step train.flops weights.checkpoint parallel.mesh".split()
    script = f"import {', '.join(f'rankclip_jax.{name}' for name in modules)}, benchmarks.gpu, benchmarks.gpu_checks"
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    torch = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True)
    assert "torch is blocked" in torch.stderr  # the block works


@pytest.mark.slow
def test_all_of_it_small(tmp_path):
    environment = os.environ | {"PYTHONPATH": blocked(tmp_path, "tensorflow tensorflow_datasets keras clu matplotlib")}
    command = [sys.executable, "-m", "benchmarks.gpu", f"{tmp_path}/made/out.md", "--small", "--minutes=15"]
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "made" / "out.json").read_text())
    sections = {name: section["rows"] for name, section in found["sections"].items()}
    assert not any("error" in section for section in found["sections"].values())
    assert [row["ok"] for row in sections["agreement"][:4]] == [True] * 4 and "left_out" in sections["agreement"][4]
    assert sections["checkpoint"][0]["ok"] and sections["checkpoint"][0]["arrays"] > 100
    has_torch = importlib.util.find_spec("torch") is not None
    for row in sections["loss"]:
        *jax_losses, by_torch = [row["found"][name] for name in gpu.LOSSES[:3]]
        assert [len(found["seconds"]) for found in jax_losses] == [2] * 2
        assert len(by_torch["seconds"]) == 2 if has_torch else by_torch.startswith("not installed")
    (model,) = sections["training"]
    assert [numbers["step"] for numbers in model["numbers"]][:2] == list(train_contenders.OURS)
    assert model["found"].keys() == set(gpu.BESIDE_PYTORCH)  # the last, or why not: it needs a C++ compiler
    text = (tmp_path / "made" / "out.md").read_text()
    assert "A rehearsal" in text and "FAILED" not in text and text.count("the time of RankCLIP's step is") == 1
