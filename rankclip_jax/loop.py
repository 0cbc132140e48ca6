"""Wiring and cadence: data, step, metrics, evaluation, checkpoints. Data flows one way and every room stays pure.

Where a run starts, in this order:
  1. WORKDIR has a complete checkpoint: its newest, with the exact place in the data;
  2. otherwise config.init_from: the parameters of a trained model, step 0;
  3. otherwise: fresh parameters from config.seed.
"""

import json
import math
import signal
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rankclip_jax import config as configs
from rankclip_jax import evaluation, init_from, input_wait, losses, metrics, models, optim, sharding
from rankclip_jax import step as steps
from rankclip_jax.checkpoint import Checkpoints
from rankclip_jax.errors import InputError
from rankclip_jax.input_wait import InputWait
from rankclip_jax.tokenizer import Tokenizer

_ON_CONSOLE = ("loss", "clip", "rank_in_modal", "rank_cross_modal", "grad_norm", "logit_scale", "learning_rate")


class Preempted(Exception):  # noqa: N818 -- not an error: the run was asked to stop, saved, and can go on
    """SIGTERM came; the state is saved."""


class Run:
    """What training and evaluation share: mesh, tokenizer, model, and how to encode batches."""

    def __init__(self, config: ConfigDict, workdir, tokenizer: Tokenizer, model=None):
        """`model`: a models.CLIP of another origin; None: that of config.model."""
        self.config, self.workdir, self.tokenizer = config, Path(workdir), tokenizer
        self.mesh = sharding.make_mesh(config.mesh)
        shards = sharding.batch_shards(self.mesh)
        if config.batch_size % shards:
            raise InputError(
                f"config.batch_size = {config.batch_size} does not divide over {shards} devices; "
                f"try {max(1, config.batch_size // shards) * shards}"
            )
        if config.batch_size % (shards * config.accumulate):
            raise InputError(
                f"config.batch_size = {config.batch_size} does not divide into config.accumulate = {config.accumulate} "
                f"parts over {shards} devices"
            )
        self.process = (jax.process_index(), jax.process_count())
        self.local_batch = config.batch_size // jax.process_count()
        self.model = build_model(config, tokenizer) if model is None else model
        if config.accumulate > 1 and isinstance(self.model.config.vision, models.ResNetConfig):
            raise InputError(
                f"config.accumulate = {config.accumulate}: a ResNet's batch norm needs the statistics of the whole "
                "batch at every layer, so its batch cannot go through in parts; use a ViT, or config.model.remat=True"
            )
        self.side = self.model.config.vision.image_size
        self.context_length = self.model.config.text.context_length
        # How the pipeline makes batches, for training and evaluation alike.
        canvas = canvas_side(config, self.side)
        self.view = dict(batch_size=self.local_batch, image_side=self.side, process=self.process, canvas=canvas)
        self._embed = steps.make_embed_step(self.model)
        self._val_step = steps.make_val_step(self.model, config, self.mesh)

    def encode_images(self, state, batch: dict) -> np.ndarray:
        """One batch of this process's share -> float32 (b, D) on the host."""
        return steps.to_host(self._embed(state, steps.to_devices(_pictures(batch), self.mesh)), self.mesh)

    def encode_texts(self, state, texts: list[str]) -> np.ndarray:
        """Any number of texts -> float32 (n, D) on the host, in batches of one shape."""
        parts = []
        for start in range(0, len(texts), self.local_batch):
            some = texts[start : start + self.local_batch]
            padded = some + [""] * (self.local_batch - len(some))
            tokens = self.tokenizer(padded, self.context_length)
            z = self._embed(state, steps.to_devices({"tokens": tokens}, self.mesh))
            parts.append(steps.to_host(z, self.mesh)[: len(some)])
        return np.concatenate(parts)

    def validation(self, state) -> dict[str, float]:
        """Mean of the loss's parts over the whole batches of config.data.val; empty without one.

        With config.eval.diagnostics also how the first batch's embeddings lie (losses/diagnostics.py).
        """
        from input_pipeline import pipeline, sources

        config = self.config
        if config.data.val is None:
            return {}
        source = sources.open_source(config.data, config.data.val, image_side=self.side, split="val")
        if source.size < config.batch_size:
            raise InputError(f"config.data.val has {source.size} samples, fewer than a batch of {config.batch_size}")
        batches = pipeline.eval_batches(source, **self.view)
        parts, numbers = [], {}
        for _ in range(source.size // config.batch_size):
            batch = next(batches)
            tokens = self.tokenizer(batch["caption"], self.context_length)
            if config.eval.diagnostics and not parts:
                z = self.encode_images(state, batch), self.encode_texts(state, batch["caption"])
                numbers = _diagnostics(*z, np.exp(float(state.params["logit_scale"])))
            parts.append(self._val_step(state, steps.to_devices(_pictures(batch) | {"tokens": tokens}, self.mesh)))
        numbers |= {key: np.mean([float(part[key]) for part in parts]) for key in parts[0]}
        return {f"val/{key}": float(value) for key, value in numbers.items()}

    def encoder(self, state) -> evaluation.Encoder:
        """What the evaluations need of the model."""
        from input_pipeline import pipeline

        return evaluation.Encoder(
            images=lambda batch: self.encode_images(state, batch),
            texts=lambda texts: self.encode_texts(state, texts),
            batches=lambda source: pipeline.eval_batches(source, **self.view),
            image_side=self.side,
        )


def canvas_side(config: ConfigDict, side: int) -> int | None:
    """Side of the square on which the host sends pictures to a model of `side` pixels; None: it resizes them itself."""
    data = config.data
    if data.resize == "host":
        return None
    # The scenes of shapes are drawn as large as the model wants them. For 224 pixels it is 408: pictures with a
    # short side of 300 fit whole up to 4 : 3, and with their widest window beyond that.
    canvas = data.canvas or (side if data.format == "shapes" else 8 * math.ceil(1.8 * side / 8))
    if canvas < side:
        raise InputError(
            f"config.data.canvas = {canvas} is less than the model's image_size, {side}; give more, or None to choose "
            "it"
        )
    return canvas


def _pictures(batch: dict) -> dict:
    return {key: batch[key] for key in ("image", "size", "windows") if key in batch}


@jax.jit
def _diagnostics(z_img_BxD, z_txt_BxD, scale) -> dict:
    cosine = losses.gradient_cosine(z_img_BxD, z_txt_BxD, scale)
    return losses.embedding_diagnostics(z_img_BxD, z_txt_BxD) | {"gradient_cosine": cosine}


def build_model(config: ConfigDict, tokenizer: Tokenizer):
    """The model of config.model, with the tokenizer's vocabulary and the objective's scale and bias."""
    fields = config.model.to_dict()
    if config.loss.objective == "siglip" or "siglip" in config.loss.terms:  # starts as Zhai et al. have it
        fields["logit_scale"] = math.log(10) if fields["logit_scale"] is None else fields["logit_scale"]
        fields["logit_bias"] = -10.0 if fields["logit_bias"] is None else fields["logit_bias"]
    try:
        return models.build(fields.pop("name"), vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id, **fields)
    except ValueError as error:
        raise InputError(f"config.model: {error}") from None


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
    recorder = _Recorder(run, rate, InputWait(batches), start, total_steps, steps_per_epoch)
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


class _Recorder:
    """Reads metrics one step late, so that the accelerator never waits for the host, and writes them down."""

    def __init__(self, run: Run, rate, wait: InputWait, start: int, total_steps: int, steps_per_epoch: int):
        self._run, self._rate, self.wait, self.steps_per_epoch = run, rate, wait, steps_per_epoch
        self._advised = False
        self._total = total_steps
        self._progress = metrics.Progress(start, total_steps, run.config.batch_size)
        self._pending = None
        self.writers = [metrics.MetricsFile(run.workdir, start).write]

    def take(self, step: int, numbers: dict) -> None:
        """Holds the numbers of `step` and writes those of the step before."""
        self.flush()
        self._pending = step, numbers

    def flush(self) -> None:
        """Reads what is held. Raises InputError when a number is not finite."""
        if self._pending is None:
            return
        (step, numbers), self._pending = self._pending, None
        loss, norm = float(numbers["loss"]), float(numbers["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(
                f"step {step}: loss {loss}, gradient norm {norm}; stopped. The last good checkpoint is kept in "
                f"{self._run.workdir}; try a lower config.optim.lr or set config.optim.grad_clip_norm=1.0"
            )
        if step % self._run.config.log_every and step not in (1, self._total):
            return
        numbers = {k: float(v) for k, v in numbers.items()} | {"learning_rate": float(self._rate(step - 1))}
        epoch = -(-step // self.steps_per_epoch)
        shown = {key: numbers[key] for key in _ON_CONSOLE if key in numbers}
        line, speed = self._progress.line(step, epoch, shown, *self.wait.take())
        print(line, flush=True)
        self._write(step, numbers | speed)
        if step > 1 and not self._advised and speed["data_wait"] > input_wait.WORTH_SAYING:
            self._advised = True
            print(input_wait.advice(speed["data_wait"], speed["images_read_per_second"], self._run.config.data.resize))

    def evaluate(self, step: int, state, kinds: tuple[str, ...]) -> dict[str, float]:
        """Runs the evaluations due, writes their numbers, prints tables; the time does not count in the rate."""
        if not kinds:
            return {}
        self.flush()
        paused = self._progress.pause()
        results = evaluation.evaluate(self._run.config.eval, self._run.encoder(state), kinds=kinds)
        numbers = evaluation.flat(results)
        if "zero_shot" in kinds:
            numbers |= self._run.validation(state)
        print(evaluation.text(results), end="", flush=True)
        if numbers:
            self._write(step, numbers)
        self._progress.resume(paused)
        return numbers

    def _write(self, step, numbers):
        for write in self.writers:
            write(step, numbers)


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
