"""A training run: open the data, open the state (opening.py), run the steps, finish. Data flows one way."""

import contextlib
import functools
import gc
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rankclip_jax import evaluation
from rankclip_jax.common import storage
from rankclip_jax.common.files import whole
from rankclip_jax.common.metrics_file import read_metrics
from rankclip_jax.models import ResNetConfig
from rankclip_jax.parallel import processes
from rankclip_jax.parallel.mesh import to_devices
from rankclip_jax.parallel.preemption import Notice, Preempted
from rankclip_jax.train import init_from, loggers, opening, optim, rules
from rankclip_jax.train import step as steps
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.train.input_wait import InputWait
from rankclip_jax.train.opening import Data, Start
from rankclip_jax.train.packed_batches import PackedBatches
from rankclip_jax.train.profile import Trace
from rankclip_jax.train.programs import Programs
from rankclip_jax.train.recorder import Recorder
from rankclip_jax.train.schedule import learning_rate
from rankclip_jax.train.session import Session
from rankclip_jax.weights import checkpoint, saving
from rankclip_jax.weights.saving import Checkpoints


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
    config, data = opening.open_data(config, old, origin, workdir)
    record = opening.data_record(data)
    if old:
        workdirs.check_same_data(workdir, record, functools.partial(opening.data_record_of_before, data))
    tx = optim.make_optimizer(config.optim, data.total_steps, data.steps_per_epoch)
    session = opening.open_session(config, workdir, data, origin, resumes=old is not None)
    config = session.config
    fresh = steps.Fresh(session.model, tx, config.seed, session.mesh, config.sharding, config.optim)
    programs = Programs(session, tx, total_steps=data.total_steps, steps_per_epoch=data.steps_per_epoch)
    with workdirs.claimed(workdir, config):  # only now, when all that was given proved right
        if not old:
            programs.compile_ahead(1, fresh.abstract)
            loggers.imported(config.log)
        start = opening.open_state(session, workdir, data, fresh, origin)
        if old:
            before, now = (opening.run_length(each, data.steps_per_epoch) for each in (old, config))
            workdirs.check_length(workdir, start.step, before, now)
        if processes.is_first():
            workdirs.begin(workdir, config, session.tokenizer, record)
        if start.step >= data.total_steps and not _owes_evaluation(session, workdir, data, start):
            print(f"{storage.shown(workdir)} is trained to its last step, {start.step}")
            return
        free = workdirs.kept_for_longer(config, opening.run_length(config, data.steps_per_epoch)[1])
        if old and start.step < data.total_steps:
            programs.compile_ahead(start.step + 1, fresh.abstract)
            loggers.imported(config.log)
        restored = start.step if start.resumed else None
        # The notice ends last: a second SIGTERM must not end the process while the first one's state is written.
        with contextlib.ExitStack() as last, Checkpoints(workdir, config.checkpoint, restored, free) as checkpoints:
            batches = opening.open_batches(session, workdir, data, start)
            processes_said = f" of {session.process[1]} processes" if session.process[1] > 1 else ""
            print(
                f"training {config.model.name} ({_counted(config, start.state)}) with "
                f"{config.loss.objective} on {data.source.size:,} samples: "
                f"{data.total_steps} steps of {config.batch_size} on "
                f"{session.devices.count} {session.devices.platform} device(s){processes_said}"
            )
            run_steps(session, workdir, data, programs, start, batches, checkpoints, last.enter_context(Notice()))
        finish(session, workdir, batches)


def run_steps(
    session: Session,
    workdir: Path,
    data: Data,
    programs: Programs,
    start: Start,
    batches: Any,
    checkpoints: Checkpoints,
    notice: Notice,
) -> None:
    """Step, record, evaluate, save, until the last step or until somebody asks to stop."""
    config, state = session.config, start.state
    batches = PackedBatches(session, batches, data.total_steps - start.step)
    length = dict(total_steps=data.total_steps, steps_per_epoch=data.steps_per_epoch)
    rate, wait = learning_rate(config.optim, **length), InputWait(batches)
    began = dict(start=start.step, total_steps=data.total_steps, parameters=_parameters(state))
    cadence = [n for n in (config.checkpoint.every_steps, config.checkpoint.keep_every) if n]
    with (
        contextlib.closing(wait),
        Recorder(session, workdir, rate, wait.take, **began) as recorder,
        Trace(config.profile, workdir) as trace,
    ):
        if _owes_evaluation(session, workdir, data, start):
            _evaluate(session, state, data, start.step, recorder, checkpoints)
        for step, batch in zip(range(start.step + 1, data.total_steps + 1), wait, strict=False):
            trace.before(step)
            program, batch = programs.of(step, batch), to_devices(batch, session.mesh)
            if programs.is_new(program):
                with recorder.paused():
                    programs.compile(program, state, batch)
            state, numbers = programs.run(program, state, batch)
            wait.step_started(numbers["loss"])
            recorder.take(step, numbers, *program)
            trace.after(step, numbers)
            checkpoints.check()
            last, terminated = step == data.total_steps, notice.reached(step)
            epoch_ends = last or step % data.steps_per_epoch == 0
            if epoch_ends or terminated or any(step % n == 0 for n in cadence):
                recorder.flush()  # raises on a loss that is not finite, before a bad state is saved
                storage.check_ours(workdir)
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


def _counted(config: ConfigDict, state: steps.TrainState) -> str:
    every, trained = _parameters(state), rules.count(config.optim, state.params)
    return f"{every:,} parameters" + (f", {trained:,} of them trained" if trained < every else "")


def finish(session: Session, workdir: Path, batches: Any) -> None:
    """Says what could not be used, and draws the curves."""
    index, count = session.process
    if batches.bad.reasons:
        who = f"process {index} of {count}: " if count > 1 else ""
        said = f"{who}{batches.bad.summary()}; {storage.shown(workdir)}/{workdirs.bad_samples(index)} names them"
        print(said, file=sys.stderr if index else sys.stdout)
    if processes.is_first():
        from rankclip_jax import figures  # matplotlib, which no step needs

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
        average = steps.averaged(state) if isinstance(state, steps.AveragedState) else None
        if average:
            theirs = evaluation.evaluate(session.config.eval, session.encoder(average), data.sets, kinds=kinds)
            results = evaluation.beside(results, theirs)
        failed = {name: why for name, why in results["missing"].items() if name not in data.sets.missing}
        numbers = evaluation.flat(results)
        if data.val and "zero_shot" in kinds:
            with evaluation.one_set("config.data.val", failed):
                numbers |= session.validation(state, data.val)
                if average:
                    losses = session.validation(average, data.val)
                    numbers |= {f"{key}/ema": value for key, value in losses.items()}
        recorder.show(step, shown or {})
        gc.collect()  # TensorFlow's graphs are cycles; Python would keep some thirty evaluations' of 2 MB
    epoch, more = divmod(step, data.steps_per_epoch)
    print(f"after {f'epoch {epoch}, ' if not more else ''}step {step}:")
    print(evaluation.lines(results | {"missing": failed}, numbers), end="", flush=True)
    recorder.write(step, numbers, counts=evaluation.counts(results), failed=failed)
    checkpoints.score(step, numbers)
