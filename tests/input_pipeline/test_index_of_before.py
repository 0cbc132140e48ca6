"""Indexes and fingerprints that an earlier version wrote, and the long fingerprint."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from input_pipeline.sources import fingerprint
from rankclip_jax.common.errors import InputError
from rankclip_jax.train import workdir
from tests.input_pipeline.test_index import KINDS, index_of, opened, shards_of
from tests.support.source_files import WRITERS, read_all, samples


def of_before(layout, folder, kind, columns):
    """The cache of earlier versions: one .npz for the list of shards."""
    shards = shards_of(layout, folder)
    name = hashlib.sha256("\n".join([kind, *shards]).encode()).hexdigest()[:20] + ".npz"
    stats = list(map(os.stat, shards))
    rows = [10, 10]
    files = [[path, stat.st_size, stat.st_mtime_ns, n] for path, stat, n in zip(shards, stats, rows, strict=True)]
    lost = [dict(where=shards[1], reason="torn", samples=3)]
    meta = np.frombuffer(json.dumps(dict(files=files, lost=lost)).encode(), np.uint8)
    (Path(folder) / ".rankclip_index").mkdir()
    with open(Path(folder) / ".rankclip_index" / name, "wb") as out:
        np.savez(out, meta=meta, **columns)
    return Path(folder) / ".rankclip_index" / name


@pytest.mark.parametrize("layout", KINDS)
def test_an_index_of_before_is_used(layout, tmp_path, scanned):
    made = samples(20)
    path = WRITERS[layout](tmp_path, made)
    options = dict(cache_dir=str(tmp_path / "cache"))
    index = index_of(layout, tmp_path, **options)
    begin, length = np.split(np.concatenate([index.of_shard(0), index.of_shard(1)]), 2, axis=1)
    if layout == "tfrecord":
        kind, columns = "tfrecord", dict(begin=begin[:, 0], length=length[:, 0])
    else:
        pictures = "'jpg', 'jpeg', 'jpe', 'jfif', 'png', 'webp', 'gif', 'bmp', 'tif', 'tiff'"
        kind = f"tar samples [('image', ({pictures})), ('caption', ('txt', 'caption', 'txt.gz', 'caption.gz'))] ()"
        columns = dict(begin=begin, length=length.astype(np.int32))
    assert KINDS[layout]().name == kind
    file = of_before(layout, tmp_path, kind, columns)
    scanned.clear()
    source = opened(layout, shards_of(layout, tmp_path))
    assert scanned == [] and [(one.reason, one.samples) for one in source.lost] == [("torn", 3)]
    assert read_all(source) == made
    for damaged in (file.read_bytes()[:300], b"", b"PK\3\4" + bytes(500)):
        shutil.rmtree(file.parent)
        file.parent.mkdir()
        file.write_bytes(damaged)
        assert read_all(opened(layout, shards_of(layout, tmp_path))) == made
    assert path and len(scanned) == 6


@pytest.mark.parametrize("layout", KINDS)
def test_the_fingerprints_of_before(layout, tmp_path, monkeypatch):
    WRITERS[layout](tmp_path, samples(20))
    index = index_of(layout, tmp_path)
    begin, length = np.split(np.concatenate([index.of_shard(0), index.of_shard(1)]), 2, axis=1)
    digest = hashlib.blake2b(b"20", digest_size=8)
    lengths = length.astype(np.int32 if layout == "webdataset" else np.int64)
    for part in (np.array([0, 10], np.int64), np.ascontiguousarray(begin), np.ascontiguousarray(lengths)):
        digest.update(part.nbytes.to_bytes(8, "little") + part.tobytes())
    source = opened(layout, shards_of(layout, tmp_path))
    assert fingerprint.fingerprint(source) == digest.hexdigest()
    # Of many rows the checksums stand for the offsets; runs that stored the others resume.
    monkeypatch.setattr(fingerprint, "_LONG", 19)
    long = fingerprint.fingerprint(source)
    assert long != digest.hexdigest() == fingerprint.fingerprint(source, before=True)
    (tmp_path / "run").mkdir()
    began = {"train": {"samples": 20, "fingerprint": digest.hexdigest()}}
    (tmp_path / "run" / "data.json").write_text(json.dumps(began))
    now = {"train": {"samples": 20, "fingerprint": long}}

    def before(name):
        return {"samples": 20, "fingerprint": fingerprint.fingerprint(source, before=True)}

    workdir.check_same_data(tmp_path / "run", now, before)
    with pytest.raises(InputError, match=r"config.data.train has other data than the run"):
        workdir.check_same_data(tmp_path / "run", now, lambda name: now[name])


def test_the_long_fingerprint_notices_a_changed_row(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "_LONG", 0)
    found = []
    made = samples(20)
    for name, some in {"a": made, "b": made, "c": [*made[:7], (made[7][0] + b"x", "more"), *made[8:]]}.items():
        (tmp_path / name).mkdir()
        WRITERS["tfrecord"](tmp_path / name, some)
        found.append(fingerprint.fingerprint(opened("tfrecord", shards_of("tfrecord", tmp_path / name))))
    assert found[0] == found[1] != found[2]
