"""TensorFlow takes no GPU: whatever opens data sees to it before TensorFlow does anything."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tensorflow as tf
from ml_collections import ConfigDict

import input_pipeline
from input_pipeline import health, labelled, pipeline, sources
from rankclip_jax import config as configs
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.config import eval_set
from rankclip_jax.evaluation import open_sets
from rankclip_jax.inference.pictures import open_pictures
from rankclip_jax.train import opening

REPO = Path(__file__).parents[2]


def own_source():
    """A user's, which nothing of ours opened."""
    read = lambda row: {"image": tf.zeros((8, 8, 3), tf.uint8), "caption": "a"}  # noqa: E731
    return sources.Source(4, read, str, lambda: ["a"])


def spec(kind, **fields):
    return eval_set(kind, {"format": "shapes"} | fields)


OPENERS = {
    "a source": lambda tmp: sources.open_source(ConfigDict({"format": "shapes"}), 4, image_side=8),
    "a labelled set": lambda tmp: labelled.open_labelled(spec("zero_shot", path="seen"), image_side=8),
    "a set for a probe": lambda tmp: labelled.open_train_and_test(
        spec("linear_probe", train="seen", path="seen"), image_side=8
    ),
    "a captioned set": lambda tmp: labelled.open_captioned(spec("retrieval", path=4), image_side=8),
    "a stream for training": lambda tmp: pipeline.TrainBatches(
        own_source(), Tokenizer.train("a", 300), batch_size=2, image_side=8, context_length=4, crop_scale=(1, 1), seed=0
    ),
    "a stream for evaluation": lambda tmp: next(pipeline.eval_batches(own_source(), batch_size=2, image_side=8)),
    "the rate of decoding": lambda tmp: health.jpegs_per_second(1),
    "a collection of shards": lambda tmp: open_pictures(str(tmp / "0.tar")),
    "a run": lambda tmp: opening.open_data(configs.load(str(REPO / "configs/shapes.py"))),
}


def too_late(devices, kind):
    """As TensorFlow answers when it holds GPUs already."""
    raise RuntimeError("Visible devices cannot be modified after being initialized")


@pytest.mark.parametrize("what", OPENERS)
def test_whatever_opens_data_keeps_tensorflow_off_the_gpus(what, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: asked.append((devices, kind)))
    try:
        OPENERS[what](tmp_path)
    except InputError:  # the shards are not there, which is found out afterwards
        pass
    assert asked and set(map(repr, asked)) == {"([], 'GPU')"}

    monkeypatch.setattr(tf.config, "set_visible_devices", too_late)
    with pytest.raises(InputError, match=r"holds the GPUs .* call input_pipeline.cpu_only\(\) before"):
        OPENERS[what](tmp_path)


def test_an_evaluation_names_it_as_the_reason(monkeypatch):
    monkeypatch.setattr(tf.config, "set_visible_devices", too_late)
    config = configs.complete({"eval": {"zero_shot": {"seen": {"format": "shapes", "path": "seen"}}}}).eval
    assert "holds the GPUs" in open_sets(config, image_side=8).missing["zero_shot/seen"]


def test_again_and_when_tensorflow_is_at_work_already_it_is_no_error_without_gpus():
    assert float(tf.constant(1.0)) == 1.0
    input_pipeline.cpu_only()
    input_pipeline.cpu_only()
    assert health.gpus_of_tensorflow() == 0


# TensorFlow must not start before it was told. Imported once, it starts in a process of each command, forked before.
GUARD = """
import os, sys
import tensorflow as tf
from tensorflow.python.eager import context

asked, ask, start = [], tf.config.set_visible_devices, context.Context.ensure_initialized
tf.config.set_visible_devices = lambda devices, kind=None: (asked.append((devices, kind)), ask(devices, kind))

def guarded(self):
    assert ([], "GPU") in asked, "TensorFlow starts with all devices"
    return start(self)

context.Context.ensure_initialized = guarded
try:
    tf.constant(1)
except AssertionError:
    print("guarded", flush=True)

def alone(command):
    if not (child := os.fork()):
        exec(command)
        assert asked
        sys.stdout.flush()
        os._exit(0)
    assert not os.waitpid(child, 0)[1], command

"""
COMMANDS = {
    "prepare": 'sys.argv[1:] = ["{data}", "{out}"]; from input_pipeline import prepare; prepare.main()',
    "doctor": "from rankclip_jax import doctor; list(doctor.pipeline(4))",
    "embed": 'from rankclip_jax.inference.pictures import open_pictures; open_pictures("{tar}").image(0)',
}


@pytest.mark.slow
def test_no_command_starts_tensorflow_before(captioned, tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(captioned.parent / "images" / "0.png", "0.png")
        tar.add(captioned, "0.txt")
    script = GUARD
    for command in COMMANDS.values():
        filled = command.format(data=captioned, out=tmp_path / "out", tar=tmp_path / "0.tar")
        script += f"alone({filled!r})\n"
    done = subprocess.run([sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("guarded"), done.stderr
