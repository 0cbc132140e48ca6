"""Eight devices in every test process, so that sharded code runs as sharded; and data that the tests make."""

import os

from benchmarks.quick_compile import XLA_FLAGS

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {XLA_FLAGS}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "1")  # read once a process: of answers that never come
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's and scikit-learn's threads wait busily for the next small array
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody looks at where an operation was written

import csv
import gc
import sys

import numpy as np
import pytest
from PIL import Image

from tests.support.bucket import served
from tests.support.one_device import on_one_device
from tests.support.open_clip_models import import_open_clip

# Minutes long: they go first, so that no worker has one left when the others are done.
LONG = (
    "test_notebook.py", "test_two_processes.py", "test_docs.py", "test_train.py", "test_study.py",
    "test_bucket_workdir.py", "test_gpu.py", "test_ownership.py", "test_ownership_resumed.py", "test_packed.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)
    if tf := sys.modules.get("tensorflow"):  # as with XLA: what is read once is not worth optimising
        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
    # Imported modules stay; what is traced and compiled is mostly no garbage: a twentieth of the time.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture
def captioned(tmp_path):
    """A csv of 40 captioned PNGs in tmp_path/images: picture i is filled with grey level 5 i."""
    folder = tmp_path / "images"
    folder.mkdir()
    with open(tmp_path / "data.csv", "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["image", "caption"])
        for i in range(40):
            Image.fromarray(np.full((12, 16, 3), 5 * i, np.uint8)).save(folder / f"{i}.png")
            writer.writerow([f"images/{i}.png", f"grey level {i}"])
    return tmp_path / "data.csv"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    with served(tmp_path / "bucket", monkeypatch) as bucket:
        yield bucket


@pytest.fixture
def one_device(monkeypatch):
    on_one_device(monkeypatch)


@pytest.fixture
def compiled_once(tmp_path_factory):
    """JAX keeps the programs of the tests that ask for this, which train the same.

    It never keeps one that calls the host, as rankings do (losses/sorting.py): with the objective clip there are none.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = tmp_path_factory.getbasetemp() / "compiled"  # of this process of this run
    settings = dict(jax_compilation_cache_dir=str(folder), jax_persistent_cache_min_compile_time_secs=0)
    before = {name: getattr(jax.config, name) for name in settings}
    for values in settings, before:
        compilation_cache.reset_cache()  # JAX asks for the folder once
        for name, value in values.items():
            jax.config.update(name, value)
        if values is settings:
            yield


@pytest.fixture(scope="session")
def open_clip():
    return import_open_clip()
