"""A training run: open the data, open the state, run the steps, finish. Data flows one way and every room stays pure.

Where a run starts, in this order:
  1. WORKDIR has a complete checkpoint: its newest, with the exact place in the data;
  2. otherwise config.init_from: the parameters of a trained model, step 0;
  3. otherwise: fresh parameters from config.seed.
"""

import contextlib
import shlex
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from optax import GradientTransformation

from rankclip_jax import evaluation, figures
from rankclip_jax.common import packing, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole
from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.common.packing import Packed
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.models import ResNetConfig
from rankclip_jax.parallel import processes
from rankclip_jax.parallel.mesh import to_devices
from rankclip_jax.parallel.preemption import Notice, Preempted
from rankclip_jax.train import init_from, loggers, optim, resolve
from rankclip_jax.train import step as steps
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.train.input_wait import InputWait
from rankclip_jax.train.packed_batches import PackedBatches
from rankclip_jax.train.profile import Trace
from rankclip_jax.train.recorder import Recorder
from rankclip_jax.train.schedule import free_until, learning_rate
from rankclip_jax.train.session import Session, image_side
from rankclip_jax.weights import checkpoint, pretrained, saving
from rankclip_jax.weights.saving import Checkpoints

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
    position: int
    resumed: bool


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains to the end, resuming from the workdir's newest checkpoint.

    Raises:
      InputError: something in the configuration, the data or the workdir is wrong, or the loss stopped being finite.
      Preempted: SIGTERM or Ctrl-C came, to any of the processes, and the state is saved.
    """
    workdir = Path(workdir)
    loggers.check(config.log)
    if storage.is_remote(folder := checkpoint.folder_of(workdir, config.checkpoint)) and processes.is_first():
        saving.probe(folder)
    old = workdirs.check_same_run(workdir, config)
    origin = None if old else init_from.read(config)
    config, data = open_data(config, old, origin)
    held = _held(data)
    if old:
        workdirs.check_same_data(workdir, held)
    tx = optim.make_optimizer(config.optim, data.total_steps, data.steps_per_epoch)
    session = open_session(config, workdir, data, origin, resumes=old is not None)
    config = session.config
    abstract = steps.abstract_state(session.model, tx, session.mesh, config.sharding)
    with workdirs.claimed(workdir, config):  # only now, when all that was given proved right
        start = open_state(session, workdir, data, tx, abstract, origin)
        if old:
            workdirs.check_length(workdir, start.step, *(_length(each, data.steps_per_epoch) for each in (old, config)))
        if processes.is_first():
            workdirs.begin(workdir, config, session.tokenizer, held)
        if start.step >= data.total_steps and not _owes_evaluation(session, workdir, data, start):
            print(f"{storage.shown(workdir)} is trained to its last step, {start.step}")
            return
        length = data.total_steps, data.steps_per_epoch
        free = int(free_until(config.optim, *length)) if config.optim.schedule == "wsd" else None
        with Checkpoints(workdir, config.checkpoint, start.step if start.resumed else None, free) as checkpoints:
            batches = open_batches(session, workdir, data, start.position, data.total_steps - start.step)
            processes_said = f" of {session.process[1]} processes" if session.process[1] > 1 else ""
            print(
                f"training {config.model.name} ({_parameters(start.state):,} parameters) with "
                f"{config.loss.objective} on {data.source.size:,} samples: "
                f"{data.total_steps} steps of {config.batch_size} on "
                f"{session.devices.count} {session.devices.platform} device(s){processes_said}"
            )
            run_steps(session, workdir, data, tx, start, batches, checkpoints)
        finish(session, workdir, batches)


def open_data(
    config: ConfigDict, old: ConfigDict | None = None, origin: pretrained.Pretrained | None = None
) -> tuple[ConfigDict, Data]:
    """The data of a configuration: for training, validation and evaluation, all opened before anything is trained.

    Args, and the configuration that is returned: as of resolve.resolve.

    Raises:
      InputError: something cannot be read, or is too small. A set of config.eval.suite that is not there is only named.
    """
    from input_pipeline import captions, sources

    if config.data.train is None:
        raise InputError("config.data.train=None. Expected what to train on: rankclip train mine.csv")
    synonyms = captions.read_synonyms(config.data.synonyms) if config.data.synonyms else None
    source = sources.open_source(config.data, config.data.train, image_side=image_side(config))
    config = resolve.resolve(config, source.size, old, origin)
    side = image_side(config)
    steps_per_epoch = source.size // config.batch_size
    if not steps_per_epoch:
        raise InputError(f"config.batch_size={config.batch_size} is more than the {source.size} training samples")
    val = config.data.val and sources.open_source(config.data, config.data.val, image_side=side, split="val")
    if val and val.size < 2:
        raise InputError(f"config.data.val has {val.size} sample(s). Expected at least 2, or None")
    kinds = [kind for kind in evaluation.KINDS if kind == "zero_shot" or config.eval.every[kind] is not None]
    sets = evaluation.open_sets(config.eval, side, kinds)
    for name, reason in sets.missing.items():
        kind, _, own = name.partition("/")
        if own in config.eval[kind]:
            raise InputError(f"config.eval.{kind}.{own}: {reason}")
        print(f"missing: {name}: {reason}")
    return config, Data(source, val, sets, synonyms, steps_per_epoch, _length(config, steps_per_epoch)[0])


def open_session(
    config: ConfigDict, workdir: Path, data: Data, origin: pretrained.Pretrained | None, resumes: bool
) -> Session:
    """The session of a run, its packing settled. `origin`: what config.init_from names, where it starts."""

    def tokenizer() -> str:
        stored = workdirs.tokenizer_file(workdir, config)
        return (Tokenizer.load(stored) if resumes else _new_tokenizer(config, data.source, origin)).to_json()

    session = Session(config, Tokenizer.from_json(processes.from_first(tokenizer)))
    unit = session.unit_captions, session.context_length
    session.config = resolve.packing(session.config, *unit, lambda: _caption_lengths(session, data.source), resumes)
    return session


def open_state(
    session: Session,
    workdir: Path,
    data: Data,
    tx: GradientTransformation,
    abstract: steps.TrainState,
    origin: pretrained.Pretrained | None,
) -> Start:
    """The state of the newest checkpoint, or one before its first step. `abstract`: its shapes and shardings."""
    config = session.config
    restored = checkpoint.restore(workdir, config.checkpoint, abstract)
    if restored:
        print(f"resuming from step {restored.step} of {data.total_steps} in {storage.shown(workdir)}")
        return Start(restored.state, restored.step, _place(restored, session), True)
    state = steps.init_state(session.model, tx, config.seed, session.mesh, config.sharding)
    if origin:
        state = init_from.apply(state, origin, session.model.config, config)
    return Start(state, 0, 0, False)


def open_batches(session: Session, workdir: Path, data: Data, position: int, steps: int | None = None) -> Any:
    """The stream of batches from `position` on (input_pipeline.pipeline.TrainBatches), of which `steps` are wanted."""
    from input_pipeline import pipeline

    given = session.config.data
    return pipeline.TrainBatches(
        data.source,
        session.tokenizer,
        **session.view(session.local_batch),
        context_length=session.context_length,
        crop_scale=given.crop_scale,
        seed=session.config.seed,
        start=position,
        bad_path=workdir / workdirs.bad_samples(session.process[0]),
        max_bad_fraction=given.max_bad_fraction,
        recover_truncated=given.recover_truncated,
        two_views=given.two_views,
        synonyms=data.synonyms,
        batches=steps,
    )


def run_steps(
    session: Session,
    workdir: Path,
    data: Data,
    tx: GradientTransformation,
    start: Start,
    batches: Any,
    checkpoints: Checkpoints,
) -> None:
    """Step, record, evaluate, save, until the last step or until somebody asks to stop."""
    config, state = session.config, start.state
    batches = PackedBatches(session, batches, data.total_steps - start.step)
    length = dict(total_steps=data.total_steps, steps_per_epoch=data.steps_per_epoch)
    train_step = steps.make_train_step(session.model, tx, config, session.mesh, **length)
    rate, wait = learning_rate(config.optim, **length), InputWait(batches)
    began = dict(start=start.step, total_steps=data.total_steps, parameters=_parameters(state))
    compiled: set[bool] = set()  # the steps of packed batches, and of those that did not fit
    cadence = [n for n in (config.checkpoint.every_steps, config.checkpoint.keep_every) if n]
    with (
        Recorder(session, workdir, rate, wait.take, **began) as recorder,
        Trace(config.profile, workdir) as trace,
        Notice() as notice,
    ):
        if _owes_evaluation(session, workdir, data, start):
            _evaluate(session, state, data, start.step, recorder, checkpoints)
        for step, batch in zip(range(start.step + 1, data.total_steps + 1), wait, strict=False):
            trace.before(step)
            packed = isinstance(batch["tokens"], Packed)
            new, compiled = packed not in compiled, compiled | {packed}
            with _compiling(recorder) if new else contextlib.nullcontext():
                state, numbers = train_step(state, to_devices(batch, session.mesh))
            wait.step_started(numbers["loss"])
            recorder.take(step, numbers, packed)
            trace.after(step, numbers)
            last, terminated = step == data.total_steps, notice.reached(step)
            epoch_ends = last or step % data.steps_per_epoch == 0
            if epoch_ends or terminated or any(step % n == 0 for n in cadence):
                recorder.flush()  # raises on a loss that is not finite, before a bad state is saved
                checkpoints.save(step, state, batches.position)
                storage.push(workdir)
            if terminated and not last:
                name = storage.shown(workdir)
                resume = f"python -m rankclip_jax.train --workdir {shlex.quote(name)}"
                raise Preempted(f"saved step {step} in {name}; to resume: {resume}")
            if epoch_ends:
                _evaluate(session, state, data, step, recorder, checkpoints)


def _parameters(state: steps.TrainState) -> int:
    return sum(p.size for p in jax.tree.leaves(state.params))


def finish(session: Session, workdir: Path, batches: Any) -> None:
    """Says what could not be used, and draws the curves."""
    index, count = session.process
    if batches.bad.reasons:
        who = f"process {index} of {count}: " if count > 1 else ""
        said = f"{who}{batches.bad.summary()}; {storage.shown(workdir)}/{workdirs.bad_samples(index)} names them"
        print(said, file=sys.stderr if index else sys.stdout)
    if processes.is_first():
        with whole(workdir / "curves.png") as part:
            figures.curves({"": workdir}).savefig(part, format="png")
        print(f"curves: {storage.shown(workdir)}/curves.png")
        of = shlex.quote(storage.shown(workdir))
        layout = "openai" if isinstance(session.model.config.vision, ResNetConfig) else "hf"
        print(
            f"next:\n  python -m rankclip_jax.train --workdir {of} --mode=eval\n"
            f"  python -m rankclip_jax.report {of} --out report.html\n"
            f"  python -m rankclip_jax.convert {of} exported --to {layout}"
        )


def _held(data: Data) -> dict[str, dict | None]:
    """What the workdir notes of the data, so that a run that resumes notices others."""
    from input_pipeline.sources.fingerprint import fingerprint

    def of(source):
        return {"samples": source.size, "fingerprint": fingerprint(source)} if source else None

    held = {"train": of(data.source), "val": of(data.val)}
    if len(set(processes.of_all(zlib.crc32(str(held).encode()) >> 1))) > 1:
        raise InputError("the processes see different data in config.data.train or config.data.val")
    return held


def _length(config: ConfigDict, steps_per_epoch: int) -> tuple[int, float]:
    """The run's number of steps, and of those at its start whose rates would be the same in a longer one."""
    total_steps = resolve.total_steps(config, steps_per_epoch)
    return total_steps, free_until(config.optim, total_steps, steps_per_epoch)


