"""Starting from a trained model instead of from scratch: config.init_from, .init_towers and .init_skip."""

import dataclasses
import math
import re
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.common.trees import by_name, path_name
from rankclip_jax.models import ClipConfig
from rankclip_jax.train import average, rules
from rankclip_jax.train.step import AveragedState, Fresh, TrainState
from rankclip_jax.weights import pretrained

TOWERS = {"both": ("visual", "text", "logit_scale", "logit_bias"), "vision": ("visual",), "text": ("text",)}
_BEGINNINGS = ("logit_scale", "logit_bias")  # keys of config.model that say what a fresh one starts at


def read(config: ConfigDict) -> pretrained.Pretrained | None:
    """The model of config.init_from; None without one. Raises InputError as `pretrained.read` does."""
    if config.init_from is None:
        return None
    tokenizer = config.tokenizer.path if "text" in TOWERS[config.init_towers] else None
    return pretrained.read(config.init_from, tokenizer, config.model.activation or "quick_gelu")


def tokenizer(start: pretrained.Pretrained, config: ConfigDict) -> Tokenizer | None:
    """The tokenizer that goes with the text tower; None when that starts fresh, and any will do.

    Raises:
      InputError: the text tower is wanted, and there is no tokenizer for it.
    """
    if "text" not in TOWERS[config.init_towers]:
        return None
    if start.tokenizer is None:
        raise InputError(
            f"config.init_from = {start.path} has no tokenizer; give --config.tokenizer.path=tokenizer.json (or a "
            "hub id), the one that its text tower was trained with, or --config.init_towers=vision"
        )
    return start.tokenizer


def apply(fresh: Fresh, start: pretrained.Pretrained, ours: ClipConfig, config: ConfigDict) -> TrainState:
    """A fresh state with the parameters (and batch statistics) of `start` in place of its own, which are not drawn.

    A vision tower's position embeddings are resized to another image size, a text tower's cut to a shorter context.
    What config.init_skip (regexes over paths such as visual/proj) matches stays fresh. Prints what came from where.

    Args:
      fresh: the state of the model before its first step.
      ours: the model's architecture.

    Raises:
      InputError: names every parameter that does not fit, or a pattern of config.init_skip that matches none.
    """
    taking = _Taking(start, ours, config)
    taken: dict[str, Any] = {name: taking.of(name, getattr(fresh.abstract, name)) for name in ("params", "batch_stats")}
    taking.check()
    step = "" if start.step is None else f", step {start.step}"
    print(f"starting from {start.path}{step} ({config.init_towers})" + "".join(f"; {note}" for note in taking.notes))
    if isinstance(fresh.abstract, AveragedState):
        taken["ema"] = jax.tree.map(lambda _: 0, fresh.abstract.ema)  # below, when all parameters are there
    state = fresh.state(dataclasses.replace(fresh.abstract, **taken))  # moments are zero whatever the parameters
    if isinstance(state, AveragedState):
        return dataclasses.replace(state, ema=average.begin(state.params, state.batch_stats, config.optim))
    return state


