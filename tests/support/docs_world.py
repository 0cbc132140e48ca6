"""A folder in which the commands of the README and docs find what they name: tiny data, runs of the documented models.
"""

import csv
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from rankclip_jax import config as configs
from rankclip_jax.train import resolve
from rankclip_jax.weights import formats, pretrained
from tests.support import torch_archive
from tests.support.made_models import make_workdir

REPO = Path(__file__).parents[2]
# What the pages write for the reader's own things, or fetch from the network -> its stand-in here.
STAND_INS = {
    "PATH_TO_THE_FOLDER": "data/cifar10",
    "CONFIG": "configs/shapes.py",
    "DIR": "runs/shapes",
    "DATA": "data",
    "gs://BUCKET/": "",
    "openai/clip-vit-base-patch32": "tokenizer.json",
    "scores.parquet:0.28": "scores.parquet:-1",  # of random weights
    "0,0.25,0.5,0.75,1": "0,0.5",  # each is an evaluation
}


def make_world(root: Path) -> None:
    """Fills `root`. Needs neither TensorFlow nor the network."""
    (root / "configs").symlink_to(REPO / "configs")
    (root / "requirements.txt").symlink_to(REPO / "requirements.txt")
    _pictures(root / "photos", 16)
    for i in range(16):
        (root / "photos" / f"{i}.txt").write_text(f"a photo of the {_name(i)} thing number {i}\n")
    for name in "a.png", "b.jpg":
        Image.open(root / "photos" / "0.png").save(root / name)
    Image.open(root / "photos" / "7.png").save(root / "like_this.jpg")
    for table in "mine.csv", "held_out.csv":
        rows = [(f"photos/{i}.png", f"{_name(i)} number {i}", _name(i)) for i in range(16)]
        _table(root / table, rows, "caption", "group")
    for i in range(8):
        (root / "classes" / _name(i)).mkdir(parents=True, exist_ok=True)
        shutil.copy(root / "photos" / f"{i}.png", root / "classes" / _name(i) / f"{i}.png")
    for folder in "cc3m", "shards":
        (root / folder).mkdir()
        for shard in range(2):
            with tarfile.open(root / folder / f"{shard:05}.tar", "w") as tar:
                for i in range(8):
                    tar.add(root / "photos" / f"{i}.png", f"{shard}{i:03}.png")
                    tar.add(root / "photos" / f"{i}.txt", f"{shard}{i:03}.txt")
    for name in "cifar10", "cc3m":
        _pictures(root / "data" / name / "pictures", 8)
        rows = [(f"pictures/{i}.png", _name(i)) for i in range(8)]
        for split in "train", "val":
            _table(root / "data" / name / f"{split}.csv", rows * 2)
    cifar10 = root / "data" / "cifar10"
    _table(cifar10 / "labels.csv", [(f"pictures/{i}.png", i % 4) for i in range(8)], "label")
    (cifar10 / "classes.json").write_text(json.dumps([_name(i) for i in range(4)]))
    (cifar10 / "templates.json").write_text(json.dumps(["a photo of {}"]))
    (root / "Train_GCC-training.tsv").write_text("a caption\thttp://127.0.0.1:9/a.jpg\n" * 3)
    # The documented models: the demo's ResNet, and the ViT that data of one's own gets, with fewer layers.
    few = ["model.vision={'layers':1}", "model.text={'layers':1}"]
    own = resolve.resolve(configs.load("own", ["data.train=mine.csv", *few]), pairs=16)
    make_workdir(root / "runs" / "shapes", configs.load("shapes").model.to_dict())
    make_workdir(root / "own_model", own.model.to_dict(), data=dict(format="csv", train="mine.csv"))
    shutil.copy(root / "own_model" / "tokenizer.json", root / "tokenizer.json")
    _openai_file(root / "ViT-B-32.pt", root / "own_model")


def _openai_file(path: Path, workdir: Path) -> None:
    """The model of a workdir as OpenAI's state dict."""
    model = pretrained.read(workdir)
    formats.write_openai(path.parent / "openai", model.config, model.variables)
    torch_archive.write(path, load_file(path.parent / "openai" / "open_clip_model.safetensors"))


def _name(i: int) -> str:
    return ("red circle", "blue star", "green cross", "grey cat")[i % 4]


def _pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3)).astype(np.uint8)).save(folder / f"{i}.png")


def _table(path: Path, rows, *columns) -> None:
    with path.open("w", newline="") as out:
        csv.writer(out).writerows([("image", *(columns or ("caption",))), *rows])
