"""Validation during training: what it reads, and what it says of it. How many rows evaluations take at a time."""

import csv
from types import SimpleNamespace

import numpy as np
import pytest

from input_pipeline import sources
from rankclip_jax import config as configs
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.train import evaluate
from rankclip_jax.train.session import Session, _eval_batch
from rankclip_jax.weights import pretrained
from tests.support.made_models import VIT, make_workdir


def test_bad_validation_samples_are_named_in_what_is_left_of_a_batch_too(captioned, monkeypatch, capsys):
    rows = list(csv.reader(captioned.open()))[:21]
    for bad in 3, 19:  # of 20 samples, in batches of 8
        (captioned.parent / rows[1 + bad][0]).write_bytes(b"no picture")
    csv.writer(captioned.open("w", newline="")).writerows(rows)
    model = {"name": "ViT-tiny", "image_size": 16}
    config = configs.complete({"batch_size": 8, "model": model, "eval": {"diagnostics": False}})
    session = Session(config, Tokenizer.train(["grey level"], 300))
    seen = []

    def loss(state, rows):
        seen.append(rows["tokens"].shape[0])
        return {"clip": 1.0 * len(seen)}

    monkeypatch.setattr(session, "_val_step", loss)
    source = sources.open_source(configs.complete({"data": {"format": "csv"}}).data, str(captioned), image_side=16)
    assert session.validation(None, source) == {"val/clip": 1.5} and seen == [8, 8]
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2].partition(":")[0].rpartition(" ")[2] for line in said] == ["3", "19"], said


@pytest.mark.parametrize(
    ("platform", "batch_size", "given", "rows"),
    [
        ("cpu", 16, None, 16),
        ("cpu", 4096, None, 2 * 256),
        ("cpu", None, None, 2 * 32),
        ("gpu", None, None, 2 * 256),
        ("tpu", None, None, 2 * 256),
        ("gpu", 16, 33, 34),
    ],
)
def test_rows_of_an_evaluation(platform, batch_size, given, rows):
    mesh = SimpleNamespace(
        devices=np.array([SimpleNamespace(platform=platform)] * 2), axis_names=("data",), shape={"data": 2}
    )
    config = configs.complete({"eval": {"batch_size": given}})
    with config.ignore_type():
        config.batch_size = batch_size
    assert _eval_batch(config, mesh) == rows


def test_the_batch_of_a_training_says_nothing_of_another_model(tmp_path):
    read = pretrained.read(make_workdir(tmp_path / "run", VIT))
    assert evaluate.session_of(configs.complete({"batch_size": 8}), read).eval_batch == 8 * 32