class _Taking:
    """What is taken from a model, leaf by leaf. `notes`: what was not taken as it is; `misfits`: what does not fit."""

    def __init__(self, start: pretrained.Pretrained, ours: ClipConfig, config: ConfigDict):
        self._start, self._ours, self._config = start, ours, config
        self._towers = TOWERS[config.init_towers]
        self._unused = set(config.init_skip)
        self.notes, self.misfits = [], _unlike(ours, start.config, self._towers)

    def of(self, collection: str, fresh: dict) -> dict:
        """The tree of shapes `fresh`, with the start's values where they are taken."""
        theirs = self._start.variables.get(collection, {})
        if collection == "params" and self._start.loss_bias is not None:
            theirs = theirs | {"logit_bias": self._start.loss_bias}
        theirs = by_name(models.stack_layers(theirs) if self._config.model.scan_layers else theirs)
        taken = jax.tree_util.tree_map_with_path(lambda path, x: self._leaf(path_name(path), x, theirs), fresh)
        here = by_name(fresh)
        gone = [name for name in theirs if name.split("/")[0] in self._towers and name not in here]
        self.misfits += [f"{name} is not here" for name in gone if name != "logit_bias"]
        return taken

    def _leaf(self, name, fresh, theirs):
        if name.split("/")[0] not in self._towers:
            return fresh
        skip = self._config.init_skip
        names = rules.block_names(name, fresh)
        matching = [[p for p in skip if re.search(p, one) or re.search(p, name)] for one in names]
        self._unused.difference_update(*matching)
        if any(matching):
            if not all(matching):
                self.misfits.append(f"{name}: config.init_skip names a part of it; name all, or do not scan layers")
            self.notes.append(f"{name} fresh")
            return fresh
        value = self._fitting(name, theirs.get(name), fresh.shape)
        if value is None:
            return fresh
        if name in _BEGINNINGS and (wanted := self._config.model[name]) is not None:
            self.misfits.append(f"config.model.{name}={wanted} is the start of a fresh one")
        return jax.make_array_from_callback(fresh.shape, fresh.sharding, lambda index: value[index])

    def _fitting(self, name, value, shape):
        """The start's value in our shape; None, and perhaps a misfit, where there is none."""
        if value is None:
            if name != "logit_bias":  # of SigLIP's loss, which the other was not trained with
                self.misfits.append(f"{name} is not there")
            return None
        if value.shape == shape:
            return value
        resized = _resized(name, value, shape, self._ours, self._start.config)
        if resized is None:
            self.misfits.append(f"{name} is {value.shape} there, {shape} here")
        else:
            how = "cut" if name == "text/positional_embedding" else "resized"
            self.notes.append(f"{name} {how} from {value.shape} to {shape}")
        return resized

    def check(self) -> None:
        """Raises InputError as `apply` does."""
        if self.misfits:
            raise InputError(
                f"config.init_from = {self._start.path} does not fit config.model: {'; '.join(self.misfits)}. Set "
                "config.model to its architecture, or name in config.init_skip what should start fresh"
            )
        if self._unused:
            raise InputError(f"config.init_skip: {sorted(self._unused)[0]!r} matches no parameter of the towers taken")


def _unlike(ours: ClipConfig, theirs: ClipConfig, towers: Collection[str]) -> list[str]:
    """What differs without showing in a shape."""
    found = []
    for tower, here, there in (("visual", ours.vision, theirs.vision), ("text", ours.text, theirs.text)):
        if tower not in towers:
            continue
        transformer = not isinstance(here, models.ResNetConfig)
        if getattr(here, "pool", None) != getattr(there, "pool", None):
            found.append(f"{tower} is of another kind (pool {getattr(there, 'pool', None)!r} there)")
        if type(here) is type(there) and here.heads != there.heads:
            found.append(f"{tower} has {there.heads} heads there, {here.heads} here")
        if transformer and ours.activation != theirs.activation:
            found.append(f"{tower} has activation {theirs.activation} there, {ours.activation} here")
    return list(dict.fromkeys(found))


def _resized(
    name: str, value: np.ndarray, shape: tuple[int, ...], ours: ClipConfig, theirs: ClipConfig
) -> np.ndarray | None:
    """Position embeddings `value` for another length; None if `name` is something else or cannot be resized."""
    if not name.endswith("positional_embedding") or value.shape[1:] != shape[1:]:
        return None
    if name == "text/positional_embedding":  # attention is causal: the first positions mean the same in a shorter text
        return value[: shape[0]] if ours.text.causal and shape[0] < value.shape[0] else None
    tokens, their_tokens = (int(getattr(of.vision, "pool", None) != "map") for of in (ours, theirs))
    if tokens != their_tokens:
        return None
    return resize_grid(value, math.isqrt(shape[0] - tokens), tokens)


def resize_grid(positions_LxD: np.ndarray, grid: int, tokens: int = 1) -> np.ndarray:
    """Position embeddings of a class (or mean) token, where there is one, and g x g cells -> (1 + grid * grid, D).

    Antialiased bicubic over the cells, as open_clip does (PyTorch's `interpolate`, antialias=True); the first stays.
    """
    first, cells = positions_LxD[:tokens], positions_LxD[tokens:]
    old = math.isqrt(len(cells))
    cells = jax.image.resize(jnp.asarray(cells).reshape(old, old, -1), (grid, grid, cells.shape[-1]), "cubic")
    return np.concatenate([first, np.asarray(cells).reshape(grid * grid, -1)])
