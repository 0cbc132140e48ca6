"""Wiring and cadence: data, step, metrics, evaluation, checkpoints. Data flows one way and every room stays pure.

Where a run starts, in this order:
  1. WORKDIR has a complete checkpoint: its newest, with the exact place in the data;
  2. otherwise config.init_from: the parameters of a trained model, step 0;
  3. otherwise: fresh parameters from config.seed.
"""

import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rankclip_jax import checkpoint, compilation_cache, distributed, evaluation, init_from, metrics, models, optim
from rankclip_jax import config as configs
from rankclip_jax import step as steps
from rankclip_jax.errors import InputError
from rankclip_jax.files import write_whole
from rankclip_jax.input_wait import InputWait
from rankclip_jax.ownership import Owned
from rankclip_jax.preemption import Notice, Preempted
from rankclip_jax.recorder import Recorder
from rankclip_jax.run import Run
from rankclip_jax.tokenizer import Tokenizer
from rankclip_jax.trace import Trace


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains to the end, going on from the workdir's newest checkpoint.

    Raises:
      InputError: something in the configuration, the data or the workdir is wrong, or the loss stopped being finite.
      Preempted: SIGTERM came, to any of the processes, and the state is saved.
    """
    from clu import metric_writers  # imports TensorFlow, as the pipeline does

    from input_pipeline import captions, pipeline, sources

    workdir = Path(workdir)
    compilation_cache.enable()
    synonyms = captions.read_synonyms(config.data.synonyms) if config.data.synonyms else None
    side = _preset_side(config)
    source = sources.open_source(config.data, config.data.train, image_side=side)
    steps_per_epoch = source.size // config.batch_size
    if not steps_per_epoch:
        raise InputError(f"config.batch_size = {config.batch_size} is more than the {source.size} training samples")
    total_steps = config.steps or config.epochs * steps_per_epoch
    tx = optim.make_optimizer(config.optim, total_steps)
    resumes = _check_same_run(workdir, config)
    origin = None if resumes else init_from.read(config)
    tokenizer = Tokenizer.from_json(
        distributed.from_first(
            lambda: (
                Tokenizer.load(str(workdir / "tokenizer.json")) if resumes else _new_tokenizer(config, source, origin)
            ).to_json()
        )
    )
    run = Run(config, workdir, tokenizer)
    abstract = steps.abstract_state(run.model, tx, run.mesh, config.sharding)
    if distributed.is_first():  # only now, when everything that the user gave has proved right
        Owned(workdir, "train").claim(_names(config))
        if not resumes:
            _begin(workdir, config, tokenizer)

    index, processes = run.process
    restored = checkpoint.restore(workdir, config.checkpoint, abstract)
    start, position = (restored.step if restored else 0), 0
    if restored:
        state = restored.state
        position, passed_over = pipeline.resume_at(restored.positions, config.batch_size, run.process)
        print(f"resuming from step {start} of {total_steps} in {workdir}")
        if passed_over:
            before = len(restored.positions)
            print(f"{before} processes saved it, {processes} go on: {passed_over} samples are not seen this epoch")
    else:
        state = steps.init_state(run.model, tx, config.seed, run.mesh, config.sharding)
        if origin:
            state = init_from.apply(state, origin, run.model.config, config)
    if start >= total_steps:
        print(f"{workdir} is trained to its last step, {start}")
        return
    checkpoints = checkpoint.Checkpoints(workdir, config.checkpoint, start if restored else None)
    train_step = steps.make_train_step(
        run.model, tx, config, run.mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    bad_path = workdir / ("bad_samples.jsonl" if index == 0 else f"bad_samples.process{index}.jsonl")
    batches = pipeline.TrainBatches(
        source,
        run.tokenizer,
        **run.view,
        context_length=run.context_length,
        crop_scale=config.data.crop_scale,
        seed=config.seed,
        start=position,
        bad_path=bad_path,
        max_bad_fraction=config.data.max_bad_fraction,
        recover_truncated=config.data.recover_truncated,
        two_views=config.data.two_views,
        synonyms=synonyms,
    )
    rate = optim.learning_rate(config.optim, total_steps)
    recorder = Recorder(run, rate, InputWait(batches), start, total_steps, steps_per_epoch)
    if distributed.is_first():
        tensorboard = metric_writers.SummaryWriter(str(workdir))
        recorder.writers.append(tensorboard.write_scalars)
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    print(
        f"training {config.model.name} ({parameters:,} parameters) with {config.loss.objective} on {source.size:,} "
        f"samples: {total_steps} steps of {config.batch_size} on {run.devices.count} {run.devices.platform} device(s)"
        + (f" of {processes} processes" if processes > 1 else "")
    )

    try:
        _run_steps(run, state, train_step, batches, recorder, checkpoints, range(start + 1, total_steps + 1))
    except BaseException as error:
        # What was being saved is good. But of many processes the others may never come to finish it.
        if processes == 1 or isinstance(error, Preempted):
            checkpoints.close()
        raise
    checkpoints.close()
    if batches.bad.reasons:
        who = f"process {index} of {processes}: " if processes > 1 else ""
        print(f"{who}{batches.bad.summary()}; {bad_path} names them", file=sys.stderr if index else sys.stdout)
    if distributed.is_first():
        tensorboard.close()
        print(f"curves: {metrics.plot_curves(workdir)}")


def _run_steps(run, state, train_step, batches, recorder, checkpoints, step_range) -> None:
    config, notice = run.config, Notice()
    trace = Trace(config.profile, run.workdir)
    for step in step_range:
        trace.before(step)
        state, numbers = train_step(state, steps.to_devices(next(recorder.wait), run.mesh))
        recorder.wait.step_started(numbers["loss"])
        recorder.take(step, numbers)
        trace.after(step, numbers)
        last = step == step_range[-1]
        epoch_ends = last or step % recorder.steps_per_epoch == 0
        multiples = [n for n in (config.checkpoint.every_steps, config.checkpoint.keep_every) if n]
        saves = epoch_ends or any(step % n == 0 for n in multiples)
        terminated = notice.reached(step)
        results = {}
        if epoch_ends:
            kinds = evaluation.due(config.eval, step // recorder.steps_per_epoch, last)
            results = recorder.evaluate(step, state, kinds)
        if saves or terminated:
            recorder.flush()  # raises on a loss that is not finite, before a bad state is saved
            checkpoints.save(step, state, batches.position, results)
        if terminated and not last:
            raise Preempted(f"SIGTERM: saved step {step} in {run.workdir}; the same command goes on from there")
    trace.close()


def _preset_side(config) -> int:
    try:
        fields = {"image_size": config.model.image_size, "vision": config.model.vision.to_dict()}
        return models.configure(config.model.name, **fields).vision.image_size
    except ValueError as error:
        raise InputError(f"config.model: {error}") from None


def _names(config: ConfigDict) -> list[str]:
    """What a run writes in its workdir. TensorBoard's events and profile/ get names that nobody has."""
    bad = [f"bad_samples.process{i}.jsonl" for i in range(1, jax.process_count())]
    names = ["config.json", "tokenizer.json", "metrics.jsonl", "curves.png", "bad_samples.jsonl", *bad]
    return names if config.checkpoint.folder else [*names, "checkpoints"]


def _check_same_run(workdir: Path, config: ConfigDict) -> bool:
    """Whether the workdir holds a run already; refuses one of another configuration, and files of others."""
    stored = workdir / "config.json"
    if len(set(distributed.of_all(stored.exists()))) > 1:
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
            "give a new --workdir, or the old values to go on with it"
        )
    return True


def _begin(workdir: Path, config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Writes what makes a folder a run: config.json last, so that it says that all is there."""
    tokenizer.save(workdir / "tokenizer.json")
    write_whole(workdir / "config.json", configs.to_json(config) + "\n")


def _new_tokenizer(config: ConfigDict, source, origin) -> Tokenizer:
    if origin and (tokenizer := init_from.tokenizer(origin, config)):
        return tokenizer
    if config.tokenizer.path:
        return Tokenizer.load(config.tokenizer.path)
    return Tokenizer.train(source.captions(), config.tokenizer.vocab_size)
