"""Class names and prompts of a zero-shot protocol.

A protocol is a JSON file in `protocols/`. For each data set it has the prompts, and a table from the set's own label
names (ImageNet: WordNet ids), in the order of its tensorflow-datasets builder, to the names used in prompts. The table
is keyed by name, so it does not depend on how a source numbers its classes.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.evaluation.zero_shot import DEFAULT_TEMPLATES
from rankclip_jax.parallel import processes

PROTOCOLS = ("openai", "simple")
_FOLDER = Path(__file__).parent / "protocols"


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Classes of a set for the text tower.

    Attributes:
      names: C class names.
      templates: prompts, each with {} for the name.
      class_of_label: int32 (labels,): the class of each label of the source, -1 if the protocol leaves it out.
      keys: C label names as the set spells them, unique where two class names are equal.
    """

    names: list[str]
    templates: list[str]
    class_of_label: np.ndarray
    keys: list[str]


def prompts_of(name: str, spec: ConfigDict, found: Any) -> Prompts:
    """Class names and prompts of a set of config.eval.zero_shot; `found`: labelled.open_labelled's.

    WordNet ids get ImageNet's names and prompts also without a protocol.
    """
    protocol, set_name = spec.protocol, spec.protocol_set or name
    if spec.classes or found.from_file:
        own = protocol and not found.templates and templates_of(protocol, set_name)
        return plain(found.names, own or found.templates)
    wordnet = all(re.fullmatch(r"n\d{8}", label) for label in found.names)
    if wordnet and not protocol:
        if knows("openai", "imagenet", found.names):
            protocol, set_name = "openai", "imagenet"
        else:
            _say(f"{name}: the labels are WordNet ids, not all of ImageNet's 1,000; name them by classes")
    if not protocol:
        if all(label.isdigit() for label in found.names):
            _say(f"{name}: the classes are numbers, used in prompts as they are; name them in order: classes=FILE.json")
        return plain(found.names, found.templates)
    given = from_protocol(protocol, set_name, found.names)
    assumed = spec.format != "tfds" and assumed_order(protocol, set_name, found.names)
    if assumed:
        _say(f"{name}: {assumed}")
    if wordnet:
        _tell_classes(name, found, given)
    return dataclasses.replace(given, templates=check_templates(found.templates)) if spec.templates else given


def _tell_classes(name: str, found: Any, given: Prompts) -> None:
    labels = found.source.labels
    shown = len(given.names) if labels is None else len(np.unique(labels))
    if shown < 1000:
        _say(f"{name}: {shown:,} of ImageNet's 1,000 classes have pictures; ranked among {len(given.names):,}")


def _say(line: str) -> None:
    if processes.is_first():
        print(line, flush=True)


def plain(names: list[str], templates: list[str] | None = None) -> Prompts:
    """Names and prompts as given, one class per label; without prompts DEFAULT_TEMPLATES."""
    templates = check_templates(templates or DEFAULT_TEMPLATES)
    return Prompts(list(names), templates, np.arange(len(names), dtype=np.int32), list(names))


def check_templates(templates: Sequence[str]) -> list[str]:
    """Returns the prompts. Raises InputError for one without {}."""
    for template in templates:
        if "{}" not in template:
            raise InputError(f"prompt {template!r} has no {{}} for the class name; add it")
    return list(templates)


def from_protocol(protocol: str, set_name: str, label_names: list[str]) -> Prompts:
    """Class names and prompts of `set_name` by a named protocol.

    Args:
      protocol: one of PROTOCOLS.
      set_name: the set's name in the protocol's file, for example "imagenet_a".
      label_names: the source's label names in label order. If it has only numbers, "0", "1" ... (also "000", "001"),
        they are taken to be in the protocol's (TFDS's) order, see assumed_order.

    Raises:
      InputError: unknown protocol or set, or a label name that is not in its table.
    """
    table, only, templates = _set_of(protocol, set_name)
    if _numbered(label_names):
        if len(label_names) != len(table):
            raise InputError(
                f"{set_name} has {len(label_names)} numbered classes, but protocol {protocol!r} names {len(table)}"
            )
        label_names = list(table)
    unknown = [name for name in label_names if name not in table]
    if unknown:
        raise InputError(
            f"protocol {protocol!r} has no class {unknown[0]!r} in {set_name}. Expected one of {', '.join(table)[:60]}"
            " ...; to use other names, give them as JSON (classes=FILE.json)"
        )
    keys = [name for name in label_names if only is None or name in only]
    class_of = {key: number for number, key in enumerate(keys)}
    class_of_label = np.array([class_of.get(name, -1) for name in label_names], np.int32)
    return Prompts([table[key] for key in keys], list(templates), class_of_label, keys)


def knows(protocol: str, set_name: str, label_names: list[str]) -> bool:
    """Whether these can be label names of a set: all are in the protocol's table, or they are its numbers."""
    table = _set_of(protocol, set_name)[0]
    return set(label_names) <= set(table) or (len(label_names) == len(table) and _numbered(label_names))


def assumed_order(protocol: str, set_name: str, label_names: list[str]) -> str | None:
    """What from_protocol assumes of labels that are only numbers, in one line; None: nothing."""
    table = _set_of(protocol, set_name)[0]
    if not _numbered(label_names) or _numbered(list(table)):
        return None
    names = list(table.values())
    return (
        f"the labels are numbers without names; 0 is taken for {names[0]!r} and {len(names) - 1} for {names[-1]!r}, "
        f"the order of TFDS and of protocol {protocol!r}; if they are in another order, list the names in it: "
        "classes=FILE.json"
    )


def templates_of(protocol: str, set_name: str) -> list[str] | None:
    """The prompts of a protocol for a set; None if it does not have the set."""
    sets = load_protocol(load_protocol(protocol).get("names_of", protocol))["sets"]
    return list(_set_of(protocol, set_name)[2]) if set_name in sets else None


def _numbered(names: list[str]) -> bool:
    return all(name.isascii() and name.isdigit() for name in names) and list(map(int, names)) == list(range(len(names)))


def _set_of(protocol: str, set_name: str) -> tuple[dict, frozenset | None, list]:
    data = load_protocol(protocol)
    names = load_protocol(data["names_of"]) if "names_of" in data else data
    sets = names["sets"]
    if set_name not in sets:
        raise InputError(f"protocol {protocol!r} has no set {set_name!r}. Expected one of {', '.join(sorted(sets))}")
    entry = sets[set_name]
    whole = sets[entry.get("same_as", set_name)]
    only = frozenset(entry["only"]) if "only" in entry else None
    return whole["classes"], only, data.get("templates") or whole["templates"]


@functools.cache
def load_protocol(protocol: str) -> dict:
    """The JSON of a named protocol. Raises InputError for an unknown name."""
    if protocol not in PROTOCOLS:
        raise InputError(
            f"unknown protocol {protocol!r}. Expected one of {', '.join(PROTOCOLS)}; or give classes and templates as "
            "JSON files"
        )
    return json.loads((_FOLDER / f"{protocol}.json").read_text(encoding="utf-8"))
