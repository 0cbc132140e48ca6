"""A training run: open the data, open the state, run the steps, finish. Data flows one way and every room stays pure.

Where a run starts, in this order:
  1. WORKDIR has a complete checkpoint: its newest, with the exact place in the data;
  2. otherwise config.init_from: the parameters of a trained model, step 0;
  3. otherwise: fresh parameters from config.seed.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict
from optax import GradientTransformation

from rankclip_jax import config as configs
from rankclip_jax import evaluation, figures
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole, write_whole
from rankclip_jax.common.ownership import Owned
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.parallel import processes
from rankclip_jax.parallel.mesh import to_devices
from rankclip_jax.parallel.preemption import Notice, Preempted
from rankclip_jax.train import init_from, optim
from rankclip_jax.train import step as steps
from rankclip_jax.train.input_wait import InputWait
from rankclip_jax.train.profile import Trace
from rankclip_jax.train.recorder import Recorder
from rankclip_jax.train.session import Session, image_side
from rankclip_jax.weights import checkpoint


class Data(NamedTuple):
    """What is trained on, and for how long: steps_per_epoch leaves out a last batch that would not be full."""

    source: Any
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
      Preempted: SIGTERM came, to any of the processes, and the state is saved.
    """
    workdir = Path(workdir)
    data = open_data(config)
    tx = optim.make_optimizer(config.optim, data.total_steps, data.steps_per_epoch)
    session, start = open_state(config, workdir, data, tx)
    if start.step >= data.total_steps:
        print(f"{workdir} is trained to its last step, {start.step}")
        return
    with checkpoint.Checkpoints(workdir, config.checkpoint, start.step if start.resumed else None) as checkpoints:
        batches = open_batches(session, workdir, data, start.position)
        parameters = sum(p.size for p in jax.tree.leaves(start.state.params))
        processes_said = f" of {session.process[1]} processes" if session.process[1] > 1 else ""
        print(
            f"training {config.model.name} ({parameters:,} parameters) with {config.loss.objective} on "
            f"{data.source.size:,} samples: {data.total_steps} steps of {config.batch_size} on {session.devices.count} "
            f"{session.devices.platform} device(s){processes_said}"
        )
        run_steps(session, workdir, data, tx, start, batches, checkpoints)
    finish(session, workdir, batches)


def open_data(config: ConfigDict) -> Data:
    """The training data of a configuration, and its steps. Raises InputError for what cannot be read."""
    from input_pipeline import captions, sources

    synonyms = captions.read_synonyms(config.data.synonyms) if config.data.synonyms else None
    source = sources.open_source(config.data, config.data.train, image_side=image_side(config))
    steps_per_epoch = source.size // config.batch_size
    if not steps_per_epoch:
        raise InputError(f"config.batch_size={config.batch_size} is more than the {source.size} training samples")
    return Data(source, synonyms, steps_per_epoch, config.steps or config.epochs * steps_per_epoch)


def open_state(config: ConfigDict, workdir: Path, data: Data, tx: GradientTransformation) -> tuple[Session, Start]:
    """The session of a run and where it starts. A folder becomes a run once all that was given proved right."""
    resumes = _check_same_run(workdir, config)
    origin = None if resumes else init_from.read(config)

    def tokenizer() -> str:
        stored = workdir / "tokenizer.json"
        return (Tokenizer.load(str(stored)) if resumes else _new_tokenizer(config, data.source, origin)).to_json()

    session = Session(config, Tokenizer.from_json(processes.from_first(tokenizer)))
    abstract = steps.abstract_state(session.model, tx, session.mesh, config.sharding)
    if processes.is_first():
        Owned(workdir, "train").claim(_names(config))
        if not resumes:  # config.json last, so that it says that all is there
            session.tokenizer.save(workdir / "tokenizer.json")
            write_whole(workdir / "config.json", configs.to_json(config) + "\n")
    restored = checkpoint.restore(workdir, config.checkpoint, abstract)
    if restored:
        print(f"resuming from step {restored.step} of {data.total_steps} in {workdir}")
        return session, Start(restored.state, restored.step, _place(restored, session), True)
    state = steps.init_state(session.model, tx, config.seed, session.mesh, config.sharding)
    if origin:
        state = init_from.apply(state, origin, session.model.config, config)
    return session, Start(state, 0, 0, False)


def open_batches(session: Session, workdir: Path, data: Data, position: int) -> Any:
    """The stream of batches from `position` on (input_pipeline.pipeline.TrainBatches)."""
    from input_pipeline import pipeline

    given = session.config.data
    return pipeline.TrainBatches(
        data.source,
        session.tokenizer,
        **session.view,
        context_length=session.context_length,
        crop_scale=given.crop_scale,
        seed=session.config.seed,
        start=position,
        bad_path=workdir / _bad_samples(session.process[0]),
        max_bad_fraction=given.max_bad_fraction,
        recover_truncated=given.recover_truncated,
        two_views=given.two_views,
        synonyms=data.synonyms,
    )


