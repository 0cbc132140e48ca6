"""Keys that contradict each other, and keys that mean nothing beside the others: `load.complete` refuses both.

A key that is ignored is a wish that is not met, and nobody is told. What is left out is whatever a comparison sets for
some of its objectives only: the keys of config.loss.
"""

from collections.abc import Iterator
from typing import NamedTuple

from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.config.fields import EVAL_SETS

_OF_FORMAT = {"image_folder": "csv", "delimiter": "csv", "data_dir": "tfds"}  # of training data
_OF_SET = _OF_FORMAT | dict.fromkeys(("image_key", "label_key", "caption_key", "encoding"), "csv")


class Ignored(NamedTuple):
    """`group`[`key`] is set, and nothing reads it. `where`: its full name; `default`: unset; `why`: in words."""

    group: ConfigDict
    key: str
    where: str
    default: object
    why: str


def check(config: ConfigDict) -> None:
    """Raises InputError for the first contradiction of a configuration whose keys were checked one by one."""
    if config.batch_size == 1:
        raise InputError("config.batch_size=1. A contrastive or ranking loss needs at least 2 pairs")
    _check_schedule(config.optim)
    _check_lora(config)
    for split in ("train", "val"):
        _check_weights(config.data[split], f"config.data.{split}")
    for group, key, where, default, why in _ignored(config):
        raise InputError(f"{where}={group[key]!r}. Expected {default!r}, since {why}")


def forget_ignored(config: ConfigDict) -> None:
    """Brings what a run of before stored, and ignored, to its default."""
    with config.ignore_type():
        for group, key, _, default, _ in list(_ignored(config)):
            group[key] = default


def check_set(kind: str, fields: ConfigDict, where: str) -> None:
    """Raises InputError for a key that nothing reads of one set of config.eval.KIND."""
    for _, key, name, default, why in _ignored_of_set(kind, fields, where):
        raise InputError(f"{name}={fields[key]!r}. Expected {default!r}, since {why}")


def _ignored(config: ConfigDict) -> Iterator[Ignored]:
    data, vision, optim, ev = config.data, config.model.vision, config.optim, config.eval
    for group, key, where, default, needed, why in (
        (config, "init_towers", "", "both", config.init_from, "config.init_from=None"),
        (config, "init_skip", "", (), config.init_from, "config.init_from=None"),
        (vision, "patch_dropout_until", "model.vision.", 1.0, vision.patch_dropout, "no patches are left out"),
        (data, "synonyms", "data.", None, data.two_views, "config.data.two_views=False"),
        (data, "canvas", "data.", None, data.resize == "device", "config.data.resize=host"),
        (optim, "eps", "optim.", 1e-8, optim.name in ("adamw", "muon"), f"config.optim.name={optim.name} has none"),
        (ev, "data_dir", "eval.", None, ev.suite, "config.eval.suite=None"),
    ):
        if not needed and group[key] != default:
            yield Ignored(group, key, f"config.{where}{key}", default, why)
    yield from _ignored_of_data(data)
    for kind in EVAL_SETS:
        for name, fields in ev[kind].items():
            yield from _ignored_of_set(kind, fields, f"config.eval.{kind}.{name}")


def _ignored_of_data(data: ConfigDict) -> Iterator[Ignored]:
    splits = {split: data[split] for split in ("train", "val") if isinstance(data[split], ConfigDict)}
    parts = [(f"config.data.{split}.{name}", part) for split, mix in splits.items() for name, part in mix.items()]
    formats = {data.format, *(part.format or data.format for _, part in parts)}
    for key, format in _OF_FORMAT.items():
        unset = "," if key == "delimiter" else None
        if data[key] != unset and None not in formats and format not in formats:
            yield Ignored(data, key, f"config.data.{key}", unset, f"config.data.format={data.format}")
        for where, part in parts:
            own = part.format or data.format
            if part[key] is not None and own not in (None, format):
                yield Ignored(part, key, f"{where}.{key}", None, f"its format is {own}")


def _ignored_of_set(kind: str, fields: ConfigDict, where: str) -> Iterator[Ignored]:
    for key, format in _OF_SET.items():
        if key in fields and fields.format != format and fields[key] != EVAL_SETS[kind][key].default:
            default = EVAL_SETS[kind][key].default
            yield Ignored(fields, key, f"{where}.{key}", default, f"{where}.format={fields.format}")
    for key in ("templates", "protocol", "protocol_set") if kind == "linear_probe" else ():
        if fields[key] is not None:
            yield Ignored(fields, key, f"{where}.{key}", None, "a linear probe has no prompts")
    if kind == "zero_shot" and fields.protocol_set and fields.protocol is None:
        yield Ignored(fields, "protocol_set", f"{where}.protocol_set", None, f"{where}.protocol=None")


def _check_weights(data: object, where: str) -> None:
    """Shares are of all parts, or of none."""
    if isinstance(data, ConfigDict) and len({part.weight is None for part in data.values()}) > 1:
        without = next(name for name, part in data.items() if part.weight is None)
        raise InputError(f"{where}.{without}.weight=None. Expected a number above 0, as other parts have a weight")


def _check_schedule(optim: ConfigDict) -> None:
    if optim.schedule == "wsd" and optim.decay_steps is None:
        raise InputError(
            "config.optim.decay_steps=None. Expected the number of last steps in which the rate falls, since "
            "config.optim.schedule=wsd"
        )
    if optim.schedule != "wsd" and optim.decay_steps is not None:
        raise InputError(
            f"config.optim.decay_steps={optim.decay_steps}. Expected None, since config.optim.schedule="
            f"{optim.schedule}; wsd has decay_steps"
        )
    if optim.recipe == "released" and optim.schedule != "cosine":
        raise InputError(
            f"config.optim.schedule={optim.schedule}. Expected cosine, since config.optim.recipe=released; or "
            "config.optim.recipe=standard"
        )


def _check_lora(config: ConfigDict) -> None:
    if config.optim.lora is None:
        return
    for key, wrong, expected in (
        ("init_from", config.init_from is None, "a trained model"),
        ("init_towers", config.init_towers != "both", "both"),
        ("init_skip", bool(config.init_skip), "()"),
    ):
        if wrong:
            raise InputError(
                f"config.{key}={config[key]!r}. Expected {expected}, since config.optim.lora={config.optim.lora} "
                "freezes the towers as they start and trains adapters"
            )
