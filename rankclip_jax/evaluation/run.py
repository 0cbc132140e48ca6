"""Runs the evaluations of a configuration, for the trainer and for --mode=eval.

A set that cannot be opened does not stop the others: `missing` says which one, where it was expected and how to get it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.progress import progress
from rankclip_jax.evaluation import geometry, linear_probe, prompts, retrieval, robustness, suite, zero_shot
from rankclip_jax.evaluation.artifacts import Artifacts

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
    """

    images: Callable[[dict], np.ndarray]
    texts: Callable[[list[str]], np.ndarray]
    batches: Callable[[Any], Iterator[dict]]
    image_side: int


def due(config: ConfigDict, epoch: int, last: bool) -> tuple[str, ...]:
    """The KINDS that config.eval schedules at the end of this epoch (from 1); the last runs all scheduled ones."""
    every = {"zero_shot": config.every_epochs} | dict(config.every)
    return tuple(kind for kind in KINDS if every[kind] and (last or epoch % every[kind] == 0))


def evaluate(config: ConfigDict, encoder: Encoder, *, kinds: Sequence[str] = KINDS, folder: Path | None = None) -> dict:
    """Results by kind and set: {"zero_shot": {name: numbers}, "retrieval": ..., "missing": {"kind/name": reason}}.

    Args:
      config: config.eval.
      kinds: which of KINDS to run; robustness comes with zero_shot.
      folder: for the report's files (evaluation/artifacts.py); None: writes none.
    """
    from input_pipeline import labelled

    artifacts, results, missing = Artifacts(folder), {}, {}

    def each(kind, specs, open_set, compute):
        rows = {}
        for name, spec in specs.items():
            try:
                rows[name] = compute(name, spec, open_set(spec, image_side=encoder.image_side))
            except InputError as error:
                missing[f"{kind}/{name}"] = str(error)
        return rows

    if "zero_shot" in kinds:
        # All are opened before any is evaluated: the robustness reference set needs the classes of the others.
        sets = each("zero_shot", suite.zero_shot_sets(config), labelled.open_labelled, _with_prompts)
        results |= _zero_shot(config.robustness, encoder, sets, artifacts, missing)
    if "retrieval" in kinds:
        results["retrieval"] = each(
            "retrieval", config.retrieval, labelled.open_captioned, functools.partial(_retrieval, encoder, artifacts)
        )
    if "linear_probe" in kinds:
        results["linear_probe"] = each(
            "linear_probe", config.linear_probe, labelled.open_train_and_test, functools.partial(_linear_probe, encoder)
        )
    if "geometry" in kinds:
        results["geometry"] = each(
            "geometry", config.geometry, labelled.open_captioned, functools.partial(_geometry, encoder, artifacts)
        )
    return results | {"missing": missing}


def _with_prompts(name, spec, found):
    return found, prompts_of(name, spec, found)


def prompts_of(name: str, spec: ConfigDict, found: Any) -> prompts.Prompts:
    """Class names and prompts of a set of config.eval.zero_shot; `found`: labelled.open_labelled's."""
    if spec.protocol and not (spec.classes or found.from_file):
        given = prompts.from_protocol(spec.protocol, spec.protocol_set or name, found.names)
        return (
            dataclasses.replace(given, templates=prompts.check_templates(found.templates)) if spec.templates else given
        )
    return prompts.plain(found.names, found.templates)


def _encoded(encoder: Encoder, source: Any, what: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches (embeddings (n, D), labels (n,), rows (n,)) that contain every usable sample of all processes once."""
    with progress(what, source.size) as bar:
        for batch in encoder.batches(source):
            parts = encoder.images(batch), batch["label"], batch["row"], batch["mask"]
            if jax.process_count() > 1:
                parts = jax.tree.map(np.concatenate, multihost_utils.process_allgather(parts))
            z, labels, rows, mask = parts
            bar.update(int(mask.sum()))
            yield z[mask], labels[mask], rows[mask]


def _all_encoded(encoder, source, what):
    """All batches of `_encoded` concatenated, in order of the rows."""
    parts = list(_encoded(encoder, source, what))
    z, labels, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
    if not len(rows):
        raise InputError("no readable image in this set")
    order = np.argsort(rows)
    return z[order], labels[order], rows[order]


def _zero_shot(config: ConfigDict, encoder: Encoder, sets: dict, artifacts: Artifacts, missing: dict) -> dict:
    known, results, on_shared = {}, {}, {}
    shifted = {name: sets[name] for name in config.shifted if name in sets}
    for name, (found, classes) in sets.items():
        z_CxD = zero_shot.class_embeddings(encoder.texts, classes.names, classes.templates, known)
        counter, subsets = zero_shot.ZeroShot(z_CxD), {}
        if name == config.reference:
            for other, (_, their) in shifted.items():
                shared = robustness.shared_classes(classes.keys, their.keys)
                if shared is None:  # the two number their classes differently: compare names
                    shared = robustness.shared_classes(classes.names, their.names)
                if shared is not None:
                    place = np.full(len(classes.keys), -1)
                    place[shared] = np.arange(len(shared))
                    subsets[other] = place, zero_shot.ZeroShot(z_CxD[shared])
        for z, labels, _ in _encoded(encoder, found.source, name):
            labels = classes.class_of_label[labels]
            kept = labels >= 0  # a protocol may exclude classes
            counter.add(z[kept], labels[kept])
            for place, sub in subsets.values():
                inside = kept & (place[labels] >= 0)
                sub.add(z[inside], place[labels[inside]])
        try:
            results[name] = counter.results()
            on_shared |= {other: sub.results()["top1"] for other, (_, sub) in subsets.items()}
        except ValueError as error:
            missing[f"zero_shot/{name}"] = str(error)
            continue
        artifacts.confusion(name, classes.names, counter.confusion_CxC)
    baselines = robustness.read_baselines(config.baselines) if config.baselines else {}
    rows = {
        name: robustness.table_row(results[name]["top1"], on_shared[name], baselines.get(name))
        for name in on_shared
        if name in results
    }
    return {"zero_shot": results, "robustness": rows}


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
    artifacts.gallery(name, found.source, rows, captions, image_of_text, z_img, z_txt)
    return retrieval.recalls(*ranks)


def _linear_probe(encoder: Encoder, name: str, spec: ConfigDict, pair: tuple) -> dict:
    train, test = (_all_encoded(encoder, found.source, name)[:2] for found in pair)
    report = lambda line: print(f"{name}: {line}", flush=True)  # noqa: E731
    return _checked(
        lambda: linear_probe.linear_probe(train, test, classes=len(pair[0].names), metric=spec.metric, report=report)
    )


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
