"""More shards than a process may open files: read all the same."""

import contextlib
import dataclasses
import errno
import io
import os
import resource
import tarfile

import numpy as np
import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline import sources
from input_pipeline.bad_samples import reason_of_failure
from input_pipeline.sources import mapping
from input_pipeline.sources.mapping import mapped
from rankclip_jax.common import commands
from tests.support.source_files import KEYS, read_all, samples, write_tar


@contextlib.contextmanager
def few_files(more):
    """This process may open `more` files than it has open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_hundred_tars_with_thirty_open_files(tmp_path):
    made = samples(100)
    for i, (image, caption) in enumerate(made):
        with tarfile.open(tmp_path / f"{i:03d}.tar", "w") as tar:
            for ending, data in (("jpg", image), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    spec = ConfigDict(KEYS | dict(format="webdataset"))
    sources.open_source(spec, str(tmp_path / "000.tar"), image_side=8)  # imports all that it needs
    with few_files(30):
        source = sources.open_source(spec, str(tmp_path), image_side=8)
        images = [source.read(tf.constant(row, tf.int64))["image"].numpy() for row in range(100)]
    assert images == [image for image, _ in made] and not source.lost


def test_more_tars_than_a_process_may_map_are_read_by_python(tmp_path, monkeypatch):
    made, spec = samples(12), ConfigDict(KEYS | dict(format="webdataset"))
    write_tar(tmp_path, made)
    assert sources.open_source(spec, str(tmp_path), image_side=8).together is None
    (tmp_path / "now").write_text("one\n" * 28)
    for most, in_python in ((40, False), (39, True)):  # of which three quarters are for 28 others and 2 tars
        (tmp_path / "most").write_text(f"{most}\n")
        monkeypatch.setattr(mapping, "_MAPPINGS", str(tmp_path / "now"))
        monkeypatch.setattr(mapping, "_MOST", str(tmp_path / "most"))
        source = sources.open_source(spec, str(tmp_path), image_side=8)
        assert read_all(source) == made and (source.together is not None) == in_python and source.ahead is None
    with open(tmp_path / "00001.tar", "r+b") as shard:  # of what Python reads, what is gone is a bad row
        shard.truncate(1000)
    assert reason_of_failure(source.read, 11).startswith(f"{tmp_path}/00001.tar ends before byte ")
    assert read_all(dataclasses.replace(source, size=1)) == made[:1]


def test_a_mapped_file_is_its_bytes_and_is_not_written(tmp_path):
    (tmp_path / "file").write_bytes(b"some bytes")
    (tmp_path / "empty").write_bytes(b"")
    found = mapped(tmp_path / "file")
    found[0] = ord("S")
    assert found.tobytes() == b"Some bytes" and (tmp_path / "file").read_bytes() == b"some bytes"
    np.testing.assert_array_equal(mapped(tmp_path / "empty"), [])
    with pytest.raises(FileNotFoundError):
        mapped(tmp_path / "none")


def test_too_many_open_files_are_one_line():
    with pytest.raises(SystemExit) as stop, commands.exit_codes():
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "0.tar")
    assert stop.value.code == "error: 0.tar cannot be opened: Too many open files; allow more: ulimit -n 8192"
