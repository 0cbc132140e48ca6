"""What a configuration leaves open (None) until a run starts: settled once by the data and the devices, then stored."""

import dataclasses
import math
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rankclip_jax import config as configs
from rankclip_jax import models
from rankclip_jax.common import packing as packed
from rankclip_jax.common import storage
from rankclip_jax.common.devices import devices_of
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import flatten
from rankclip_jax.config.keys import ARCHITECTURE
from rankclip_jax.parallel import processes
from rankclip_jax.parallel.mesh import batch_shards, make_mesh
from rankclip_jax.train.init_from import TOWERS
from rankclip_jax.train.step import loss_spec
from rankclip_jax.weights import view
from rankclip_jax.weights.pretrained import Pretrained

# Measured on two CPU cores at 64 pixels: docs/tutorials.md.
_ON_CPU = dict(name="ViT-tiny", image_size=64, vision=dict(width=128, layers=4, heads=2), text=dict(layers=2))
_SMALL = dict(name="ViT-tiny", image_size=96)  # on an accelerator
_LARGE = dict(name="ViT-S/16")
_MANY = 20_000  # pairs that a larger model needs
_BATCH = {"cpu": 64}  # a device; others: 128
_IMAGES = {"cpu": 50_000}  # that a run sees; others: 32 million
_EPOCHS = 40  # at most
_MOST_STEPS = 2**31 - 1  # the count in a state is an int32
_WITH_BLOCKS = {"tfrecord", "webdataset", "parquet"}
_LANE_BLOCKS = 8  # that a lane has in an epoch, at least: with fewer it would often have no row of its own


def resolve(
    config: ConfigDict, pairs: int, old: ConfigDict | None = None, origin: Pretrained | None = None
) -> ConfigDict:
    """The configuration with what it leaves open settled; a first start prints what was chosen.

    Args:
      pairs: training samples.
      old: the stored configuration of the run that resumes, whose values are taken.
      origin: what config.init_from names, at a first start.

    Raises:
      InputError: config.mesh does not fit the devices, or scenes are drawn for a model that is not named.
    """
    if old is not None:
        config = configs.with_stored(config, old)
    settled = configs.complete(config.to_dict())
    with settled.ignore_type():
        _settle(settled, pairs, old, origin)
    if old is None and processes.is_first():
        for group in ("model", "batch_size epochs log_every optim.warmup_steps optim.lr loss.schedule"):
            _tell(config, settled, group.split())
        _warn_of_ramp(settled)
    return settled


