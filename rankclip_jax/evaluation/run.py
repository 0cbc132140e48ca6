"""Runs the evaluations of a configuration, for the trainer and for --mode=eval.

A set that cannot be opened does not stop the others: `missing` says which one, where it was expected and how to get it.
"""

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.progress import progress
from rankclip_jax.evaluation import geometry, linear_probe, prompts, retrieval, robustness, suite, zero_shot
from rankclip_jax.evaluation.artifacts import Artifacts
from rankclip_jax.parallel import processes

KINDS = ("zero_shot", "retrieval", "linear_probe", "geometry")


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The functions of a model that evaluations use.

    Attributes:
      images: a batch of `batches` -> float32 (b, D) of unit norm, this process's share.
      texts: any number of texts -> float32 (n, D) of unit norm.
      batches: source -> the batches of input_pipeline's eval_batches: "mask", "row" and "label" (b,), and the inputs
        of `images`.
      image_side: side of the model's input images, pixels.
      device: of the mesh and this process; a linear probe is fitted on it.
    """

    images: Callable[[dict], np.ndarray]
    texts: Callable[[list[str]], np.ndarray]
    batches: Callable[[Any], Iterator[dict]]
    image_side: int
    device: jax.Device


def due(config: ConfigDict, epoch: int, last: bool) -> tuple[str, ...]:
    """The KINDS that config.eval schedules at the end of this epoch (from 1); the last runs all scheduled ones."""
    every = {"zero_shot": config.every_epochs} | dict(config.every)
    every = {kind: config.every_epochs if n == 0 else n for kind, n in every.items()}
    return tuple(kind for kind in KINDS if every[kind] and (last or epoch % every[kind] == 0))


class Sets(NamedTuple):
    """Evaluation sets, opened: kind -> name -> (its fields of config.eval, what input_pipeline.labelled made of it).

    `missing`: "kind/name" -> why a set could not be opened, in one line.
    """

    opened: dict[str, dict[str, tuple[ConfigDict, Any]]]
    missing: dict[str, str]


def open_sets(config: ConfigDict, image_side: int, kinds: Sequence[str] = KINDS) -> Sets:
    """Opens every set that config.eval names for `kinds`. One that cannot be opened does not stop the others.

    Raises:
      InputError: config.eval.suite or config.eval.robustness.baselines is wrong.
    """
    from input_pipeline import labelled

    if config.robustness.baselines:  # a wrong file is found now, not after hours of evaluation
        robustness.read_baselines(config.robustness.baselines)
    openers = {
        "zero_shot": (suite.zero_shot_sets(config), labelled.open_labelled),
        "retrieval": (config.retrieval, labelled.open_captioned),
        "linear_probe": (config.linear_probe, labelled.open_train_and_test),
        "geometry": (config.geometry, labelled.open_captioned),
    }
    sets = Sets({kind: {} for kind in kinds}, {})
    for kind in kinds:
        specs, open_set = openers[kind]
        for name, spec in specs.items():
            with one_set(f"{kind}/{name}", sets.missing):
                found = open_set(spec, image_side=image_side)
                if kind == "zero_shot":
                    found = found, prompts.prompts_of(name, spec, found)
                sets.opened[kind][name] = spec, found
        sets.opened[kind] = _without(sets.missing, kind, sets.opened[kind])
    return sets


def evaluate(
    config: ConfigDict,
    encoder: Encoder,
    sets: Sets,
    *,
    kinds: Sequence[str] = KINDS,
    folder: Path | None = None,
    shown: dict[str, dict] | None = None,
) -> dict:
    """Results by kind and set: {"zero_shot": {name: numbers}, "retrieval": ..., "missing": {"kind/name": reason}}.

    A set whose evaluation fails is missing, with the reason, and the others are evaluated all the same.

    Args:
      config: config.eval.
      sets: as `open_sets` gives them, for at least these kinds.
      kinds: which of KINDS to run; robustness comes with zero_shot.
      folder: for the report's files (evaluation/artifacts.py); None: writes none.
      shown: filled with examples and galleries, as Artifacts does it.
    """
    artifacts, results, missing = Artifacts(folder, shown), {}, {}
    missing |= {name: why for name, why in sets.missing.items() if name.split("/")[0] in kinds}

    def each(kind, compute):
        rows = {}
        for name, (spec, found) in sets.opened[kind].items():
            with one_set(f"{kind}/{name}", missing):
                rows[name] = compute(name, spec, found)
        return _without(missing, kind, rows)

    if "zero_shot" in kinds:
        found = {name: found for name, (_, found) in sets.opened["zero_shot"].items()}
        results |= _zero_shot(config.robustness, encoder, found, artifacts, missing)
    if "retrieval" in kinds:
        results["retrieval"] = each("retrieval", functools.partial(_retrieval, encoder, artifacts))
    if "linear_probe" in kinds:
        results["linear_probe"] = each("linear_probe", functools.partial(_linear_probe, encoder))
    if "geometry" in kinds:
        results["geometry"] = each("geometry", functools.partial(_geometry, encoder, artifacts))
    return results | {"missing": missing}


@contextlib.contextmanager
def one_set(name: str, missing: dict[str, str]) -> Iterator[None]:
    """What fails inside, of whatever kind, costs this set alone: hours of training hang on it.

    It is missing in all processes then; those where it did not fail say so.
    """
    why = None
    try:
        yield
    except InputError as error:
        why = str(error)
    except Exception as error:
        why = one_line(error, kind=True)
    failed = [index for index, bad in enumerate(processes.of_all(why is not None)) if bad]
    if why and not processes.is_first():
        print(f"process {jax.process_index()}: {name}: {why}", file=sys.stderr, flush=True)
    if failed:
        missing[name] = why or f"failed in process {failed[0]}, whose log says why"


def _without(missing: Mapping[str, str], kind: str, rows: dict) -> dict:
    """What other processes failed at, is no result here."""
    return {name: row for name, row in rows.items() if f"{kind}/{name}" not in missing}


def _encoded(encoder: Encoder, source: Any, what: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches (embeddings (n, D), labels (n,), rows (n,)) that contain every usable sample of all processes once."""
    with progress(what, source.size) as bar:
        for batch in agreed(encoder.batches(source)):
            parts = encoder.images(batch), batch["label"], batch["row"], batch["mask"]
            if jax.process_count() > 1:
                parts = jax.tree.map(np.concatenate, multihost_utils.process_allgather(parts))
            z, labels, rows, mask = parts
            bar.update(int(mask.sum()))
            yield z[mask], labels[mask], rows[mask]


