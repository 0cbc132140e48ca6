"""What the tests of the index share."""

from pathlib import Path

import pytest

from input_pipeline.sources import tar_index, tfrecord


@pytest.fixture
def scanned(monkeypatch):
    """The names of the shards that are scanned, as they are."""
    names = []

    def noting(scan):
        return lambda *args: names.append(Path(args[-1]).stem) or scan(*args)

    for module in (tfrecord, tar_index):
        monkeypatch.setattr(module, "_scan", noting(module._scan))
    return names