def _settle(config: ConfigDict, pairs: int, old: ConfigDict | None, origin: Pretrained | None) -> None:
    mesh = make_mesh(config.mesh)
    platform = devices_of(mesh).platform
    if origin and config.model.name is None:
        _take(config.model, of_source(origin))
    if config.model.name is None:
        if config.data.format == "shapes":  # which draws scenes as large as the model wants them
            raise InputError("config.model.name=None. Expected a preset, since config.data.format=shapes")
        _take(config.model, _ON_CPU if platform == "cpu" else _LARGE if pairs >= _MANY else _SMALL)
    settle_view(config, origin.view if origin and "visual" in TOWERS[config.init_towers] else None)
    if config.batch_size is None:
        unit = batch_shards(mesh) * config.accumulate
        most = _BATCH.get(platform, 128) * batch_shards(mesh)
        wanted = min(most, max(1 << max(pairs // 8, 1).bit_length() - 1, 16), pairs)
        config.batch_size = max(wanted // unit, 1) * unit
    per_epoch = max(pairs // config.batch_size, 1)
    if config.epochs is None:
        planned = _IMAGES.get(platform, 32_000_000) / pairs
        config.epochs = math.ceil(config.steps / per_epoch) if config.steps else round(min(max(planned, 1), _EPOCHS))
    steps = total_steps(config, per_epoch)
    if config.optim.warmup_steps is None:
        config.optim.warmup_steps = min(steps // 10, 500)
    if config.optim.lr is None:
        config.optim.lr = 1e-5 if config.init_from else 1e-3 if config.model.name.endswith("tiny") else 5e-4
        if config.optim.lora is not None:
            config.optim.lr = 2e-4  # Hu et al., 2021
        if config.optim.name == "lion":
            config.optim.lr /= 10  # Chen et al., 2023: a third to a tenth of AdamW's
    if config.log_every is None:
        config.log_every = max(round(steps / 50), 1)
    epochs = math.ceil(steps / per_epoch)
    if config.eval.every_epochs is None:
        config.eval.every_epochs = max(round(epochs / 10), 1)
    if config.loss.ramp_epochs is None:  # so that a run that is made longer keeps the ramp of its first plan
        of = old or config
        config.loss.ramp_epochs = math.ceil(total_steps(of, per_epoch) / per_epoch)
    if config.loss.schedule is None:
        config.loss.schedule = "ramp" if config.loss.ramp_epochs > 1 else "constant"


def _warn_of_ramp(config: ConfigDict) -> None:
    """Says so where the ramp, which begins with the second epoch, leaves terms out of the whole run."""
    if config.loss.ramp_epochs == 1 and (terms := loss_spec(config).ramped()):
        print(
            f"{', '.join(terms)}: weight 0 in all of this run, since it has one epoch, and their ramp begins with the "
            "second. To train them: --config.loss.schedule=constant"
        )


def settle_view(config: ConfigDict, seen: view.View | None = None) -> None:
    """Writes what config.data leaves open of how the model sees pictures: as `seen` has it; None: as usual for its
    kind."""
    if seen is None:
        seen = view.usual(vision_tower(config))
    elif seen.resize != seen.crop:
        print(f"pictures are resized to the crop's side; the start resized to {seen.resize} and cropped {seen.crop}")
    with config.ignore_type():
        for key, of_clip in (("mean", view.MEAN), ("std", view.STD)):
            theirs = tuple(getattr(seen, key))
            config.data[key] = config.data[key] or (theirs if theirs != of_clip else None)
        config.data.squash = config.data.squash or seen.squash


def vision_tower(config: ConfigDict) -> models.VitConfig | models.ResNetConfig:
    """The vision tower of a config.model that has a name. Raises InputError where its fields do not fit."""
    own = {key: config.model[key] for key in ("name", "image_size", "embed_dim")}
    try:
        return models.configure(**own, vision=configs.network(config.model)["vision"]).vision
    except ValueError as error:
        raise InputError(f"config.model: {error}") from None


def order(config: ConfigDict, old: ConfigDict | None = None, blocks: int | None = None) -> ConfigDict:
    """The configuration with data.shuffle as rows or blocks, which must be known before the data are opened.

    Args:
      config, old: of resolve.
      blocks: of the data, once they were opened as blocks: auto takes rows where some process would have none.

    Raises:
      InputError: data.shuffle=blocks for data that have none.
    """
    settled = configs.complete((configs.with_stored(config, old) if old else config).to_dict())
    data = settled.data
    mixture = isinstance(data.train, ConfigDict)
    parts = data.train.values() if mixture else [ConfigDict(dict(path=data.train, format=None, weight=None))]
    formats = {part.format or data.format for part in parts}
    reason = None
    if not formats <= _WITH_BLOCKS:
        reason = f"config.data.format={min(formats - _WITH_BLOCKS, key=str)} has no blocks"
    elif any(part.weight for part in parts):
        reason = "a mixture by weights has no order of blocks"
    elif blocks is not None and blocks < jax.process_count() and data.shuffle == "auto":
        reason = f"the data have {blocks} blocks, fewer than the {jax.process_count()} processes"
    if data.shuffle == "blocks" and reason:
        raise InputError(f"config.data.shuffle=blocks: {reason}. Expected rows, or auto")
    if data.shuffle == "auto":
        remote = any(storage.is_remote(part.path) for part in parts)  # of a list, any
        data.shuffle = "blocks" if remote and not reason else "rows"
        settles = data.shuffle == "rows" or blocks is not None
        if remote and settles and processes.is_first():
            print(f"chosen: data.shuffle={data.shuffle}" + (f": {reason}, so each row is a request" if reason else ""))
    return settled


def lanes(config: ConfigDict, blocks: int, size: int) -> ConfigDict:
    """The configuration with data.lanes, where the order is of blocks.

    Args:
      blocks: of the data.
      size: bytes of all of them. Each lane holds at least one, so the run takes no more lanes than fit a window.

    Raises:
      InputError: they do not divide the batch, do not divide over the processes, or are more than the blocks.
    """
    settled, count = configs.complete(config.to_dict()), jax.process_count()
    batch, data = settled.batch_size, settled.data
    if data.shuffle != "blocks":
        return settled
    with settled.ignore_type():
        if data.lanes is None:
            room = (data.window_mb << 20) * blocks // max(size, 1)
            most = max(min(blocks // _LANE_BLOCKS, room), count)
            data.lanes = math.gcd(64, batch, 1 << most.bit_length() - 1)
            if data.lanes % count:  # of three machines, say
                fit = [n for n in range(count, min(most, 64) + 1, count) if batch % n == 0]
                data.lanes = max(fit, default=data.lanes)
    if batch % data.lanes:
        raise InputError(f"config.data.lanes={data.lanes}. Expected a divisor of config.batch_size={batch}")
    if data.lanes % count:
        fit = [n for n in range(count, batch + 1, count) if batch % n == 0]
        near = min(fit, key=lambda n: abs(n - data.lanes), default=None)
        raise InputError(
            f"config.data.lanes={data.lanes} does not divide over {count} processes, each of which reads whole lanes. "
            "Start a number that divides it" + (f"; or, in a new run, set config.data.lanes={near}" if near else "")
        )
    if data.lanes > blocks:  # the run would wait forever for a lane without a block
        raise InputError(
            f"config.data.lanes={data.lanes}. Expected at most {blocks}, the number of blocks of the data. Set "
            "config.data.shuffle=rows; or make more blocks: a smaller config.data.block_rows, or Parquet of smaller "
            "row groups"
        )
    return settled


def packing(
    config: ConfigDict, captions: int, length: int, lengths_of: Callable[[], np.ndarray], resumes: bool
) -> ConfigDict:
    """The configuration with model.pack_text on or off, and for on model.pack_rows for a unit of so many captions.

    A run keeps what it has; only for units of another size, as on other devices, the rows are measured again.

    Args:
      length: tokens of a row.
      lengths_of: -> those of some captions, int (n,). Called in the first process alone.
    """
    settled, model = configs.complete(config.to_dict()), config.model
    if model.pack_text == "off" or (model.pack_text == "on" and model.pack_rows and model.pack_rows[1] == captions):
        return settled
    units = batch_shards(make_mesh(config.mesh)) * config.accumulate
    rows = int(processes.from_first(lambda: str(packed.rows_for(lengths_of(), captions, units, length))))
    on = model.pack_text == "on" or packed.worthwhile(rows, captions)
    with settled.ignore_type():
        settled.model.pack_text = "on" if on else "off"
        settled.model.pack_rows = (rows, captions) if on else None
    if processes.is_first() and (on or not resumes):
        _tell(config, settled, ["model.pack_text", "model.pack_rows"])
    return settled


def require(config: ConfigDict, who: str) -> None:
    """Raises InputError where `who`, which opens no data, needs what is open."""
    given = flatten(config.to_dict())
    needed = ("batch_size", "epochs", "model.name", "optim.lr", "optim.warmup_steps")
    if missing := [f"config.{key}" for key in needed if given[key] is None]:
        raise InputError(
            f"{who} needs {', '.join(missing)}, which it does not settle as training does; give values, such as those "
            "that a training prints after `chosen:`"
        )


def total_steps(config: ConfigDict, steps_per_epoch: int) -> int:
    """The run's number of steps. Raises InputError where a state could not count them."""
    steps = config.steps or config.epochs * steps_per_epoch
    if steps > _MOST_STEPS:
        key = "steps" if config.steps else "epochs"
        raise InputError(f"config.{key}={config[key]} gives {steps:,} steps. Expected at most {_MOST_STEPS:,}")
    return steps


def of_source(origin: Pretrained) -> dict[str, Any]:
    """Fields of config.model that give the architecture of a model: those of its run, or changes to a like preset."""
    if origin.run is not None:
        fields = configs.network(origin.run.model)
        return {key: fields[key] for key in ARCHITECTURE}
    config = origin.config
    near = max(models.PRESETS, key=lambda name: _alike(models.PRESETS[name], config))
    preset = models.PRESETS[near]
    towers = {
        "vision": _changed(preset.vision, config.vision),
        "text": _changed(preset.text, config.text, but=("vocab_size", "eot_id")),  # which are the tokenizer's
    }
    top = {key: towers[tower].pop(key, None) for key, tower in (("image_size", "vision"), ("context_length", "text"))}
    own = _changed(preset, config, but=("vision", "text"))
    return dict(name=near, embed_dim=None, activation=None) | own | top | towers


def _alike(preset: models.ClipConfig, config: models.ClipConfig) -> tuple[bool, int]:
    kinds = [(type(of.vision), getattr(of.vision, "pool", None), of.text.pool) for of in (preset, config)]
    if kinds[0] != kinds[1]:
        return False, 0
    return True, -len(_changed(preset.vision, config.vision)) - len(_changed(preset.text, config.text))


def _changed(preset: Any, other: Any, but: tuple[str, ...] = ()) -> dict[str, Any]:
    fields = [field.name for field in dataclasses.fields(preset) if field.name not in but]
    return {name: getattr(other, name) for name in fields if getattr(other, name) != getattr(preset, name)}


def _take(model: ConfigDict, fields: Mapping) -> None:
    """Writes fields of config.model that are not given."""
    for key, value in fields.items():
        if isinstance(value, Mapping):
            model[key] = dict(value) | model[key].to_dict()
        elif model[key] is None:
            model[key] = value


def _tell(given: ConfigDict, settled: ConfigDict, keys: list[str]) -> None:
    old, new = flatten(given.to_dict()), flatten(settled.to_dict())
    chosen = [key for key in new if any(f"{key}.".startswith(f"{of}.") for of in keys) and new[key] != old.get(key)]
    if chosen:
        said = "chosen: " + "  ".join(f"{key}={new[key]}" for key in chosen)
        print(textwrap.fill(said, 79, subsequent_indent="  ", break_long_words=False))
