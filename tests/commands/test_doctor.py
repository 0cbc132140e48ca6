"""The doctor finds what is planted, and names the remedy."""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import jax
import pytest

from rankclip_jax import doctor
from rankclip_jax.common import jax_install


def only(findings, what):
    return next(finding for finding in findings if finding.what == what)


@pytest.fixture
def without_tensorboard(tmp_path, monkeypatch):
    """An installation without tensorboard: all of site-packages but this, by links."""
    site = Path(importlib.metadata.distribution("clu").locate_file(""))
    bare = tmp_path / "site"
    bare.mkdir()
    for entry in site.iterdir():
        if not entry.name.startswith("tensorboard"):
            (bare / entry.name).symlink_to(entry)
    monkeypatch.setattr(sys, "path", [str(bare), *(p for p in sys.path if Path(p).resolve() != site.resolve())])
    importlib.invalidate_caches()


def test_no_tensorboard(without_tensorboard):
    found = list(doctor.packages(jax_install.requirements()))
    ill = [finding for finding in found if finding.remedy]
    (asked,) = (line for line in jax_install.requirements() if line.startswith("tensorboard"))
    assert ill == [("tensorboard", "not installed", f"pip install '{asked}'")]
    assert only(found, "jax").remedy is None and len(found) > 15


@pytest.mark.parametrize(
    ("version", "ill"), [((3, 10, 14), True), ((3, 11, 0), False), ((3, 14, 0, "candidate", 2), False)]
)
def test_python(version, ill, monkeypatch):
    monkeypatch.setattr(sys, "version_info", version)
    finding = only(doctor.findings("runs", None), "Python")
    assert finding.found == ".".join(map(str, version[:3])) and (finding.remedy is not None) is ill


def test_a_jax_too_old(tmp_path, monkeypatch):
    """One that pip left in front of the right one."""
    (tmp_path / "jax-0.4.30.dist-info").mkdir()
    (tmp_path / "jax-0.4.30.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.4.30\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(doctor.packages([*jax_install.requirements(), "none; python_version < '3'"]))
    asked = next(line for line in jax_install.requirements() if line.startswith("jax"))
    assert only(found, "jax") == ("jax", "0.4.30", f"pip install '{asked}'")
    assert [finding.what for finding in found if finding.remedy] == ["jax"]


def test_a_release_candidate_is_a_version_like_any_other(monkeypatch):
    monkeypatch.setattr(doctor.jax_install, "version", lambda name: "2.22.0rc0")
    (finding,) = doctor.packages(["tensorflow-cpu>=2.21"])
    assert finding == ("tensorflow-cpu", "2.22.0rc0", None)


def test_a_jax_that_cannot_do_the_step_is_a_finding(monkeypatch):
    monkeypatch.delattr(jax, "typeof")  # as old ones lack
    monkeypatch.delattr(jax, "make_mesh")
    finding = only(doctor.devices(), "training step on cpu")
    assert "AttributeError" in finding.found and "make_mesh" in finding.found and "reinstall jax" in finding.remedy
    monkeypatch.setitem(sys.modules, "jax", None)
    assert "pip install -r requirements.txt" in only(doctor.devices(), "devices").remedy


def test_a_step_that_computes_nonsense(monkeypatch):
    monkeypatch.setattr(doctor, "_small_step", lambda where: (float("nan"), 1.0, 0.1))
    assert only(doctor.devices(), "training step on cpu").remedy


@pytest.mark.parametrize(
    ("platform", "capability", "has"),
    [
        ("gpu", "7.5", False),  # T4
        ("gpu", "7.0", False),
        ("cuda", "6.1", False),
        ("gpu", "8.0", True),
        ("gpu", "9.0", True),
        ("gpu", "12.0", True),
        ("gpu", "gfx90a", True),  # AMD
        ("tpu", None, True),
        ("cpu", None, True),
    ],
)
def test_gpus_without_bfloat16(platform, capability, has, monkeypatch):
    device = namedtuple("Device", "platform device_kind compute_capability")(platform, "it", capability)
    monkeypatch.setattr(jax, "local_devices", lambda backend=None: [device])
    monkeypatch.setattr(doctor, "_small_step", lambda where: (2.0, 1.0, 0.1))
    said = [finding for finding in doctor.devices() if finding.what == "bfloat16"]
    assert len(said) == (not has) and all("float32" in it.found and it.remedy is None for it in said)


def test_tensorflow_on_the_gpu(monkeypatch):
    tf = pytest.importorskip("tensorflow")
    found = list(doctor.pipeline(pictures=4))
    assert not [finding for finding in found if finding.remedy], found
    assert only(found, "decoding").found.endswith("cores")
    gpu = namedtuple("Device", "name")("GPU:0")  # no test machine has one
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [gpu])
    finding = only(doctor.pipeline(pictures=4), "TensorFlow's devices")
    assert "1 GPU(s)" in finding.found and "pip install --force-reinstall tensorflow-cpu" in finding.remedy


def test_tensorflow_at_work_before_us(monkeypatch):
    tf = pytest.importorskip("tensorflow")

    def too_late(devices, kind):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    import input_pipeline

    for name in ("pipeline", "health"):  # imported again, and put back afterwards
        monkeypatch.delitem(sys.modules, f"input_pipeline.{name}", raising=False)
        monkeypatch.delattr(input_pipeline, name, raising=False)
    monkeypatch.setattr(tf.config, "set_visible_devices", too_late)
    finding = only(doctor.pipeline(pictures=4), "TensorFlow's devices")
    assert "after being initialized" in finding.found and "before TensorFlow" in finding.remedy


def test_clu_that_cannot_write(monkeypatch):
    pytest.importorskip("tensorflow")
    monkeypatch.setitem(sys.modules, "clu", None)
    finding = only(doctor.pipeline(pictures=4), "TensorBoard events")
    assert "cannot be written" in finding.found and "tensorboard" in finding.remedy


@pytest.mark.parametrize("content", [None, "no json", "{}"])
def test_a_missing_or_wrong_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    finding = only(doctor.places(str(tmp_path), str(path)), "tokenizer")
    assert str(path) in finding.found and "tokenizer.json" in finding.remedy


def test_an_unwritable_workdir():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        assert only(doctor.places(str(folder / "new" / "run"), None), "workdir").remedy is None
        assert not (folder / "new").exists()  # looking changes nothing
        (folder / "file").write_text("")
        finding = only(doctor.places(str(folder / "file"), None), "workdir")
        assert "Not a directory" in finding.found and "is a file" in finding.remedy
        for mode in (0o555, 0o000):
            folder.chmod(mode)
            if os.getuid() == 0:  # who may write anywhere
                os.seteuid(65534)
            try:
                finding = only(doctor.places(str(folder / "new"), None), "workdir")
            finally:
                if os.getuid() == 0:
                    os.seteuid(0)
                folder.chmod(0o755)
            assert "Permission denied" in finding.found and "--workdir" in finding.remedy


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "rankclip_jax.doctor", "--workdir", str(tmp_path)]
    done = subprocess.run([*command, "--tokenizer", "/no/such.json"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1 and "BAD  tokenizer" in done.stdout and "1 thing(s) to fix" in done.stdout, done.stdout
    assert "ok   training step on cpu" in done.stdout and "ok   decoding" in done.stdout, done.stdout
