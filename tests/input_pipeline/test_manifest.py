"""The list of finished shards: a line for each, merged and checked when a folder is opened again."""

import json

import pytest

from input_pipeline import manifest, shards
from rankclip_jax.common.errors import InputError
from tests.input_pipeline.test_prepare import files


def entry(number):
    """Of a shard of ten rows without a sample, the last of them bad in every third: no file."""
    bad = [{"row": 10 * number + 9, "where": "x", "reason": "y", "detail": ""}] * (number % 3 == 0)
    shard = {"name": f"{number:05d}.tfrecord", "rows": [10 * number, 10 * number + 10], "samples": 0}
    return shard | {"bytes": 0, "sha256": None}, bad


def test_one_more_shard_writes_its_line_and_none_of_the_others(tmp_path, monkeypatch):
    written, write = [], manifest.files.write_whole
    count = lambda path, data: written.append(path.name) or write(path, data)  # noqa: E731
    monkeypatch.setattr(manifest.files, "write_whole", count)
    opened = manifest.Manifest(tmp_path, {"rows": 500, "shard_size": 10})
    at_first = written.count("manifest.json")
    lines, sizes, so_far = tmp_path / "manifest.jsonl", [], []
    for number in (1, 0, *range(3, 50)):
        before = lines.stat().st_size
        shard, bad = entry(number)
        opened.add(shard, bad)
        sizes.append(lines.stat().st_size - before - len(json.dumps(shard)))
        so_far.append(opened.so_far())
    assert written.count("manifest.json") == at_first == 1
    assert sizes == [1] * 49  # the end of the line
    assert so_far == [(0, 0), *[(1, 1)] * 48]  # only shard 0 has a bad row before the gap at 2
    opened.add(*entry(2))
    assert opened.so_far() == (17, 17) and opened.rows == 500
    opened.finish()
    assert not lines.exists() and written.count("manifest.json") == 2
    assert len(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == 50


def test_a_killed_manifest_has_its_lines_but_a_torn_last_one(tmp_path):
    settings = {"rows": 60, "shard_size": 10}
    opened = manifest.Manifest(tmp_path, settings)
    for number in (3, 0, 1):
        opened.add(*entry(number))
    killed = files(tmp_path)
    assert json.loads(killed["manifest.json"])["shards"] == [] and killed["manifest.jsonl"].count(b"\n") == 3
    (tmp_path / "manifest.jsonl").write_bytes(killed["manifest.jsonl"][:-2])
    again = manifest.Manifest(tmp_path, settings)
    assert [shard["rows"][0] for shard in again.shards] == [0, 30] and again.so_far() == (1, 1)
    assert len(json.loads((tmp_path / "manifest.json").read_text())["shards"]) == 2
    assert (tmp_path / "manifest.jsonl").read_bytes() == b""
    assert (tmp_path / "bad_samples.jsonl").read_bytes() == killed["bad_samples.jsonl"]
    # As earlier versions left it: all in manifest.json.
    (tmp_path / "manifest.jsonl").unlink()
    assert manifest.Manifest(tmp_path, settings).shards == again.shards
    for line in (b"[]\n", b"{\n", b'{"name": "../x", "rows": [0, 10]}\n', b"\xff\n"):
        (tmp_path / "manifest.jsonl").write_bytes(line)
        with pytest.raises(InputError, match=r"manifest.jsonl is not a list of prepare's shards: .*another folder$"):
            manifest.Manifest(tmp_path, settings)


def test_manifest_checks_size_and_checksum(tmp_path):
    path = tmp_path / "a.tfrecord"
    entry = shards.write_shard(path, [b"one", b"two"])
    assert entry["samples"] == 2 and manifest.is_intact(path, entry)
    assert not manifest.is_intact(path, entry | {"sha256": "0" * 64})
    assert not manifest.is_intact(tmp_path / "b.tfrecord", entry)
    assert shards.write_shard(tmp_path / "c", []) == {"samples": 0, "bytes": 0, "sha256": None}
    assert [path.name for path in tmp_path.iterdir()] == ["a.tfrecord"]
