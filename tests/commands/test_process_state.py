"""What belongs to the whole process is set by commands alone: neither an import nor a training leaves a trace of it."""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import types
import warnings
from pathlib import Path

import jax
import pytest
from PIL import ImageFile

from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.parallel.preemption import Notice, Preempted
from rankclip_jax.train import __main__ as train
from rankclip_jax.train import loop, recorder
from rankclip_jax.weights.saving import Checkpoints

REPO = Path(__file__).parents[2]


def state():
    """All that a training could change of this process, by name."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict))]
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "unraisablehook": sys.unraisablehook,
        "excepthook": sys.excepthook,
        "stdout": (sys.stdout, sys.stderr),
        "environment": dict(os.environ),
        "log filters": {logger.name: list(logger.filters) for logger in loggers if logger.filters},
        "log levels": {logger.name: logger.level for logger in loggers if logger.name in ("root", "absl")},
        "warnings": list(warnings.filters),
        "Pillow": ImageFile.LOAD_TRUNCATED_IMAGES,
        "cache of programs": jax.config.jax_compilation_cache_dir,
    }


def small():
    settings = {
        "batch_size": 8, "data.train": 32, "data.val": None, "epochs": 1, "optim.warmup_steps": 1,
        "loss.objective": "clip", "tokenizer.vocab_size": 300, "model.image_size": 8,
        "model.name": "ViT-tiny", "model.vision": {"layers": 1, "width": 32, "heads": 2, "patch_size": 4},
        "model.text": {"layers": 1, "width": 32, "heads": 2},
        "eval.zero_shot.seen.path": "seen:32", "eval.zero_shot.held_out.path": "held_out:32",
        "eval.retrieval.scenes.path": 16, "eval.geometry.scenes.path": 16,
    }  # fmt: skip
    return configs.load(str(REPO / "configs/shapes.py"), [f"{key}={value}" for key, value in settings.items()])


@pytest.mark.slow
def test_a_training_leaves_the_process_as_it_was(tmp_path, monkeypatch, one_device, compiled_once):
    """Asked to stop, to its end, interrupted."""
    take, before = recorder.Recorder.take, state()

    def stop(self, *_):
        during = state()
        for name in ("signals", "unraisablehook", "log filters"):  # so that what is put back is seen
            assert during[name] != before[name]
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(recorder.Recorder, "take", stop)
    with pytest.raises(Preempted, match="saved step 1 in"):
        loop.train(small(), tmp_path / "run")
    before = state()  # what libraries changed when they were imported is theirs
    monkeypatch.setattr(recorder.Recorder, "take", take)
    loop.train(small(), tmp_path / "run")
    assert state() == before

    def interrupt(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder.Recorder, "take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.train(small(), tmp_path / "other")
    assert state() == before


@pytest.mark.slow
def test_a_second_sigterm_waits_until_the_first_ones_state_is_written(tmp_path, monkeypatch, one_device, compiled_once):
    def again(self):
        signal.raise_signal(signal.SIGTERM)
        return close(self)

    take, close = recorder.Recorder.take, Checkpoints.close
    monkeypatch.setattr(recorder.Recorder, "take", lambda self, *x: (take(self, *x), os.kill(os.getpid(), 15)))
    monkeypatch.setattr(Checkpoints, "close", again)
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append("ends the process"))
    try:
        with pytest.raises(Preempted, match="saved step 1 in"):
            loop.train(small(), tmp_path)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not got and (tmp_path / "checkpoints" / "1").is_dir()


def test_in_a_failed_run_of_many_processes_the_bucket_gets_what_was_written_before_the_process_ends(monkeypatch):
    did = []

    @contextlib.contextmanager
    def workdir(path):
        try:
            yield Path(path)
        finally:
            did.append("pushed")

    def fails(config, workdir):
        raise InputError("loss is nan")

    monkeypatch.setattr(train.storage, "workdir", workdir)
    monkeypatch.setattr(train.loop, "train", fails)
    monkeypatch.setattr(train.compilation_cache, "enable", lambda platform: None)
    monkeypatch.setattr(train.commands, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(train.processes, "start", lambda *flags: None)
    monkeypatch.setattr(train.processes, "stop", lambda error: did.append(str(error)))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(sys, "argv", ["train", "shapes", "--workdir=gs://b/run"])
    with pytest.raises(SystemExit, match="loss is nan"):
        train.main()
    assert did == ["pushed", "loss is nan"]


def test_a_logger_that_does_not_close_hides_no_other_error(capsys):
    def fails():
        raise RuntimeError("no network")

    for error in (None, Preempted()):
        made = recorder.Recorder.__new__(recorder.Recorder)
        made._opened = contextlib.ExitStack()
        made._opened.callback(fails)
        with pytest.raises(Preempted if error else RuntimeError):
            try:
                if error:
                    raise error
            finally:
                made.__exit__(type(error) if error else None, error, None)
    assert capsys.readouterr().err == "a logger of config.log did not close: no network\n"


@pytest.mark.parametrize("error", [None, Preempted(), InputError("wrong"), KeyboardInterrupt()])
def test_what_a_training_sets_is_put_back(tmp_path, error):
    config = configs.complete({}).checkpoint
    Checkpoints(tmp_path / "first", config).close()
    before = state()
    made = Checkpoints(tmp_path / "run", config), Notice()
    assert state() == before  # made, they change nothing
    with contextlib.suppress(BaseException), made[0] as checkpoints, made[1] as notice:
        assert not notice.reached(1)
        signal.raise_signal(signal.SIGTERM)
        assert notice.reached(1)
        checkpoints.save(1, {"params": {"w": jax.numpy.ones(3)}}, 0)
        during = state()
        if error:
            raise error
    assert state() == before
    assert [name for name in before if during[name] != before[name]] == ["signals", "unraisablehook", "log filters"]
    assert (tmp_path / "run" / "checkpoints" / "1").is_dir()  # closed: what was being saved is there


def test_ctrl_c_is_a_sigterm_and_a_second_one_quits_at_once():
    script = """
