"""Which JAX the notebook and the doctor ask for, by what is planted: drivers in their words, packages by metadata."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from rankclip_jax import doctor
from rankclip_jax.common import jax_install

REPO = Path(__file__).parents[2]

PROPRIETARY = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}.54.15  Tue Mar  5 22:23:56 UTC 2024
GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)
"""
OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}.65.06  Release Build  (builder@U22-I3-AF03-09-5)  Sun Jul 27
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A function of a driver's major version, or None, and of {package: version}; returns the driver's file."""

    def plant(driver=None, packages=(), text=PROPRIETARY):
        monkeypatch.setattr(jax_install, "requirements", lambda: ["jaxtyping>=1", "jax>=0.10.0"])
        monkeypatch.setattr(jax_install.Path, "exists", lambda path: False)  # no device of the machine that tests
        monkeypatch.setattr(jax_install.Path, "glob", lambda path, pattern: [])
        real, given = jax_install.version, dict(packages)

        def version(name):  # without the plugins of the environment that tests
            return None if "cuda" in name and name not in given else real(name)

        monkeypatch.setattr(jax_install, "version", version)
        for name, number in given.items():
            folder = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        importlib.invalidate_caches()
        if driver:
            (tmp_path / "version").write_text(text.format(driver))
        return str(tmp_path / "version")

    return plant


@pytest.mark.parametrize("text", [PROPRIETARY, OPEN, PROPRIETARY.replace("x86_64", "aarch64")])
@pytest.mark.parametrize(("driver", "extra"), [(525, "cuda12"), (579, "cuda12"), (580, "cuda13"), (1001, "cuda13")])
def test_cuda_13_from_driver_580_on(driver, extra, text, planted):
    path = planted(driver, text=text)
    assert jax_install.driver(path) == driver and jax_install.extra(path) == extra


def test_other_machines(planted, monkeypatch):
    path = planted()
    assert jax_install.driver(path) is None and jax_install.extra(path) == ""
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / "0"] if str(path) == "/dev/vfio" else [])
    assert jax_install.extra(path) == "tpu"
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/dxg")  # WSL, which has no file
    assert jax_install.extra(path) == "cuda12"
    Path(path).write_text("nonsense")
    assert jax_install.driver(path) is None


OLD12 = {"jax-cuda12-plugin": "0.7.2", "jax-cuda12-pjrt": "0.7.2"}


@pytest.mark.parametrize(
    ("driver", "packages", "found", "command"),
    [
        (550, OLD12, ("0.12.0.1", "gpu"), ""),  # what fits and sees the GPU is kept,
        (580, OLD12, ("0.10.2", "gpu"), ""),  # whichever CUDA it has
        (None, {}, ("0.12.0.1", "cpu"), ""),
        (550, OLD12, ("0.7.2", "gpu"), "pip install 'jax[cuda12]>=0.10.0'"),
        (550, {}, ("0.12.0.1", "cpu"), "pip install 'jax[cuda12]>=0.10.0'"),
        (580, {}, ("0", "none"), "pip install 'jax[cuda13]>=0.10.0'"),
        (
            580,
            OLD12,
            ("0.7.2", "gpu"),
            "pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt && pip install 'jax[cuda13]>=0.10.0'",
        ),
        (None, {}, ("0.7.2", "cpu"), "pip install 'jax>=0.10.0'"),
    ],
)
def test_what_is_missing(driver, packages, found, command, planted):
    path = planted(driver, packages)
    assert jax_install.missing(path, found) == command


def test_a_tpu_host(planted, monkeypatch):
    path = planted()
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / "accel0"] if str(path) == "/dev" else [])
    assert jax_install.missing(path, ("0.12.0.1", "tpu")) == ""
    assert jax_install.missing(path, ("0.12.0.1", "cpu")) == "pip install 'jax[tpu]>=0.10.0'"


def test_jax_is_asked_in_a_process_of_its_own(planted, monkeypatch):
    path = planted()
    assert jax.default_backend() == "cpu" and jax_install.missing(path) == ""
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")  # a JAX that cannot start
    assert jax_install.missing(path) == "pip install 'jax>=0.10.0'"


@pytest.mark.parametrize(("driver", "extra"), [(580, "cuda13"), (550, "cuda12")])
def test_an_overlooked_gpu_is_named(driver, extra, planted):
    remedy = next(doctor.devices(planted(driver))).remedy
    assert remedy == f"JAX does not use the NVIDIA GPU of this machine (driver {driver}): pip install 'jax[{extra}]'"


@pytest.mark.parametrize(
    ("driver", "packages", "remedy"),
    [
        (None, {}, None),
        (550, {"jax-cuda12-plugin": "V", "jax-cuda12-pjrt": "V"}, None),
        (580, {"jax-cuda12-plugin": "V", "jax-cuda12-pjrt": "V"}, None),
        (580, {"jax-cuda13-plugin": "V", "jax-cuda13-pjrt": "0.7.2"}, "pip install 'jax[cuda13]==V'"),
        (580, OLD12, "pip install 'jax[cuda12]==V'"),
        (550, {"jax-cuda12-plugin": "V"}, "pip install 'jax[cuda12]==V'"),
        (None, {"jax-cuda13-plugin": "99", "jax-cuda13-pjrt": "99"}, "pip install 'jax[cuda13]==V'"),
        (  # Colab's, left beside what fits
            580,
            OLD12 | {"jax-cuda13-plugin": "V", "jax-cuda13-pjrt": "V"},
            "pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt",
        ),
        (
            550,
            {"jax-cuda13-plugin": "0.7.2", "jax-cuda13-pjrt": "0.7.2"},
            "pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && pip install 'jax[cuda12]==V'",
        ),
    ],
)
def test_cuda_packages_of_another_version(driver, packages, remedy, planted):
    here = jax.__version__
    packages = {name: version.replace("V", here) for name, version in packages.items()}
    found = list(doctor.jax_plugins(planted(driver, packages)))
    assert [finding.remedy for finding in found] == ([remedy and remedy.replace("V", here)] if packages else [])
    assert all(f"{name} {version}" in found[0].found for name, version in packages.items())


def test_nothing_caps_jax():
    (asked,) = (line for line in (REPO / "requirements.txt").read_text().splitlines() if re.match(r"jax\b", line))
    assert not re.search("[<=!~]", asked.replace(">=", ""))
    for page in (REPO / "README.md", *REPO.glob("docs/*.md"), *REPO.glob("notebooks/*.ipynb")):
        assert not re.search(r"jax\[\w+\](==|[^\s\"'`]*[<~])", page.read_text()), page


def test_it_needs_nothing_of_the_project():
    loaded = "sorted({name.partition('.')[0] for name in sys.modules})"
    code = f"import sys, rankclip_jax.common.jax_install; print({loaded})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'packaging'" in modules and not any(f"'{name}'" in modules for name in ("jax", "numpy", "flax"))
