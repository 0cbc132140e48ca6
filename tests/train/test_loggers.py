"""What config.log names gets settings, numbers and pictures; a run of wandb is one run, however often it resumes."""

import base64
import io
import json
import sys
import types

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rankclip_jax import config as configs
from rankclip_jax.common.devices import Devices
from rankclip_jax.common.errors import InputError
from rankclip_jax.train import loggers
from rankclip_jax.train.recorder import Recorder

# What the real one has of what is used, with the same names; it keeps what it is given.
FAKE = '''
import json, os, pathlib

class Image:
    def __init__(self, pixels):
        self.shape = pixels.shape

class Run:
    def __init__(self, given):
        self.kept = pathlib.Path(given["dir"]) / "told.jsonl"
        self.tell(init=given)
    def tell(self, **what):
        with self.kept.open("a") as out:
            out.write(json.dumps(what) + "\\n")
    def log(self, numbers, step):
        plain = {key: value.shape if isinstance(value, Image) else value for key, value in numbers.items()}
        self.tell(log=plain, step=step)
    def finish(self):
        self.tell(finish=True)

def init(*, name, id, resume, dir, config):
    if "WANDB_BROKEN" in os.environ:
        raise RuntimeError("api_key not configured\\n(no-tty)")
    return Run(dict(name=name, id=id, resume=resume, dir=dir, config=config))
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)


def jpeg():
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    return base64.b64encode(out.getvalue()).decode()


def recorder(workdir, log, start=0):
    config = configs.complete({"log": log, "batch_size": 4, "log_every": 1, "model": {"name": "RN-tiny"}})
    speed = dict(packs=False, step_tflop=lambda packed, whole: 1e-3)
    session = types.SimpleNamespace(config=config, devices=Devices("cpu", "cpu", None, 1), **speed)
    rate = lambda step: 0.5  # noqa: E731
    return Recorder(session, workdir, rate, lambda: (0.0, 4), start=start, total_steps=9, parameters=7)


SHOWN = {
    "zero_shot/coco/2017": {"right": [{"picture": jpeg(), "label": "a", "predicted": "a"}], "wrong": []},
    "retrieval/r": {
        "image_to_text": [{"picture": jpeg(), "answers": [{"caption": "a", "right": True}]}],
        "text_to_image": [{"caption": "a", "answers": [{"picture": jpeg(), "right": False}]}],
    },
}


def test_numbers_settings_and_pictures_reach_wandb_and_a_resumed_run_is_the_same(tmp_path, wandb):
    for start in (0, 1):
        with recorder(tmp_path, ("wandb",), start) as recording:
            recording.take(start + 1, {"loss": 2.0, "grad_norm": 1.0})
            recording.flush()
            recording.show(start + 1, SHOWN)
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    first, second = (line["init"] for line in told if "init" in line)
    assert first == second and first["resume"] == "allow" and first["name"] == tmp_path.name
    assert first["config"]["optim.lr"] == 5e-4 and first["config"]["model.name"] == "RN-tiny"
    assert told[1]["step"] == 1 and told[1]["log"]["loss"] == 2.0 and told[1]["log"]["learning_rate"] == 0.5
    assert told[2]["log"].keys() == {"examples/coco/2017", "gallery/r"}
    assert all(len(shape) == 3 and shape[2] == 3 and min(shape[:2]) > 50 for shape in told[2]["log"].values())
    assert [line for line in told if "finish" in line] == [told[3], told[-1]]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["start"]["wandb"] for row in rows] == [first["id"]] * 2 and rows[0]["start"]["parameters"] == 7
    with recorder(tmp_path, ("wandb",)) as other:  # trained again from its start
        other.take(1, {"loss": 2.0, "grad_norm": 1.0})
        other.flush()
    last = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()][-3]
    assert last["init"]["id"] != first["id"]


def test_wandb_that_is_absent_or_cannot_start_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as wandb leaves it where it is used
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"config\.log names wandb, which is not installed; pip install wandb"):
        loggers.check(("tensorboard", "wandb"))
    loggers.check(("tensorboard",))


def test_wandb_that_cannot_start_is_one_line(tmp_path, wandb, monkeypatch):
    loggers.check(("wandb",))
    monkeypatch.setenv("WANDB_BROKEN", "1")
    with pytest.raises(InputError, match=r"did not start \(api_key not configured \(no-tty\)\); run `wandb login`"):
        loggers.WeightsAndBiases(tmp_path, {}, "1")


def test_tensorboard_shows_numbers_settings_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with recorder(tmp_path, ("tensorboard",)) as recording:
        recording.take(1, {"loss": 2.0, "grad_norm": 1.0})
        recording.flush()
        recording.show(1, SHOWN)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    assert {"loss", "learning_rate", "examples/coco/2017", "gallery/r"} <= set(tags["tensors"])
    picture = events.Tensors("gallery/r")[0].tensor_proto.string_val
    assert Image.open(io.BytesIO(picture[2])).size == (int(picture[0]), int(picture[1]))
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_without_loggers_nothing_is_drawn(tmp_path):
    with recorder(tmp_path, ()) as recording:
        assert not recording.shows
        recording.write(1, {"val/clip": 1.0}, counts={"zero_shot/x": {"n": 4}}, failed={})
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["val/clip"] == 1.0 and row["counts"] == {"zero_shot/x": {"n": 4}} and "failed" not in row
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_pixels_of_a_figure():
    figure = Figure(figsize=(2, 1), dpi=50, facecolor="red")
    found = loggers.pixels(figure)
    assert found.shape == (50, 100, 3) and found.dtype == np.uint8 and (found == [255, 0, 0]).all()
