"""The doctor finds what is planted, and names the remedy."""

import os
import subprocess
import sys
from collections import namedtuple

import jax
import pytest

from rankclip_jax import doctor


def only(findings, what):
    return next(finding for finding in findings if finding.what == what)


def test_missing_and_outdated_packages(monkeypatch):
    real = doctor.importlib.metadata.version

    def version(name):
        if name == "tensorboard":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return "0.9.1" if name == "jax" else real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found = list(doctor.packages(["jax>=0.10.2,<0.12", "tensorboard>=2.21", "numpy>=1", "none; python_version < '3'"]))
    assert only(found, "jax").found == "0.9.1" and "pip install 'jax<0.12,>=0.10.2'" in only(found, "jax").remedy
    assert only(found, "tensorboard") == ("tensorboard", "not installed", "pip install 'tensorboard>=2.21'")
    assert only(found, "numpy").remedy is None and len(found) == 3


def test_an_overlooked_gpu_is_named(monkeypatch):
    monkeypatch.setattr(doctor.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    monkeypatch.setattr(doctor, "_small_step", lambda where: (2.0, 1.0, 0.1))
    assert "jax[cuda13]" in only(doctor.devices(), "devices").remedy
    monkeypatch.setattr(doctor, "_small_step", lambda where: (float("nan"), 1.0, 0.1))
    assert only(doctor.devices(), "training step on cpu").remedy


@pytest.mark.slow
def test_the_small_step_is_a_real_one():
    loss, first, second = doctor._small_step(jax.devices()[:1])
    assert 0 < loss < 100 and second < first


def test_tensorflow_on_the_gpu(monkeypatch):
    tf = pytest.importorskip("tensorflow")
    assert only(doctor.pipeline(pictures=4), "TensorFlow's devices").remedy is None
    assert only(doctor.pipeline(pictures=4), "decoding").found.endswith("cores")
    gpu = namedtuple("Device", "name")("GPU:0")
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [gpu])
    finding = only(doctor.pipeline(pictures=4), "TensorFlow's devices")
    assert "1 GPU(s)" in finding.found and "tensorflow-cpu" in finding.remedy


def test_a_missing_tokenizer(tmp_path):
    finding = only(doctor.places(str(tmp_path), str(tmp_path / "tokenizer.json")), "tokenizer")
    assert "no file" in finding.found and "tokenizer.json" in finding.remedy


def test_an_unwritable_workdir(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    assert only(doctor.places(str(tmp_path / "new" / "run"), None), "workdir").remedy is None
    assert not (tmp_path / "new").exists()  # looking changes nothing
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    finding = only(doctor.places(str(tmp_path / "new"), None), "workdir")
    assert "Permission denied" in finding.found and "--workdir" in finding.remedy


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "rankclip_jax.doctor", "--workdir", str(tmp_path)]
    done = subprocess.run([*command, "--tokenizer", "/no/such.json"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and "BAD  tokenizer" in done.stdout and "1 thing(s) to mend" in done.stdout, done.stdout
