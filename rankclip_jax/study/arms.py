"""What a study compares: every objective under every condition, each a configuration of its own."""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.config import complete, network


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
    for key, value, how in (
        ("steps", made.steps, "for config.epochs"),
        ("init_from", made.init_from, "from scratch"),
        ("data.two_views", made.data.two_views, "on one view of each picture"),
    ):
        if value:
            raise InputError(f"config.{key}={value!r} is not for a study, which trains {how}")
    if _architecture(made) != _architecture(config):
        raise InputError(f"config.study.conditions.{arm.condition} changes the network. A study compares one network")
    return made


def merged(fields: Mapping, changes: Mapping) -> dict:
    """`fields` with those of `changes`, group by group."""
    deep = lambda old, new: merged(old, new) if isinstance(old, Mapping) and isinstance(new, Mapping) else new  # noqa: E731
    return {**fields, **{key: deep(fields.get(key), value) for key, value in changes.items()}}


def _architecture(config):
    normal = {"mean": config.data.mean, "std": config.data.std}  # by which its pixels are normalised
    return normal | {k: v for k, v in network(config.model).items() if k not in ("logit_scale", "logit_bias")}
