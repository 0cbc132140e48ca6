"""What a study compares: every objective under every condition, each a configuration of its own."""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete, network
from rankclip_jax.train.step import loss_spec

# Keys that a study cannot obey, what they must be, and why.
_MUST_BE = (
    ("steps", (None,), "trains for config.epochs"),
    ("init_from", (None,), "trains from scratch"),
    ("sharding", (None, "replicated"), "trains on one device"),
    ("data.two_views", (False,), "trains on one view of each picture"),
    ("data.resize", ("device",), "resizes on the device"),
    ("data.shuffle", ("auto", "rows"), "shuffles all pairs, which are in memory"),
    ("eval.retrieval", ({},), "evaluates data.val and eval.zero_shot"),
    ("eval.linear_probe", ({},), "evaluates data.val and eval.zero_shot"),
    ("eval.geometry", ({},), "evaluates data.val and eval.zero_shot"),
    ("eval.diagnostics", (False,), "evaluates data.val and eval.zero_shot"),
    ("checkpoint.folder", (None,), "keeps no checkpoints"),
    ("checkpoint.every_steps", (None,), "keeps no checkpoints"),
    ("checkpoint.keep_every", (None,), "keeps no checkpoints"),
    ("checkpoint.best", (None,), "keeps no checkpoints"),
    ("profile", (None,), "traces no steps"),
)
# What is read and made once for all arms: no condition may change it.
_OF_ALL = ("data.val", "data.canvas", "data.squash", "tokenizer", "eval.zero_shot", "eval.suite", "eval.data_dir")

_OF_DATA = {"limit", "mismatched", "duplicates"}  # keys of config.study that a condition may change


class Arm(NamedTuple):
    """An objective under a condition ("": the configuration as it is); `str` gives it as config.study names it."""

    condition: str
    objective: str

    def __str__(self) -> str:
        return f"{self.condition}/{self.objective}" if self.condition else self.objective


def arms_of(config: ConfigDict) -> list[Arm]:
    """In the order in which they are trained. Raises InputError for names that config.study does not declare."""
    study = config.study
    if not study.objectives:
        raise InputError("config.study.objectives is empty: name them, as configs/study_shapes.py does")
    for key, what in (("objectives", "keys of config.loss"), ("conditions", "groups of the configuration")):
        for name, given in study[key].items():
            if not isinstance(given, ConfigDict):
                raise InputError(f"config.study.{key}.{name}={given!r}. Expected changed {what}")
    conditions = {name: given.to_dict() for name, given in study.conditions.items()} or {"": {}}
    named = {"baseline": [study.baseline], "more_seeds": list(study.more_seeds)}
    chosen = {name: list(given.pop("objectives", study.objectives)) for name, given in conditions.items()}
    for key, names in (named | {f"conditions.{name}.objectives": some for name, some in chosen.items()}).items():
        if unknown := sorted(set(names) - set(study.objectives)):
            known = ", ".join(study.objectives)
            raise InputError(f"config.study.{key}: unknown objective {unknown[0]!r}. Expected one of {known}")
    return [Arm(condition, name) for condition, names in chosen.items() for name in names]


def config_of(config: ConfigDict, arm: Arm) -> ConfigDict:
    """The training configuration of an arm. Raises InputError for what a study does not train, or where its condition
    changes the network."""
    changes = config.study.conditions[arm.condition].to_dict() if arm.condition else {}
    changes.pop("objectives", None)
    fields = merged(config.to_dict(), changes)
    fields["loss"] = fields["loss"] | config.study.objectives[arm.objective].to_dict()
    made = complete(fields)
    for key, allowed, how in _MUST_BE:
        if _at(made, key) not in allowed:
            raise InputError(f"config.{key}={_at(made, key)!r} is not for a study, which {how}")
    if made.eval.every_epochs is None:
        raise InputError("config.eval.every_epochs=None. Expected a number: a study does not settle it")
    of_study = [f"study.{key}" for key in config.study if key not in _OF_DATA]
    for key in (*_OF_ALL, *of_study, *(["optim.lr"] if len(config.study.lrs) else [])):
        if _at(made, key) != _at(config, key):
            how = "is chosen from config.study.lrs" if key == "optim.lr" else "is one for all arms"
            raise InputError(f"config.study.conditions.{arm.condition} changes config.{key}, which {how}")
    if _architecture(made) != _architecture(config):
        raise InputError(f"config.study.conditions.{arm.condition} changes the network. A study compares one network")
    if (made.loss.ramp_epochs or made.epochs) == 1 and (terms := loss_spec(made).ramped()):
        raise InputError(
            f"config.study.objectives.{arm.objective} would train without {', '.join(terms)}, whose ramp begins with "
            "the second epoch, and there is one. Set loss.schedule=constant, or config.epochs=2 or more"
        )
    return made


def merged(fields: Mapping, changes: Mapping) -> dict:
    """`fields` with those of `changes`, group by group."""
    deep = lambda old, new: merged(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new  # noqa: E731
    return {**fields, **{key: deep(fields.get(key), value) for key, value in changes.items()}}


def _at(config, key):
    for part in key.split("."):
        config = config[part]
    return config.to_dict() if isinstance(config, ConfigDict) else config


def _architecture(config):
    normal = {"mean": config.data.mean, "std": config.data.std}  # by which its pixels are normalised
    return normal | {k: v for k, v in network(config.model).items() if k not in ("logit_scale", "logit_bias")}