import signal
import subprocess
from rankclip_jax.parallel.preemption import Notice
with Notice() as notice:
    print(notice.reached(1))
    signal.raise_signal(signal.SIGINT)
    print(notice.reached(2), flush=True)
    signal.raise_signal(signal.SIGINT)
print("never")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (130, ["False", "True"])
    assert done.stderr.endswith("saving this step; Ctrl-C again quits at once and loses it\n")


def test_a_failed_save_is_told_once(tmp_path, caplog, monkeypatch):
    hooked = []
    monkeypatch.setattr(sys, "unraisablehook", hooked.append)
    late = types.SimpleNamespace(exc_value=RuntimeError("Event loop is closed"))
    other = types.SimpleNamespace(exc_value=RuntimeError("something else"))
    told = ("absl", logging.ERROR, "/orbax/checkpoint/manager.py", 1, "failed", ())
    orbax, plain = logging.LogRecord(*told, (OSError, OSError(), None)), logging.LogRecord(*told, None)
    with Checkpoints(tmp_path, configs.complete({}).checkpoint):
        sys.unraisablehook(late)
        sys.unraisablehook(other)
        logging.getLogger("absl").handle(orbax)
        logging.getLogger("absl").handle(plain)
    assert hooked == [other] and caplog.records[-1:] == [plain] and orbax not in caplog.records
    sys.unraisablehook(late)
    assert hooked == [other, late]


# All modules are imported twice: what the second time changes is ours, since libraries stay as they were imported.
IMPORTS = """
import importlib, logging, os, pkgutil, signal, sys, warnings

def ours():
    return [name for name in sys.modules if name.partition(".")[0] in ("rankclip_jax", "input_pipeline")]

def import_all():
    for package in ("rankclip_jax", "input_pipeline"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
            if "driver" not in module.name:  # it runs in img2dataset's environment alone
                importlib.import_module(module.name)

clean = dict(os.environ)
import_all()
import jax, tensorflow
from PIL import Image, ImageFile
for name in ours():
    del sys.modules[name]
os.environ.clear()
os.environ.update(clean)
warnings.filters.clear()
tensorflow.config.set_visible_devices = lambda *_: asked.append("devices")
jax.config.update = lambda *_: asked.append("jax.config")
asked = []

def state():
    absl = logging.getLogger("absl")
    yield "environment", dict(os.environ)
    yield "signals", [signal.getsignal(number) for number in sorted(signal.valid_signals())]
    yield "hooks", (sys.unraisablehook, sys.excepthook)
    yield "streams", (sys.stdout, sys.stderr)
    yield "logging", (list(logging.root.filters), logging.root.level, list(absl.filters), absl.level)
    yield "warnings", list(warnings.filters)
    yield "Pillow", (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    yield "libraries", list(asked)

before = dict(state())
import_all()
after = dict(state())
print([name for name in before if before[name] != after[name]], len(ours()))
"""


@pytest.mark.slow
def test_an_import_changes_nothing():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TF_", "JAX_"))}
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    changed, _, count = done.stdout.strip().rpartition(" ")
    assert changed == "[]" and int(count) > 100, done.stdout + done.stderr
