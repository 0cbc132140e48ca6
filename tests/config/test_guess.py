"""The format of data by its path."""

import pytest

from rankclip_jax.config.guess import guess_format


@pytest.mark.parametrize(
    "name, kind",
    [
        ("a/b.csv", "csv"),
        ("b.TSV", "csv"),
        ("gs://bucket/{00000..00331}.tar", "webdataset"),
        ("/x/*.tfrecord", "tfrecord"),
        ("y.parquet", "parquet"),
        ("cc3m/train.tfrecord-00000-of-00064", "tfrecord"),
        ("cc3m/train.tfrecord-*", "tfrecord"),
        ("gs://b/train.tfrecords-{00000..00063}-of-00064", "tfrecord"),
        ("train.tfrecord-?????-of-00064", "tfrecord"),
        ("x.parquet*", "parquet"),
    ],
)
def test_formats_by_name(name, kind):
    assert guess_format(name) == kind


def test_formats_of_folders(tmp_path):
    assert guess_format(str(tmp_path)) == "folder"
    (tmp_path / "00000.parquet").write_bytes(b"")
    assert guess_format(str(tmp_path)) == "parquet"
    (tmp_path / "00000").mkdir()  # as img2dataset writes files: the table is about the folder of pictures
    assert guess_format(str(tmp_path)) == "folder"
    (tmp_path / "00001.parquet").write_bytes(b"")
    assert guess_format(str(tmp_path)) == "parquet"
    (tmp_path / "00000.tar").write_bytes(b"")
    assert guess_format(str(tmp_path)) == "webdataset"
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tfrecord-00000-of-00002").touch()
    assert guess_format(str(tmp_path / "shards")) == "tfrecord"
