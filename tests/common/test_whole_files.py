"""Files are written whole or not at all, under temporary names that take nobody else's place."""

import os
from pathlib import Path

import pytest

from input_pipeline import shards
from rankclip_jax.common import files
from rankclip_jax.common.errors import InputError
from tests.support.foreign import contents, fill
from tests.support.small_files import small_files


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.json"
    files.write_whole(path, "old")
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(KeyboardInterrupt), files.whole(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    with small_files(1000), pytest.raises(InputError, match=r"^cannot write .*a\.json: File too large; make room"):
        files.write_whole(path, b"x" * 2000)
    with pytest.raises(FileNotFoundError), files.whole(path):
        open(tmp_path / "of somebody else")  # whose error it is, is said by its name
    assert contents(tmp_path) == {"a.json": b"old"}
    for other in (tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match="it is not a file"):
            files.write_whole(other, "x")
    with pytest.raises(InputError, match=r"^cannot write .*/gone/a: No such file or directory$"):
        files.write_whole(tmp_path / "gone/a", "x")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_temporary_name_of_somebody_else_is_not_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "0" * 2 * n)
    before = contents(fill(tmp_path, [f".a.json.{'0' * 16}.part", "a.json.part", "a.part"]))
    with pytest.raises(InputError, match="File exists"):
        files.write_whole(tmp_path / "a.json", "x")
    monkeypatch.undo()
    files.write_whole(tmp_path / "a.json", "x")
    assert contents(tmp_path) == before | {"a.json": b"x"}


def test_a_temporary_name_of_the_callers_own_is_replaced_and_a_link_there_not_followed(tmp_path):
    fill(tmp_path, ["victim"])
    (tmp_path / "0.tfrecord.part").symlink_to("victim")
    shards.write_shard(tmp_path / "0.tfrecord", [b"x"])
    assert contents(tmp_path).keys() == {"victim", "0.tfrecord"}
    assert (tmp_path / "victim").read_text() == "the only copy of victim"
