"""The merge of an experiment's file and of the command line over the defaults of keys.py, with its checks.

An experiment in `configs/` says only what it changes. `complete` fills in the rest and refuses a key that does
not exist, naming the nearest one that does, so a typing error cannot silently train something else.
"""

import ast
import difflib
import importlib.util
import inspect
import json
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.trees import flatten
from rankclip_jax.config import contradictions, experiments
from rankclip_jax.config.fields import EVAL_SETS, MIXTURE_PART, PARAMETER_RULE
from rankclip_jax.config.guess import guess_format
from rankclip_jax.config.key import Key, integer, real
from rankclip_jax.config.keys import (
    ARCHITECTURE,
    BEFORE,
    KEYS,
    MAY_CHANGE,
    OPEN,
    RESOLVED,
    SCHEDULES,
    TERMS,
    WHOLE,
    defaults,
)

_OF_TRAINING = tuple(cast(Any, KEYS["model"])["vision"])  # what config.model.vision holds beside fields of the preset


def load(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration of the command line, complete and checked.

    Args:
      spec: name or file of an experiment, with arguments for its get_config after a colon: cc3m:model=RN50.
      overrides: "key.of.a.group=value"; a value that is not a Python literal is a string.

    Raises:
      InputError: no such file, no such argument, whatever its code raises, or what `complete` refuses.
    """
    name, _, arguments = spec.partition(":")
    path = experiments.find(name)
    if path is None:
        raise InputError(f"--config: no file {name}; the experiments are {', '.join(experiments.names())}")
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise InputError(f"--config: {path} is no Python file; the experiments are in configs/ and end in .py")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise InputError(f"--config: {path} has no get_config(); see those in configs/")
        known = list(inspect.signature(module.get_config).parameters)
        given = module.get_config(**_arguments(spec, arguments, known))
    except InputError:
        raise
    except (Exception, SystemExit) as error:  # whatever the file's own code raises
        raise InputError(f"--config={spec}: {_place(error, path)}{one_line(error, kind=True)}") from error
    return complete(override(_group(given, f"--config={spec}: get_config()"), overrides))


def _place(error: BaseException, path: Path) -> str:
    """Where in a file an exception comes from: "line 3: "; "" where it does not come from there."""
    if isinstance(error, SyntaxError):
        return ""  # which says so itself
    frames, file = traceback.extract_tb(error.__traceback__), str(path.absolute())
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f"line {lines[-1]}: " if lines else ""


def _arguments(spec: str, text: str, known: Sequence[str]) -> dict[str, str]:
    """"objective=clip,model=RN50" -> what get_config takes by these names."""
    given = {}
    for part in text.split(",") if text else ():
        name, equals, value = part.partition("=")
        if not (equals and value and name in known):
            expected = ", ".join(f"{name}=..." for name in known) or "none"
            raise InputError(f"--config={spec}: argument {part!r}. Expected {expected}")
        given[name] = value
    return given


def completed(stored: Mapping) -> ConfigDict:
    """The configuration of a run that may be older than some keys: these have the value of its time (keys.BEFORE).

    What it ignored has its default. Raises: as `complete`.
    """
    known = flatten(stored)
    older = {key: value for key, value in BEFORE.items() if key not in known}
    merged = _typed(override(json.loads(json.dumps(stored)), [f"{key}={value!r}" for key, value in older.items()]))
    contradictions.forget_ignored(merged)
    return complete(merged.to_dict())


def with_stored(config: ConfigDict, stored: ConfigDict) -> ConfigDict:
    """`config`, with what it leaves open (None, auto) as the run of `stored` settled it."""
    filled, old = complete(config.to_dict()), stored.to_dict()
    with filled.ignore_type():
        for key in RESOLVED:
            *parents, last = key.split(".")
            group, theirs = filled, old
            for parent in parents:
                group, theirs = group[parent], theirs[parent]
            if group[last] in (None, "auto"):
                group[last] = theirs[last]
        if filled.model.name is None:
            for key in ARCHITECTURE:
                given, theirs = filled.model[key], old["model"][key]
                if isinstance(theirs, Mapping):
                    filled.model[key] = theirs | given.to_dict()
                elif given is None:
                    filled.model[key] = theirs
    return filled


def network(model: ConfigDict) -> dict[str, Any]:
    """The keys of config.model that make the network, and not how it is trained: no packing, no patch dropout."""
    fields = {key: value for key, value in model.to_dict().items() if key not in ("pack_text", "pack_rows")}
    return fields | {"vision": {k: v for k, v in fields["vision"].items() if k not in _OF_TRAINING}}


def override(config: dict, overrides: Sequence[str]) -> dict:
    """Writes "key.of.a.group=value" of the command line into a nested dict; returns it."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"--config.{text}: write --config.{text}=VALUE")
        group = config
        *parents, last = key.split(".")
        for number, parent in enumerate(parents):
            if group.get(parent) is None:
                group[parent] = {}
            group = group[parent]
            if not isinstance(group, dict):
                inner = ".".join(parents[: number + 1])
                raise InputError(f"config.{key} does not exist: config.{inner}={group!r} is not a group of keys")
        try:
            given = ast.literal_eval(value)
        except (ValueError, TypeError, SyntaxError, RecursionError):
            given = value
        known: Any = KEYS
        for name in (*parents, last):
            known = known.get(name) if isinstance(known, Mapping) else None
        group[last] = _over(group.get(last), given, known, f"config.{key}")
    return config


def _over(old: Any, given: Any, known: Any, where: str) -> Any:
    """`given` in place of `old`; of a group of our keys only those that it names."""
    groups = isinstance(old, dict) and isinstance(given, dict) and isinstance(known, Mapping) and known
    if not groups or where in WHOLE:
        return given
    return old | {name: _over(old.get(name), one, known.get(name), f"{where}.{name}") for name, one in given.items()}


def complete(config: Mapping) -> ConfigDict:
    """Returns the defaults with `config` merged over them.

    Raises:
      InputError: a key that does not exist, a value of the wrong type or outside its range, keys that contradict each
        other, or one that means nothing beside the others.
    """
    merged = _typed(config)
    contradictions.check(merged)
    return merged


def _typed(config: Mapping) -> ConfigDict:
    """As `complete`, each key checked alone."""
    _check_names(config, "config")
    merged = ConfigDict(_merged(KEYS, config, "config"))
    with merged.ignore_type():
        for kind in EVAL_SETS:
            for name, given in merged.eval[kind].items():
                merged.eval[kind][name] = ConfigDict(_merged(EVAL_SETS[kind], given, f"config.eval.{kind}.{name}"))
        train = merged.data.train
        if merged.data.format is None and isinstance(train, str | tuple):
            merged.data.format = guess_format(train if isinstance(train, str) else train[0])
        for split in ("train", "val"):
            if isinstance(merged.data[split], Mapping | ConfigDict):
                merged.data[split] = _mixture(merged.data[split], f"config.data.{split}")
        for term, weight in merged.loss.terms.items():
            merged.loss.terms[term] = _term_weight(weight, term)
    for axis, size in merged.mesh.items():
        integer(1, -1).check(size, f"config.mesh.{axis}")
        if not size:
            raise InputError(f"config.mesh.{axis}=0. Expected a number of devices, or -1 for all remaining")
    for name, count in merged.study.more_seeds.items():
        integer(1, 1).check(count, f"config.study.more_seeds.{name}")
    with merged.ignore_type():
        merged.optim.rules = tuple(_parameter_rule(number, *rule) for number, rule in enumerate(merged.optim.rules))
    return merged


def _check_names(given: Mapping, where: str) -> None:
    for name, value in given.items():
        if not isinstance(name, str) or "." in name:  # dots separate groups
            raise InputError(f"{where} has a key {name!r}. Expected a string without dots")
        if isinstance(value, Mapping | ConfigDict):
            _check_names(value, f"{where}.{name}")


def _parameter_rule(number: int, pattern: str, fields: Mapping) -> tuple[str, dict]:
    where = f"config.optim.rules[{number}]"
    checked = _merged(PARAMETER_RULE, fields, where)
    if checked["freeze"] and len(fields) > 1:
        others = " and ".join(name for name in fields if name != "freeze")
        raise InputError(f"{where} of {pattern!r} freezes and gives {others}. Expected one or the other")
    return pattern, {name: checked[name] for name in fields}


def eval_set(kind: str, given: Mapping, where: str | None = None) -> ConfigDict:
    """The fields of one set of config.eval.KIND, complete and checked; raises as `complete` does."""
    where = where or f"config.eval.{kind}"
    fields = ConfigDict(_merged(EVAL_SETS[kind], given, where))
    contradictions.check_set(kind, fields, where)
    return fields


def _term_weight(weight: Any, term: str) -> float | ConfigDict:
    where = f"config.loss.terms.{term}"
    if term not in TERMS:
        raise InputError(f"{where} does not exist. Expected one of {', '.join(TERMS)}")
    if not isinstance(weight, Mapping | ConfigDict):
        return real(1.0).check(weight, where)
    weight = _group(weight, where)
    if set(weight) != {"weight", "schedule"} or weight["schedule"] not in SCHEDULES:
        schedules = " or ".join(SCHEDULES)
        raise InputError(f'{where}={dict(weight)}. Expected a number, or {{"weight": 0.25, "schedule": {schedules}}}')
    checked = real(1.0).check(weight["weight"], f"{where}.weight")
    return ConfigDict(dict(weight=checked, schedule=weight["schedule"]))


def _mixture(parts: Mapping, where: str) -> ConfigDict:
    mixture = ConfigDict()
    for name in parts:
        mixture[name] = ConfigDict(_merged(MIXTURE_PART, _group(parts[name], f"{where}.{name}"), f"{where}.{name}"))
    return mixture


def _group(value: Any, where: str) -> dict:
    if not isinstance(value, Mapping | ConfigDict):
        raise InputError(f"{where}={value!r}. Expected a group of keys, {{name: value}}")
    return value.to_dict() if isinstance(value, ConfigDict) else dict(value)


def _merged(keys: Mapping, given: Any, where: str) -> dict:
    """The defaults of `keys` with what was given over them, checked key by key."""
    given = _group(given, where)
    if where == "config.mesh" and given:
        return given
    if not keys:  # a group whose keys are the user's own
        return given
    others = {name: value for name, value in given.items() if name not in keys}
    for name in others:
        if where not in OPEN:
            raise InputError(f"{where}.{name} does not exist; the nearest key is {_nearest(name, where, keys)}")
    merged = {}
    for name, key in keys.items():
        path = f"{where}.{name}"
        if isinstance(key, Key):
            merged[name] = key.check(given[name], path) if name in given else key.default
        elif isinstance(key, Mapping):
            merged[name] = _merged(key, given.get(name, {}), path)
        else:  # a mesh axis
            merged[name] = given.get(name, key)
    return merged | others


def _nearest(name: str, where: str, keys: Mapping) -> str:
    """The key that was probably meant: in the same group, or of the same name anywhere."""
    near = difflib.get_close_matches(name, list(keys), n=1)
    everywhere = [f"config.{key}" for key in flatten(defaults(KEYS))]
    same = [key for key in everywhere if key.rpartition(".")[2] == name]
    if same and not near:
        return same[0]
    return f"{where}.{near[0]}" if near else difflib.get_close_matches(f"{where}.{name}", everywhere, 1, 0.0)[0]


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
