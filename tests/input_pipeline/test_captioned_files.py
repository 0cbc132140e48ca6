"""Small files are read together: the same batches, and the same bad samples, as when each is read alone."""

import json
import os

import numpy as np
import pytest
from ml_collections import ConfigDict

from input_pipeline import pipeline, sources
from input_pipeline.sources import together
from rankclip_jax.common.tokenizer import Tokenizer
from tests.support.source_files import KEYS, WRITERS, samples


def write_jsonl(folder, made):
    """Row i has 1 + i % 3 captions; one of them contains what lies between captions."""
    WRITERS["csv"](folder, made)
    with open(folder / "data.jsonl", "w") as out:
        for i, (_, text) in enumerate(made):
            captions = [text] + [f"{text} again {k}" for k in range(i % 3)]
            captions[-1] += "\0behind" if i == 4 else ""
            out.write(json.dumps({"image": f"pictures/{i}.img", "caption": captions}) + "\n")
    return str(folder / "data.jsonl")


def opened(kind, folder):
    """Some of whose pictures are missing, empty, no picture or no file."""
    made = samples(40)
    spec = ConfigDict(KEYS | {"format": "folder" if kind == "folder" else "csv"})
    if kind == "mixture":
        parts = {}
        for number, name in enumerate(("csv", "folder", "tfrecord")):
            (folder / name).mkdir()
            path = WRITERS[name](folder / name, made[10 * number : 10 * number + 20])
            parts[name] = dict(format=name, path=path, weight=1.0 + number)
        return sources.open_source(spec, parts, image_side=8)
    path = write_jsonl(folder, made) if kind == "jsonl" else WRITERS[kind](folder, made)
    source = sources.open_source(spec, path, image_side=8)
    files = sorted(file for file in (folder / "pictures").rglob("*") if file.suffix in (".img", ".jpg", ".png"))
    files[3].unlink()
    files[8].write_bytes(b"")
    files[9].write_bytes(b"no picture")
    files[20].unlink()
    os.mkfifo(files[20])
    if kind == "folder":
        files[30].with_suffix(".txt").unlink()
    return source


def stream(source, count):
    tokenizer = Tokenizer.train([f"caption {i} again behind" for i in range(40)], 400)
    options = dict(batch_size=5, image_side=8, canvas=16, context_length=16, crop_scale=(0.5, 1.0), seed=1)
    batches = pipeline.TrainBatches(source, tokenizer, **options)
    return [next(batches) for _ in range(count)], batches.bad, batches.position


@pytest.mark.parametrize("kind", ["csv", "jsonl", "folder", pytest.param("mixture", marks=pytest.mark.slow)])
def test_the_same_as_when_each_is_read_alone(kind, tmp_path, monkeypatch):
    found = []
    source = opened(kind, tmp_path)
    alone = sum((pair == b"").any() for pair in source.together.read(np.arange(source.size)))
    # The missing, empty and no file; a caption with a zero byte; a .txt that is missing; TFRecords have no files.
    assert alone == {"csv": 3, "jsonl": 4, "folder": 4, "mixture": 20}[kind]
    for small in (1 << 18, 300, 0):  # all, some, none
        monkeypatch.setattr(together, "SMALL", small)
        found.append(stream(source, 14))
    for batches, bad, position in found[1:]:
        assert position == found[0][2] and bad.count == found[0][1].count and bad.reasons == found[0][1].reasons
        for one, other in zip(batches, found[0][0], strict=True):
            for key, value in one.items():
                np.testing.assert_array_equal(value, other[key], err_msg=key)
    assert bool(found[0][1].count) == (kind != "mixture")
