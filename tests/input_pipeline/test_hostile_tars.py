"""Tars whose headers lie: read to the end, counted, or refused in one line; never a loop or a full memory."""

import io
import tarfile

import pytest
import tensorflow as tf
from ml_collections import ConfigDict

from input_pipeline import sources
from rankclip_jax.common.errors import InputError
from tests.support.source_files import KEYS, samples


def header(name, size, kind=b"0"):
    """A ustar header with the given field for the size, whatever it says, and a right checksum."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data):
    return data + b"\0" * (-len(data) % 512)


def tar_with(path, *middle):
    """Three good samples, then what is to be tried, then one more."""
    made = samples(4)
    with path.open("wb") as out:
        for i, (image, caption) in enumerate(made):
            if i == 3:
                out.writelines(middle)
            for ending, data in (("jpg", image), ("txt", caption.encode())):
                out.write(header(f"{i}.{ending}", b"%011o" % len(data)) + padded(data))
        out.write(b"\0" * 1024)
    return sources.open_source(ConfigDict(KEYS | dict(format="webdataset")), str(path), image_side=8)


@pytest.mark.parametrize(
    "middle",
    [
        header("x.jpg", b"-1000"),
        header("x.jpg", b"\xff" * 12),  # base 256, -1
        header("x.jpg", b"+777"),
        header("x.jpg", b"1_0"),
        header("x.jpg", b"999"),
        header("x", b"%011o" % 14, b"x") + padded(b"14 size=-1000\n") + header("x.jpg", b"%011o" % 0),
        header("x", b"%011o" % 13, b"x") + padded(b"13 size=lots\n") + header("x.jpg", b"%011o" % 0),
        header("x", b"%011o" % 13, b"x") + padded(b"13 size=1e99\n") + header("x.jpg", b"%011o" % 0),
        header("x", b"%011o" % 5000, b"x") + padded(b"9" * 4990 + b" size=1\n") + header("x.jpg", b"-1"),
    ],
)
def test_what_follows_a_size_that_is_no_number_is_lost_and_counted(middle, tmp_path):
    source = tar_with(tmp_path / "0.tar", middle)
    assert source.size == 3 and len(source.lost) == 1 and source.lost[0].samples >= 1
    assert "a broken header at byte" in source.lost[0].reason or "a size that is not a number" in source.lost[0].reason


@pytest.mark.parametrize("size", [b"\x80" + b"\xff" * 11, b"7" * 11, b"%011o" % 2**32])
def test_a_size_beyond_the_end_is_a_truncated_tar(size, tmp_path):
    source = tar_with(tmp_path / "0.tar", header("x.jpg", size))
    assert source.size == 3 and "truncated inside the member" in source.lost[0].reason


def test_a_member_of_three_gigabytes_is_one_bad_sample(tmp_path):
    made = samples(2)
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, (image, caption) in enumerate(made):
            for ending, data in (("txt", caption.encode()), ("jpg", image)):
                member = tarfile.TarInfo(f"{i}.{ending}")
                member.size = len(data) if (i, ending) != (0, "jpg") else 3 << 30
                if member.size == len(data):
                    tar.addfile(member, io.BytesIO(data))
                else:  # a file with a hole has the length and not the bytes
                    tar.offset += tar.fileobj.write(member.tobuf()) + member.size
                    tar.fileobj.seek(tar.offset)
    spec = ConfigDict(KEYS | dict(format="webdataset"))
    source = sources.open_source(spec, str(tmp_path / "0.tar"), image_side=8)
    rows = [tf.data.Dataset.range(i, i + 1).map(source.read).as_numpy_iterator() for i in range(2)]
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"the image has more than 100 MB \(config"):
        next(rows[0])
    assert next(rows[1])["image"] == made[1][0]


def test_only_such_members(tmp_path):
    with (tmp_path / "0.tar").open("wb") as out:
        out.write(header("x.jpg", b"-1") + b"\0" * 1024)
    with pytest.raises(InputError, match="has no sample: a broken header at byte 0"):
        sources.open_source(ConfigDict(KEYS | dict(format="webdataset")), str(tmp_path / "0.tar"), image_side=8)