def agreed(batches: Iterator[dict]) -> Iterator[dict]:
    """The batches of this process, as long as every process has its own: else all of them stop, and none waits.

    Raises what reading raises here; InputError in the other processes.
    """
    error = None
    while True:
        try:
            batch = next(batches, None)
        except Exception as raised:
            batch, error = None, raised
        states = processes.of_all(2 if error else batch is not None)
        if error:
            raise error
        if 2 in states:
            raise InputError("another process could not read its share of the set; its log says why")
        if batch is None:
            return
        yield batch


def _all_encoded(encoder, source, what):
    """All batches of `_encoded` concatenated, in order of the rows."""
    parts = list(_encoded(encoder, source, what))
    z, labels, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not len(rows):
        raise InputError("no readable image in this set")
    order = np.argsort(rows)
    return z[order], labels[order], rows[order]


def _zero_shot(config: ConfigDict, encoder: Encoder, sets: dict, artifacts: Artifacts, missing: dict) -> dict:
    known: dict = {}
    results: dict[str, dict] = {}
    on_shared: dict[str, float] = {}
    shifted = {name: sets[name] for name in config.shifted if name in sets}
    for name, (found, classes) in sets.items():
        with one_set(f"zero_shot/{name}", missing):
            z_CxD = zero_shot.class_embeddings(encoder.texts, classes.names, classes.templates, known)
            counter = zero_shot.ZeroShot(z_CxD)
            subsets = _shared(classes, z_CxD, shifted) if name == config.reference else {}
            seen = []
            for z, labels, rows in _encoded(encoder, found.source, name):
                labels = classes.class_of_label[labels]
                kept = labels >= 0  # a protocol may exclude classes
                seen.append((rows[kept], labels[kept], counter.add(z[kept], labels[kept])))
                for place, sub in subsets.values():
                    inside = kept & (place[labels] >= 0)
                    sub.add(z[inside], place[labels[inside]])
            results[name] = _checked(counter.results)
            occurring = {other: sub for other, (_, sub) in subsets.items() if sub.confusion_CxC.any()}
            on_shared |= {other: sub.results()["top1"] for other, sub in occurring.items()}
            artifacts.confusion(name, classes.names, counter.confusion_CxC)
            rows_N, labels_N, predicted_N = (np.concatenate(part) for part in zip(*seen, strict=True))
            artifacts.examples(name, found.source, rows_N, labels_N, predicted_N, classes.names)
    baselines = robustness.read_baselines(config.baselines) if config.baselines else {}
    results = _without(missing, "zero_shot", results)
    rows = {
        name: robustness.table_row(results[name]["top1"], on_shared[name], baselines.get(name))
        for name in on_shared
        if name in results
    }
    return {"zero_shot": results, "robustness": rows}


