"""More shards than a process may open files: read all the same."""

import contextlib
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
from input_pipeline.sources.mapping import mapped
from rankclip_jax.common import commands
from tests.support.source_files import KEYS, samples


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
