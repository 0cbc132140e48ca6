"""The 18 zero-shot sets of CLIP's and RankCLIP's papers, in the layouts that people have.

`--config.eval.suite=all --config.eval.data_dir=DIR` evaluates them all. A set is the first of these that DIR has:

  CLIP_benchmark   DIR/imagenet/test/nshards.txt and tars, as huggingface.co/datasets/clip-benchmark has them
  class folders    DIR/imagenet/val/n01440764/*.JPEG, also below validation, test or no split
  labels.csv       DIR/ImageNet1K/validation/labels.csv, as the authors' repository has it, with classes.py or without
  TFDS             prepared by tensorflow-datasets under DIR

A set's folder may have any of its usual names, in any spelling. If one set is asked for, DIR may be that folder.
"""

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from rankclip_jax.common import folders, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.foreign_files import read_json
from rankclip_jax.config import eval_set
from rankclip_jax.evaluation import prompts


class Published(NamedTuple):
    """Where a set can be had.

    Attributes:
      tfds: builder and split of tensorflow-datasets; None: there is no working one.
      wds: its name at CLIP_benchmark.
      names: other usual names of its folder, in small letters and digits.
    """

    tfds: str | None
    wds: str
    names: tuple[str, ...] = ()


SETS = {
    "caltech101": Published("caltech101:test", "vtab-caltech101"),
    "cifar10": Published("cifar10:test", "vtab-cifar10"),
    "cifar100": Published("cifar100:test", "vtab-cifar100"),
    "dtd": Published("dtd:test", "vtab-dtd"),
    "fgvc_aircraft": Published(None, "fgvc_aircraft", ("aircraft",)),
    "oxford_flowers102": Published("oxford_flowers102:test", "vtab-flowers", ("flowers102",)),
    "food101": Published("food101:validation", "food101"),  # TFDS's name for the test images
    "gtsrb": Published(None, "gtsrb"),
    "imagenet": Published("imagenet2012:validation", "imagenet1k", ("ilsvrc2012", "imagenetilsvrc2012")),
    "oxford_iiit_pet": Published("oxford_iiit_pet:test", "vtab-pets", ("oxfordpets",)),
    "rendered_sst2": Published(None, "renderedsst2"),
    "stanford_cars": Published("cars196:test", "cars"),
    "stl10": Published("stl10:test", "stl10"),
    "svhn": Published("svhn_cropped:test", "vtab-svhn"),
    "imagenet_sketch": Published("imagenet_sketch:test", "imagenet_sketch"),
    "imagenet_v2": Published(
        "imagenet_v2/matched-frequency:test", "imagenetv2", ("imagenetv2matchedfrequencyformatval",)
    ),
    "imagenet_a": Published("imagenet_a:test", "imagenet-a"),
    "imagenet_r": Published("imagenet_r:test", "imagenet-r"),
}
_SPLITS = ("val", "validation", "test", "")


def zero_shot_sets(config: ConfigDict) -> dict[str, ConfigDict]:
    """The sets of config.eval.suite and config.eval.zero_shot, by name; for equal names the latter counts.

    A set that is not there has the places where it was looked for as its hint.

    Raises:
      InputError: an unknown set, or no data_dir.
    """
    if config.suite is None:
        return dict(config.zero_shot)
    names = list(SETS) if config.suite == ("all",) else config.suite
    unknown = [name for name in names if name not in SETS]
    if unknown:
        raise InputError(f"config.eval.suite: unknown set {unknown[0]!r}. Expected all, or some of {', '.join(SETS)}")
    if not config.data_dir:
        raise InputError("config.eval.suite is set but config.eval.data_dir is not; set it to the folder with the sets")
    if storage.is_remote(config.data_dir):
        raise InputError(
            f"config.eval.data_dir={config.data_dir}: sets are looked for in local folders only; mount it, or name "
            "each set with its path in config.eval.zero_shot, which may be in a bucket"
        )
    root = Path(config.data_dir)
    return {name: _spec(name, root, alone=len(names) == 1) for name in names} | dict(config.zero_shot)


def _spec(name: str, data_dir: Path, alone: bool) -> ConfigDict:
    published, roots = SETS[name], _roots(name, data_dir, alone)
    places = [root / split for root, split in itertools.product(roots, _SPLITS)]
    for found in itertools.chain(
        _webdatasets(roots), _class_folders(name, places), _label_tables(places), _prepared(published, data_dir, alone)
    ):
        return eval_set("zero_shot", {"protocol": "openai", "protocol_set": name} | found)
    shown = ", ".join(map(str, roots))
    splits = f"there or in {', '.join(filter(None, _SPLITS))}"
    hint = f"looked in {shown} for test/nshards.txt; for the classes' folders, and for labels.csv, {splits}"
    get = f"download huggingface.co/datasets/clip-benchmark/wds_{published.wds} into {data_dir / name}"
    if published.tfds:
        builder = published.tfds.split(":")[0]
        hint += f"; in {data_dir / builder} for TFDS"
        get += f", or prepare it under {data_dir}: tfds build {builder} --data_dir={data_dir}"
    path = str(data_dir / name)
    return eval_set("zero_shot", {"format": "clip_benchmark", "path": path, "hint": f"{hint}. To get it, {get}"})


def _roots(name: str, data_dir: Path, alone: bool) -> list[Path]:
    """Folders that may be the set's own."""
    published = SETS[name]
    spellings = {_letters(one) for one in (name, published.wds, f"wds_{published.wds}", *published.names)}
    spellings |= {_letters(published.wds.removeprefix("vtab-"))}
    spellings |= {_letters(published.tfds.split(":")[0])} if published.tfds else set()
    here = sorted(os.listdir(data_dir)) if data_dir.is_dir() else []
    others = [
        data_dir / one for one in here if one != name and _letters(one) in spellings and (data_dir / one).is_dir()
    ]
    return [*([data_dir] if alone else []), data_dir / name, *others]


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _webdatasets(roots: list[Path]) -> Iterator[dict]:
    for root in roots:
        if any((folder / "nshards.txt").is_file() for folder in (root / "test", root)):
            yield {"format": "clip_benchmark", "path": str(root)}


def _class_folders(name: str, places: list[Path]) -> Iterator[dict]:
    for place in places:
        classes = folders.class_folders(str(place)) if place.is_dir() else []
        if classes and prompts.knows("openai", name, classes):
            yield {"format": "folder", "path": str(place)}


def _label_tables(places: list[Path]) -> Iterator[dict]:
    for place in places:
        if (place / "labels.csv").is_file():
            classes = place / "classes.py"
            yield {"path": str(place / "labels.csv"), "classes": str(classes) if classes.is_file() else None}


def _prepared(published: Published, data_dir: Path, alone: bool) -> Iterator[dict]:
    if not published.tfds:
        return
    builder, _, split = published.tfds.partition(":")
    if any((data_dir / builder).glob("*/dataset_info.json")):
        yield {"format": "tfds", "path": published.tfds, "data_dir": str(data_dir)}
    own = [info for below in ("", "*/", "*/*/") for info in data_dir.glob(f"{below}dataset_info.json")] if alone else []
    for info in own:
        about = read_json(info)
        if "/".join(filter(None, (about.get("name"), about.get("configName")))) == builder:
            yield {"format": "tfds", "path": f"{info.parent}:{split}"}
