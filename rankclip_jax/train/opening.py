"""What a run opens before its first step: its data, its session, its state, its batches.

Where it starts, in this order:
  1. WORKDIR has a complete checkpoint: its newest, with the exact place in the data;
  2. otherwise config.init_from: the parameters of a trained model, step 0;
  3. otherwise: fresh parameters from config.seed.
"""

import difflib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rankclip_jax import evaluation
from rankclip_jax.common import packing, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import INDEX
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.parallel import processes
from rankclip_jax.train import init_from, resolve
from rankclip_jax.train import step as steps
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.train.schedule import free_until, patch_dropout_steps
from rankclip_jax.train.session import Session, image_side
from rankclip_jax.weights import checkpoint, pretrained

_MEASURED = 16  # rows of each of 256 blocks of the training data, on whose captions the packing is settled


class Data(NamedTuple):
    """What is trained on, validated and evaluated on, and for how long.

    steps_per_epoch leaves out a last batch that would not be full; `val`: None without config.data.val.
    """

    source: Any
    val: Any
    sets: evaluation.Sets
    synonyms: Mapping | None
    steps_per_epoch: int
    total_steps: int


class Start(NamedTuple):
    """Where a run starts: `state` has done `step` steps, and `position` is this process's place in the data."""

    state: steps.TrainState
    step: int
    position: int | tuple[int, ...]
    resumed: bool


def open_data(
    config: ConfigDict,
    old: ConfigDict | None = None,
    origin: pretrained.Pretrained | None = None,
    workdir: Path | None = None,
) -> tuple[ConfigDict, Data]:
    """The data of a configuration: for training, validation and evaluation, all opened before anything is trained.

    `workdir`: where processes exchange what they find. Other args, and the configuration returned: as of
    resolve.resolve.

    Raises:
      InputError: something cannot be read, or is too small. A set of config.eval.suite that is not there is only named.
    """
    from input_pipeline import captions, sources

    if config.data.train is None:
        raise InputError("config.data.train=None. Expected what to train on: rankclip train mine.csv")
    if config.eval.model is not None:
        raise InputError(f"config.eval.model={config.eval.model!r}. Expected None in training; or --mode=eval")
    synonyms = captions.read_synonyms(config.data.synonyms) if config.data.synonyms else None
    given, config, peers = config, resolve.order(config, old), None
    if workdir:
        folder = storage.join(storage.origin(workdir) or str(workdir.resolve()), INDEX)
        peers = sources.Peers((jax.process_index(), jax.process_count()), folder, processes.of_all)

    def opened(config):
        return sources.open_source(config.data, config.data.train, image_side=image_side(config), peers=peers)

    source = opened(config)
    if source.blocks:
        config = resolve.order(given, old, len(source.blocks.first))
        source = source if config.data.shuffle == "blocks" else opened(config)
    config = resolve.resolve(config, source.size, old, origin)
    blocks, size = (len(source.blocks.first), source.blocks.size) if source.blocks else (0, 0)
    config = resolve.lanes(config, blocks, size)
    side = image_side(config)
    steps_per_epoch = source.size // config.batch_size
    if not steps_per_epoch:
        raise InputError(f"config.batch_size={config.batch_size} is more than the {source.size} training samples")
    val = config.data.val
    val = val and sources.open_source(config.data, val, image_side=side, split="val", peers=peers)
    if val and val.size < 2:
        raise InputError(f"config.data.val has {val.size} sample(s). Expected at least 2, or None")
    kinds = [kind for kind in evaluation.KINDS if kind == "zero_shot" or config.eval.every[kind] is not None]
    sets = evaluation.open_sets(config.eval, side, kinds)
    for name, reason in sets.missing.items():
        kind, _, own = name.partition("/")
        if own in config.eval[kind]:
            raise InputError(f"config.eval.{kind}.{own}: {reason}")
        print(f"missing: {name}: {reason}")
    _check_best(config, sets)
    return config, Data(source, val, sets, synonyms, steps_per_epoch, run_length(config, steps_per_epoch)[0])


def _check_best(config: ConfigDict, sets: evaluation.Sets) -> None:
    """Raises InputError where config.checkpoint.best is not a number that this training will evaluate."""
    best = config.checkpoint.best
    if best is None:
        return
    from rankclip_jax.figures.names import GEOMETRY  # matplotlib, which no step needs

    names = evaluation.number_names(config.eval, sets)
    if config.data.val is not None:
        z_BxD = jax.ShapeDtypeStruct((config.batch_size, 2), jnp.float32)
        losses = jax.eval_shape(steps.objective_of(config), {"logit_scale": jnp.float32(0)}, z_BxD, z_BxD)
        names += [f"val/{key}" for key in (*losses, *(GEOMETRY if config.eval.diagnostics else ()))]
    if config.optim.ema is not None:
        names += [f"{name}/ema" if name.startswith("val/") else "/ema/".join(name.rsplit("/", 1)) for name in names]
    if best not in names:
        sets_of = dict.fromkeys(f"{name.rpartition('/')[0]}/" for name in names)
        why = f"it evaluates {', '.join(sets_of) or 'nothing'}"
        if "/ema/" in f"{best}/" and config.optim.ema is None:
            why = "config.optim.ema=None"
        elif near := difflib.get_close_matches(best, names, 1):
            why += f"; the nearest is {near[0]}"
        raise InputError(f"config.checkpoint.best={best!r} is not a number that this training evaluates: {why}")


