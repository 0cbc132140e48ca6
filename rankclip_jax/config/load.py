"""The merge of an experiment's file and of the command line over the defaults of config_keys.py, with its checks.

An experiment in `configs/` says only what it changes. `complete` fills in the rest and refuses a key that does
not exist, naming the nearest one that does, so a typing error cannot silently train something else.
"""

import ast
import difflib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import flatten
from rankclip_jax.config.keys import (
    EVAL_SETS,
    MAY_CHANGE,
    MIXTURE_PART,
    OBJECTIVES,
    SCHEDULES,
    TERMS,
    default_config,
)


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration of the command line, complete and checked.

    Args:
      spec: file of an experiment, with an argument for its get_config after a colon: configs/cc3m.py:model=RN50.
      overrides: "key.of.a.group=value", values as Python literals; what is no literal is a string.

    Raises:
      InputError: no such file, or what `complete` refuses.
    """
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        raise InputError(f"--config: no file {path}; the experiments are in configs/, for example configs/shapes.py")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"--config: {path} is no Python file; the experiments are in configs/ and end in .py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = (module.get_config(argument) if argument else module.get_config()).to_dict()
    return complete(override(config, overrides))


def stored(workdir: str | Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration that a workdir was trained with, complete and checked, with `overrides` as in `load`.

    Raises:
      InputError: there is none, it is damaged, or what `complete` refuses.
    """
    path = Path(workdir) / "config.json"
    try:
        return complete(override(json.loads(path.read_text()), overrides))
    except FileNotFoundError:
        raise InputError(f"{workdir} holds no run (no config.json); give --config FILE to start one") from None
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); bring it back from a copy, or give --config FILE") from None