@contextlib.contextmanager
def _compiling(recorder: Recorder) -> Iterator[None]:
    """Around a program's first step, whose call returns when it is compiled: says how long that took."""
    print("compiling the step ...", flush=True)
    begin = time.monotonic()
    with recorder.paused():
        yield
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)


def _kinds_due(session: Session, data: Data, step: int) -> tuple[str, ...]:
    last = step >= data.total_steps
    if not last and step % data.steps_per_epoch:
        return ()
    return evaluation.due(session.config.eval, step // data.steps_per_epoch, last)


def _owes_evaluation(session: Session, workdir: Path, data: Data, start: Start) -> bool:
    """Whether a run stopped between the save at the end of an epoch and the evaluation after it."""
    kinds = _kinds_due(session, data, start.step)
    something = any(data.sets.opened[kind] for kind in kinds) or (data.val and "zero_shot" in kinds)
    if not start.resumed or not something:
        return False

    def owes() -> str:
        rows = [row for row in read_metrics(workdir) if row["step"] == start.step]
        return "" if any("/" in key or key == "failed" for row in rows for key in row) else "yes"

    return bool(processes.from_first(owes))


def _evaluate(
    session: Session,
    state: steps.TrainState,
    data: Data,
    step: int,
    recorder: Recorder,
    checkpoints: Checkpoints,
) -> None:
    """Prints and records the evaluations that are due after this step. What fails is named, and training continues."""
    kinds = _kinds_due(session, data, step)
    if not kinds:
        return
    shown: dict[str, dict] | None = {} if recorder.shows else None
    with recorder.paused():
        encoder = session.encoder(state)
        results = evaluation.evaluate(session.config.eval, encoder, data.sets, kinds=kinds, shown=shown)
        failed = {name: why for name, why in results["missing"].items() if name not in data.sets.missing}
        numbers = evaluation.flat(results)
        if data.val and "zero_shot" in kinds:
            with evaluation.one_set("config.data.val", failed):
                numbers |= session.validation(state, data.val)
        recorder.show(step, shown or {})
    print(f"after epoch {step // data.steps_per_epoch}, step {step}:")
    print(evaluation.lines(results | {"missing": failed}, numbers), end="", flush=True)
    recorder.write(step, numbers, counts=evaluation.counts(results), failed=failed)
    checkpoints.score(step, numbers)


def _place(restored: checkpoint.Restored, session: Session) -> int:
    from input_pipeline import pipeline

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