def run_steps(
    session: Session,
    workdir: Path,
    data: Data,
    tx: GradientTransformation,
    start: Start,
    batches: Any,
    checkpoints: checkpoint.Checkpoints,
) -> None:
    """Step, record, evaluate, save, until the last step or until somebody asks to stop."""
    config, state = session.config, start.state
    schedule = dict(total_steps=data.total_steps, steps_per_epoch=data.steps_per_epoch)
    train_step = steps.make_train_step(session.model, tx, config, session.mesh, **schedule)
    rate = optim.learning_rate(config.optim, data.total_steps, data.steps_per_epoch)
    wait = InputWait(batches)
    cadence = [n for n in (config.checkpoint.every_steps, config.checkpoint.keep_every) if n]
    with (
        Recorder(session, workdir, rate, wait.take, start=start.step, **schedule) as recorder,
        Trace(config.profile, workdir) as trace,
        Notice() as notice,
    ):
        for step, batch in zip(range(start.step + 1, data.total_steps + 1), wait, strict=False):
            trace.before(step)
            state, numbers = train_step(state, to_devices(batch, session.mesh))
            wait.step_started(numbers["loss"])
            recorder.take(step, numbers)
            trace.after(step, numbers)
            last, terminated = step == data.total_steps, notice.reached(step)
            epoch_ends = last or step % data.steps_per_epoch == 0
            results = {}
            if epoch_ends:
                recorder.flush()
                with recorder.paused():
                    results = _evaluate(session, state, step // data.steps_per_epoch, last)
                recorder.write(step, results)
            if epoch_ends or terminated or any(step % n == 0 for n in cadence):
                recorder.flush()  # raises on a loss that is not finite, before a bad state is saved
                checkpoints.save(step, state, batches.position, results)
            if terminated and not last:
                raise Preempted(f"SIGTERM: saved step {step} in {workdir}; the same command resumes from there")


def finish(session: Session, workdir: Path, batches: Any) -> None:
    """Says what could not be used, and draws the curves."""
    index, count = session.process
    if batches.bad.reasons:
        who = f"process {index} of {count}: " if count > 1 else ""
        said = f"{who}{batches.bad.summary()}; {workdir / _bad_samples(index)} names them"
        print(said, file=sys.stderr if index else sys.stdout)
    if processes.is_first():
        with whole(workdir / "curves.png") as part:
            figures.curves({"": workdir}).savefig(part, format="png")
        print(f"curves: {workdir / 'curves.png'}")


def _evaluate(session: Session, state: steps.TrainState, epoch: int, last: bool) -> dict[str, float]:
    """The evaluations that are due after this epoch; prints their tables."""
    kinds = evaluation.due(session.config.eval, epoch, last)
    if not kinds:
        return {}
    results = evaluation.evaluate(session.config.eval, session.encoder(state), kinds=kinds)
    print(evaluation.text(results), end="", flush=True)
    return evaluation.flat(results) | (session.validation(state) if "zero_shot" in kinds else {})


def _place(restored: checkpoint.Restored, session: Session) -> int:
    from input_pipeline import pipeline

    position, passed_over = pipeline.resume_at(restored.positions, session.config.batch_size, session.process)
    if passed_over:
        before, now = len(restored.positions), session.process[1]
        print(f"{before} processes saved it, {now} resume: {passed_over} samples are not seen this epoch")
    return position


def _bad_samples(process: int) -> str:
    return f"bad_samples.process{process}.jsonl" if process else "bad_samples.jsonl"


def _names(config: ConfigDict) -> list[str]:
    """What a run writes in its workdir. TensorBoard's events and profile/ get names that nobody has."""
    names = ["config.json", "tokenizer.json", "metrics.jsonl", "curves.png"]
    names += [_bad_samples(process) for process in range(jax.process_count())]
    return names if config.checkpoint.folder else [*names, "checkpoints"]


def _check_same_run(workdir: Path, config: ConfigDict) -> bool:
    """Whether the workdir holds a run already; refuses one of another configuration, and files of others."""
    stored = workdir / "config.json"
    if len(set(processes.of_all(stored.exists()))) > 1:
        raise InputError(f"only some processes find a run in {workdir}; it must be a folder that all of them share")
    try:
        old = json.loads(stored.read_text()) if stored.is_file() else None
    except ValueError as error:
        raise InputError(f"{stored} is damaged ({error}); bring it back from a copy, or give a new --workdir") from None
    Owned(workdir, "train").check(_names(config))
    if old is None:
        return False
    if changed := configs.differences(old, config.to_dict()):
        raise InputError(
            f"{workdir} holds a run with another configuration ({'; '.join(changed)}); "
            "give a new --workdir, or the old values to resume it"
        )
    return True


def _new_tokenizer(config: ConfigDict, source: Any, origin: Any) -> Tokenizer:
    if origin and (tokenizer := init_from.tokenizer(origin, config)):
        return tokenizer
    if config.tokenizer.path:
        return Tokenizer.load(config.tokenizer.path)
    return Tokenizer.train(source.captions(), config.tokenizer.vocab_size)
