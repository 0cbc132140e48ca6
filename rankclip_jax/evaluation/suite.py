"""The 18 zero-shot sets of CLIP's and RankCLIP's papers, and where each is expected.

`--config.eval.suite=all --config.eval.data_dir=DIR` evaluates them all. A set is read from DIR/<set> in
CLIP_benchmark's WebDataset layout, or, if that is missing, as prepared by tensorflow-datasets under DIR.
"""

from pathlib import Path

from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.config import eval_set

# Set -> (builder and split of tensorflow-datasets, None if there is no working one; name at CLIP_benchmark).
SETS = {
    "caltech101": ("caltech101:test", "vtab-caltech101"),
    "cifar10": ("cifar10:test", "vtab-cifar10"),
    "cifar100": ("cifar100:test", "vtab-cifar100"),
    "dtd": ("dtd:test", "vtab-dtd"),
    "fgvc_aircraft": (None, "fgvc_aircraft"),
    "oxford_flowers102": ("oxford_flowers102:test", "vtab-flowers"),
    "food101": ("food101:validation", "food101"),  # TFDS's name for the test images
    "gtsrb": (None, "gtsrb"),
    "imagenet": ("imagenet2012:validation", "imagenet1k"),
    "oxford_iiit_pet": ("oxford_iiit_pet:test", "vtab-pets"),
    "rendered_sst2": (None, "renderedsst2"),
    "stanford_cars": ("cars196:test", "cars"),
    "stl10": ("stl10:test", "stl10"),
    "svhn": ("svhn_cropped:test", "vtab-svhn"),
    "imagenet_sketch": ("imagenet_sketch:test", "imagenet_sketch"),
    "imagenet_v2": ("imagenet_v2/matched-frequency:test", "imagenetv2"),
    "imagenet_a": ("imagenet_a:test", "imagenet-a"),
    "imagenet_r": ("imagenet_r:test", "imagenet-r"),
}


def zero_shot_sets(config: ConfigDict) -> dict[str, ConfigDict]:
    """The sets of config.eval.suite and config.eval.zero_shot, by name; for equal names the latter counts.

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
    return {name: _spec(name, Path(config.data_dir)) for name in names} | dict(config.zero_shot)


def _spec(name: str, data_dir: Path) -> ConfigDict:
    tfds, theirs = SETS[name]
    spec = eval_set("zero_shot", {"protocol": "openai"})
    if tfds and not (data_dir / name).exists() and (data_dir / tfds.split(":")[0]).exists():
        spec.format, spec.path, spec.data_dir = "tfds", tfds, str(data_dir)
        return spec
    spec.format, spec.path = "clip_benchmark", str(data_dir / name)
    spec.hint = f"download huggingface.co/datasets/clip-benchmark/wds_{theirs} into {data_dir / name}"
    if tfds:
        spec.hint += f", or prepare it under {data_dir}: tfds build {tfds.split(':')[0]} --data_dir={data_dir}"
    return spec