def _shared(classes: prompts.Prompts, z_CxD: np.ndarray, shifted: dict) -> dict:
    """Per shifted set: the place of each class among those that the two share, and a counter of these."""
    subsets = {}
    for other, (_, their) in shifted.items():
        shared = robustness.shared_classes(classes.keys, their.keys)
        if shared is None:  # the two number their classes differently: compare names
            shared = robustness.shared_classes(classes.names, their.names)
        if shared is not None:
            place = np.full(len(classes.keys), -1)
            place[shared] = np.arange(len(shared))
            subsets[other] = place, zero_shot.ZeroShot(z_CxD[shared])
    return subsets


def _checked(compute):
    try:
        return compute()
    except ValueError as error:
        raise InputError(str(error)) from None


def _retrieval(encoder: Encoder, artifacts: Artifacts, name: str, spec: ConfigDict, found: Any) -> dict:
    z_img, _, rows = _all_encoded(encoder, found.source, name)
    usable = np.isin(found.image_of_text, rows)  # an unreadable image is left out with its captions
    captions = [caption for caption, good in zip(found.captions, usable, strict=True) if good]
    image_of_text = np.searchsorted(rows, found.image_of_text[usable])
    z_txt = encoder.texts(captions)
    ranks = retrieval.retrieval_ranks(z_img, z_txt, image_of_text)
    artifacts.gallery(name, found.source, rows, captions, image_of_text, z_img, z_txt, ranks)
    return retrieval.recalls(*ranks)


def _linear_probe(encoder: Encoder, name: str, spec: ConfigDict, pair: tuple) -> dict:
    train, test = (_all_encoded(encoder, found.source, name)[:2] for found in pair)
    report = lambda line: print(f"{name}: {line}", flush=True)  # noqa: E731
    classes = len(pair[0].names)
    arguments = {"classes": classes, "metric": spec.metric, "device": encoder.device, "report": report}
    return _checked(lambda: linear_probe.linear_probe(train, test, **arguments)) | {"classes": classes}


def _geometry(encoder: Encoder, artifacts: Artifacts, name: str, spec: ConfigDict, found: Any) -> dict:
    # The first images, each with its first caption. Rows come in order, so reading can stop early.
    z_img, rows = [], []
    for z, _, some in _encoded(encoder, found.source, name):
        z_img.append(z)
        rows.append(some)
        if sum(map(len, rows)) >= spec.sample:
            break
    z_img, rows = np.concatenate(z_img)[: spec.sample], np.concatenate(rows)[: spec.sample]
    if not len(rows):
        raise InputError("no readable image in this set")
    images, first = np.unique(found.image_of_text, return_index=True)
    captions = [found.captions[first[np.searchsorted(images, row)]] for row in rows]
    z_txt = encoder.texts(captions)
    artifacts.geometry(name, z_img, z_txt, captions)
    return _checked(lambda: geometry.geometry(z_img, z_txt))
