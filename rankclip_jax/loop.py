"""Wiring and cadence: data, step, metrics, evaluation, checkpoints. Data flows one way and every room stays pure.

Where a run starts, in this order:
  1. WORKDIR has a complete checkpoint: its newest, with the exact place in the data;
  2. otherwise config.init_from: the parameters of a trained model, step 0;
  3. otherwise: fresh parameters from config.seed.
"""

import json
import signal
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rankclip_jax import config as configs
from rankclip_jax import evaluation, init_from, metrics, models, optim
from rankclip_jax import step as steps
from rankclip_jax.checkpoint import Checkpoints
from rankclip_jax.errors import InputError
from rankclip_jax.input_wait import InputWait
from rankclip_jax.recorder import Recorder
from rankclip_jax.run import Run
from rankclip_jax.tokenizer import Tokenizer


class Preempted(Exception):  # noqa: N818 -- not an error: the run was asked to stop, saved, and can go on
    """SIGTERM came; the state is saved."""


def train(config: ConfigDict, workdir) -> None:
    """Trains to the end, going on from the workdir's newest checkpoint.

    Raises:
      InputError: something in the configuration, the data or the workdir is wrong, or the loss stopped being finite.
      Preempted: SIGTERM came and the state is saved.
    """
    from clu import metric_writers  # imports TensorFlow, as the pipeline does

    from input_pipeline import captions, pipeline, sources

    workdir = Path(workdir)
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
    tokenizer = Tokenizer.load(str(workdir / "tokenizer.json")) if resumes else _new_tokenizer(config, source, origin)
    run = Run(config, workdir, tokenizer)
    abstract = steps.abstract_state(run.model, tx, run.mesh, config.sharding)
    if not resumes:  # only now, when everything that the user gave has proved right
        workdir.mkdir(parents=True, exist_ok=True)
        tokenizer.save(workdir / "tokenizer.json")
        (workdir / "config.json").write_text(configs.to_json(config) + "\n")

    checkpoints = Checkpoints(workdir, config.checkpoint)
    start, position = checkpoints.latest() or 0, 0
    if start:
        state, position = checkpoints.restore(start, abstract)
        print(f"resuming from step {start} of {total_steps} in {workdir}")
    else:
        state = steps.init_state(run.model, tx, config.seed, run.mesh, config.sharding)
        if origin:
            state = init_from.apply(state, origin, run.model.config, config)
    if start >= total_steps:
        print(f"{workdir} is trained to its last step, {start}")
        return
    train_step = steps.make_train_step(
        run.model, tx, config, run.mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    batches = pipeline.TrainBatches(
        source,
        run.tokenizer,
        **run.view,
        context_length=run.context_length,
        crop_scale=config.data.crop_scale,
        seed=config.seed,
        start=position,
        bad_path=workdir / "bad_samples.jsonl",
        max_bad_fraction=config.data.max_bad_fraction,
        recover_truncated=config.data.recover_truncated,
        two_views=config.data.two_views,
        synonyms=synonyms,
    )
    rate = optim.learning_rate(config.optim, total_steps)
    recorder = Recorder(run, rate, InputWait(batches), start, total_steps, steps_per_epoch)
    tensorboard = metric_writers.SummaryWriter(str(workdir))
    recorder.writers.append(tensorboard.write_scalars)
    parameters = sum(p.size for p in jax.tree.leaves(state.params))
    print(
        f"training {config.model.name} ({parameters:,} parameters) with {config.loss.objective} on {source.size:,} "
        f"samples: {total_steps} steps of {config.batch_size} on {jax.device_count()} {jax.default_backend()} device(s)"
    )

    try:
        _run_steps(run, state, train_step, batches, recorder, checkpoints, range(start + 1, total_steps + 1))
    finally:
        checkpoints.close()  # also on an error: what was being saved is good
    tensorboard.close()
    if batches.bad.reasons:
        print(f"{batches.bad.summary()}; {workdir / 'bad_samples.jsonl'} names them")
    print(f"curves: {metrics.plot_curves(workdir)}")


def _run_steps(run, state, train_step, batches, recorder, checkpoints, step_range) -> None:
    config, terminated = run.config, _watch_sigterm()
    for step in step_range:
        state, numbers = train_step(state, steps.to_devices(next(recorder.wait), run.mesh))
        recorder.wait.step_started(numbers["loss"])
        recorder.take(step, numbers)
        last = step == step_range[-1]
        epoch_ends = last or step % recorder.steps_per_epoch == 0
        saves = epoch_ends or (config.checkpoint.every_steps and step % config.checkpoint.every_steps == 0)
        results = {}
        if epoch_ends:
            kinds = evaluation.due(config.eval, step // recorder.steps_per_epoch, last)
            results = recorder.evaluate(step, state, kinds)
        if saves or terminated:
            recorder.flush()  # raises on a loss that is not finite, before a bad state is saved
            checkpoints.save(step, state, batches.position, results)
        if terminated:
            raise Preempted(f"SIGTERM: saved step {step} in {run.workdir}; the same command goes on from there")


def _preset_side(config) -> int:
    try:
        fields = {"image_size": config.model.image_size, "vision": config.model.vision.to_dict()}
        return models.configure(config.model.name, **fields).vision.image_size
    except ValueError as error:
        raise InputError(f"config.model: {error}") from None


def _check_same_run(workdir: Path, config: ConfigDict) -> bool:
    """Whether the workdir holds a run already; refuses one of another configuration."""
    stored = workdir / "config.json"
    if not stored.exists():
        return False
    changed = configs.differences(json.loads(stored.read_text()), config.to_dict())
    if changed:
        raise InputError(
            f"{workdir} holds a run with another configuration ({'; '.join(changed)}); "
            "give a new --workdir, or the old values to go on with it"
        )
    return True


def _new_tokenizer(config: ConfigDict, source, origin) -> Tokenizer:
    if origin and (tokenizer := init_from.tokenizer(origin, config)):
        return tokenizer
    if config.tokenizer.path:
        return Tokenizer.load(config.tokenizer.path)
    return Tokenizer.train(source.captions(), config.tokenizer.vocab_size)


def _watch_sigterm() -> list:
    """An empty list that SIGTERM fills."""
    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    return received
