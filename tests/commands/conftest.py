"""A trained run, and commands in this process, among files of others."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rankclip_jax
from tests.support.made_models import VIT, make_workdir

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A trained workdir, pictures, a csv of them, a list of URLs."""
    root = tmp_path_factory.mktemp("world")
    make_workdir(root / "run", VIT)
    (root / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(root / "photos" / f"{i}.png")
    (root / "data.csv").write_text("image,caption\n" + "".join(f"photos/{i}.png,picture {i}\n" for i in range(7)))
    (root / "list.tsv").write_text("".join(f"picture {i}\thttp://127.0.0.1:9/{i}.jpg\n" for i in range(7)))
    return root


@pytest.fixture(scope="module")
def model(world):
    return rankclip_jax.load(world / "run")


@pytest.fixture
def run(monkeypatch, model):
    """Runs a command's main() with arguments; returns None where it did its work, or its line of refusal."""
    monkeypatch.setattr("rankclip_jax.parallel.processes.start", lambda *flags: None)  # only a fresh process may join
    monkeypatch.setattr(rankclip_jax, "load", lambda *_, **__: model, raising=False)
    monkeypatch.chdir(REPO)

    def run(module, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
            try:
                module.main()
            except SystemExit as stop:
                if stop.code:
                    assert re.fullmatch(r"error: [^\n]+", str(stop.code)), stop.code
                    return stop.code
        return None

    return run
