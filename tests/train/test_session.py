"""Validation during training: what it reads, and what it says of it."""

import csv

from input_pipeline import sources
from rankclip_jax import config as configs
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.train.session import Session


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