def open_session(
    config: ConfigDict, workdir: Path, data: Data, origin: pretrained.Pretrained | None, resumes: bool
) -> Session:
    """The session of a run, its packing settled. `origin`: what config.init_from names, where it starts."""

    def tokenizer() -> str:
        if resumes:
            return Tokenizer.load(workdirs.tokenizer_file(workdir, config)).to_json()
        return _new_tokenizer(config, data.source, origin).to_json()

    session = Session(config, Tokenizer.from_json(processes.from_first(tokenizer)))
    unit = session.unit_captions, session.context_length
    session.config = resolve.packing(session.config, *unit, lambda: _caption_lengths(session, data.source), resumes)
    return session


def open_state(
    session: Session, workdir: Path, data: Data, fresh: steps.Fresh, origin: pretrained.Pretrained | None
) -> Start:
    """The state of the newest checkpoint, or one before its first step."""
    config = session.config
    restored = checkpoint.restore(workdir, config.checkpoint, fresh.abstract)
    if restored:
        print(f"resuming from step {restored.step} of {data.total_steps} in {storage.shown(workdir)}")
        return Start(restored.state, restored.step, _place(restored, session), True)
    state = init_from.apply(fresh, origin, session.model.config, config) if origin else fresh.state()
    return Start(state, 0, 0, False)


def open_batches(session: Session, workdir: Path, data: Data, start: Start) -> Any:
    """The batches of the steps that are left (input_pipeline.pipeline.TrainBatches)."""
    from input_pipeline import blocks, pipeline

    given, order = session.config.data, None
    if given.shuffle == "blocks":
        found, window = data.source.blocks, given.window_mb << 20
        order = blocks.BlockOrder(found, seed=session.config.seed, lanes=given.lanes, window_bytes=window)
        held = 2 * order.window_bytes * given.lanes / session.process[1]
        print(
            f"{len(found.first):,} blocks of up to {found.rows.max()} rows, in {given.lanes} lanes with windows of "
            f"{order.window_blocks}: up to {held / 2**20:,.0f} MiB of them are in the memory of a process"
        )
    return pipeline.TrainBatches(
        data.source,
        session.tokenizer,
        **session.view(session.local_batch),
        context_length=session.context_length,
        crop_scale=given.crop_scale,
        seed=session.config.seed,
        start=start.position,
        order=order,
        bad_path=workdir / workdirs.bad_samples(session.process[0]),
        max_bad_fraction=given.max_bad_fraction,
        recover_truncated=given.recover_truncated,
        two_views=given.two_views,
        synonyms=data.synonyms,
        batches=data.total_steps - start.step,
    )


def data_record(data: Data) -> dict[str, dict | None]:
    """What the workdir stores about the data, so that a run that resumes notices other data.

    Raises:
      InputError: the processes see different data.
    """
    record = {"train": _described(data.source), "val": _described(data.val)}
    if len(set(processes.of_all(zlib.crc32(str(record).encode())))) > 1:
        raise InputError("the processes see different data in config.data.train or config.data.val")
    return record


def data_record_of_before(data: Data, name: str) -> dict | None:
    """What an earlier version stored about config.data.train or .val."""
    return _described(data.source if name == "train" else data.val, before=True)


def _described(source: Any, before: bool = False) -> dict | None:
    from input_pipeline.sources.fingerprint import fingerprint

    return {"samples": source.size, "fingerprint": fingerprint(source, before)} if source else None


def run_length(config: ConfigDict, steps_per_epoch: int) -> tuple[int, float]:
    """The run's number of steps, and of those at its start that would be the same in a longer one."""
    total_steps = resolve.total_steps(config, steps_per_epoch)
    free = free_until(config.optim, total_steps, steps_per_epoch)
    if config.model.vision.patch_dropout and 0 < config.model.vision.patch_dropout_until < 1:
        free = min(free, patch_dropout_steps(config.model.vision, total_steps))
    return total_steps, free


def _place(restored: checkpoint.Restored, session: Session) -> int | tuple[int, ...]:
    from input_pipeline import pipeline

    if session.config.data.shuffle == "blocks":
        index, count = session.process
        own = session.config.data.lanes // count
        return tuple(restored.positions[index * own : (index + 1) * own])
    position, passed_over = pipeline.resume_at(restored.positions, session.config.batch_size, session.process)
    if passed_over:
        before, now = len(restored.positions), session.process[1]
        print(f"{before} processes saved it, {now} resume: {passed_over} samples are not seen this epoch")
    return position


def _caption_lengths(session: Session, source: Any) -> np.ndarray:
    from input_pipeline.sources.source import read_captions

    captions = list(read_captions(source, _MEASURED))
    tokens = session.tokenizer(captions or [""], session.context_length)
    return packing.lengths(tokens, session.tokenizer.eot_id)


def _new_tokenizer(config: ConfigDict, source: Any, origin: Any) -> Tokenizer:
    if origin and (tokenizer := init_from.tokenizer(origin, config)):
        return tokenizer
    if config.tokenizer.path:
        return Tokenizer.load(config.tokenizer.path)
    print(f"training a tokenizer on the captions of {source.size:,} samples", flush=True)
    return Tokenizer.train(source.captions(), config.tokenizer.vocab_size)
