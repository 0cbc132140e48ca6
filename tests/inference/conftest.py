"""A workdir, its model, embed in this process, and pictures to embed."""


import numpy as np
import pytest
from PIL import Image

import rankclip_jax
from rankclip_jax import embed
from tests.support.made_models import VIT, make_workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp("made") / "run", VIT)


@pytest.fixture(scope="module")
def model(workdir):
    return rankclip_jax.load(workdir)


@pytest.fixture
def run(workdir, model, monkeypatch):
    """The command line in this process, with the model loaded once."""
    monkeypatch.setattr(rankclip_jax, "load", lambda *_, **__: model, raising=False)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["embed", str(workdir), *map(str, arguments)])
        embed.main()

    return run


@pytest.fixture
def folder(tmp_path):
    """11 pictures in two folders, and files that are none."""
    rng = np.random.default_rng(0)
    for i in range(11):
        path = tmp_path / "photos" / ("deep" if i % 2 else "") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"