def override(config: dict, overrides: Sequence[str]) -> dict:
    """Writes "key.of.a.group=value" of the command line into a nested dict; returns it."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--config.{text}: write --config.{text}=VALUE")
        group = config
        *parents, last = key.split(".")
        for parent in parents:
            group = group.setdefault(parent, {})
        try:
            group[last] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            group[last] = value
    return config


def complete(config: Mapping) -> ConfigDict:
    """Returns the defaults with `config` merged over them.

    Raises:
      InputError: a key that does not exist, or a value of another type than the default's.
    """
    merged = default_config()
    _merge(merged, config, "config")
    for kind, fields in EVAL_SETS.items():
        for name in merged.eval[kind]:
            spec = ConfigDict(fields)
            _merge(spec, merged.eval[kind][name], f"config.eval.{kind}.{name}")
            merged.eval[kind][name] = spec
    for split in ("train", "val"):
        if isinstance(merged.data[split], Mapping | ConfigDict):
            merged.data[split] = _mixture(merged.data[split], f"config.data.{split}")
    _check_choice(merged, "loss.objective", OBJECTIVES)
    for term, weight in merged.loss.terms.items():
        if term not in TERMS:
            raise InputError(f"config.loss.terms.{term} does not exist; the terms are {', '.join(TERMS)}")
        merged.loss.terms[term] = _term_weight(weight, f"config.loss.terms.{term}")
    if merged.profile is not None and not (len(merged.profile) == 2 and 1 <= merged.profile[0] <= merged.profile[1]):
        raise InputError(f"config.profile = {merged.profile}: give (first, last), steps counted from 1")
    _check_choice(merged, "loss.form", ("exact", "released"))
    _check_choice(merged, "loss.schedule", SCHEDULES)
    _check_choice(merged, "loss.decay", (None, "log"))
    _check_choice(merged, "init_towers", ("both", "vision", "text"))
    _check_choice(merged, "optim.freeze", (None, "vision", "text"))
    _check_choice(merged, "data.resize", ("device", "host"))
    _check_choice(merged, "model.dtype", ("float32", "bfloat16"))
    _check_choice(merged, "model.attention", ("auto", "xla", "cudnn"))
    if merged.data.two_views and merged.loss.objective in ("rank", "siglip") and not merged.loss.terms.get("clip"):
        raise InputError(
            f"config.data.two_views adds to the contrastive term, which objective = {merged.loss.objective} lacks; "
            "take another config.loss.objective, or add config.loss.terms.clip=1.0"
        )
    return merged


def _term_weight(weight: Any, where: str) -> Any:
    if not isinstance(weight, Mapping | ConfigDict):
        return _typed(weight, 1.0, where)
    if set(weight) != {"weight", "schedule"} or weight["schedule"] not in SCHEDULES:
        schedules = " or ".join(SCHEDULES)
        raise InputError(f'{where}: write a number, or {{"weight": 0.25, "schedule": {schedules}}}; got {weight!r}')
    return ConfigDict(dict(weight=_typed(weight["weight"], 1.0, f"{where}.weight"), schedule=weight["schedule"]))


def _mixture(parts: Mapping, where: str) -> ConfigDict:
    mixture = ConfigDict()
    for name in parts:
        if not isinstance(parts[name], Mapping | ConfigDict):
            raise InputError(f"{where}.{name} is a group of keys, such as path and weight; got {parts[name]!r}")
        part = ConfigDict(MIXTURE_PART)
        _merge(part, parts[name], f"{where}.{name}")
        mixture[name] = part
    return mixture


# Groups whose keys are the user's own (names, axes, fields of a preset): taken as they come.
_OPEN_GROUPS = (
    "config.loss.terms",
    "config.model.vision",
    "config.model.text",
    "config.mesh",
    "config.study.objectives",
    "config.study.more_seeds",
    *(f"config.eval.{kind}" for kind in EVAL_SETS),
)


def _merge(into: ConfigDict, values: Mapping, where: str) -> None:
    if where == "config.mesh":
        for axis in list(into):  # a mesh is given whole, not axis by axis
            del into[axis]
    for key in values:
        value = values[key]
        path = f"{where}.{key}"
        if where in _OPEN_GROUPS:
            into[key] = value
        elif key not in into:
            near = difflib.get_close_matches(key, list(into), n=1, cutoff=0.0)
            raise InputError(f"{path} does not exist; the nearest key is {where}.{near[0]}")
        elif isinstance(into[key], ConfigDict):
            if not isinstance(value, Mapping | ConfigDict):
                raise InputError(f"{path} is a group of keys, not a value; got {value!r}")
            _merge(into[key], value, path)
        else:
            with into.unlocked(), into.ignore_type():
                into[key] = _typed(value, into[key], path)


def _typed(value: Any, default: Any, path: str) -> Any:
    if default is None or value is None or path == "config.model.remat":  # a switch, or the name of a policy
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, tuple) and isinstance(value, list):
        return tuple(value)
    if type(value) is not type(default):
        raise InputError(f"{path} must be a {type(default).__name__}; got {value!r}")
    return value


def _check_choice(config: ConfigDict, key: str, choices: tuple) -> None:
    value = config
    for name in key.split("."):
        value = value[name]
    if value not in choices:
        raise InputError(f"config.{key} must be one of {', '.join(map(str, choices))}; got {value!r}")


def to_json(config: ConfigDict) -> str:
    """The configuration as stored in a workdir's config.json."""
    return json.dumps(config.to_dict(), indent=2)


def differences(old: Mapping, new: Mapping) -> list[str]:
    """One "key: old -> new" a differing key, except those that a resumed run may change."""
    old, new = json.loads(json.dumps(old)), json.loads(json.dumps(new))
    flat_old, flat_new = flatten(old), flatten(new)
    return [
        f"config.{key}: {flat_old.get(key)!r} -> {flat_new.get(key)!r}"
        for key in sorted(flat_old | flat_new)
        if flat_old.get(key) != flat_new.get(key) and not f"{key}.".startswith(tuple(f"{k}." for k in MAY_CHANGE))
    ]
