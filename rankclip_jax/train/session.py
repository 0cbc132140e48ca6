"""A configuration on some devices: mesh, tokenizer, model. Training, evaluation, plan and study share it."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from rankclip_jax import config as configs
from rankclip_jax import evaluation, losses, models
from rankclip_jax.common import packing
from rankclip_jax.common.devices import Devices, devices_of
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.packing import Packed
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.parallel import processes, sharding
from rankclip_jax.parallel.mesh import batch_shards, make_mesh, to_devices, to_host
from rankclip_jax.train import flops, resolve, rules
from rankclip_jax.train import step as steps
from rankclip_jax.weights import view as weights_view
from rankclip_jax.weights.lora import Adapted

_EVAL_ROWS = 256  # a device
_EVAL_ROWS_OF_A_CPU = 32  # as fast as more; and a small set is filled up to one batch


class Vocabulary(NamedTuple):
    """What a model knows of a tokenizer. A plan has no more of it."""

    vocab_size: int | None  # None: the preset's
    eot_id: int | None


class Session:
    """A configuration, checked, with its mesh, tokenizer and model.

    Attributes:
      devices: what the mesh consists of (common/devices.py).
      process: (index of this process, how many there are).
      local_batch, eval_batch: rows of a training and of an evaluation batch that this process reads.
      shards: into how many parts its devices split these.
      side, context_length: of the model, in pixels and tokens.
      canvas: side of the square on which the host sends pictures; None: it resizes them itself.
    """

    def __init__(
        self,
        config: ConfigDict,
        tokenizer: Tokenizer | Vocabulary,
        *,
        architecture: models.ClipConfig | None = None,
        devices: Sequence | None = None,
        trains: bool = True,
    ):
        """Builds no parameters.

        Args:
          tokenizer: a Vocabulary will do where nothing is encoded.
          architecture: of a model of another origin; None: that of config.model.
          devices: of the mesh; None: all of this run.
          trains: False where only config.eval.batch_size must fit the devices, and not config.batch_size.

        Raises:
          InputError: the configuration does not fit itself, the devices or the processes.
        """
        self.tokenizer: Any = tokenizer  # a Tokenizer, but for a plan
        self.mesh = make_mesh(config.mesh, devices)
        self.devices = devices_of(self.mesh)
        self.process = (jax.process_index(), jax.process_count())
        self.model = build_model(config, tokenizer, self.devices, architecture)
        self.config = config = _without_packing(config, self.model)
        if batch_shards(self.mesh) % jax.process_count():
            raise InputError(
                f"config.mesh splits a batch in {batch_shards(self.mesh)}, over {jax.process_count()} processes. Each "
                'needs rows of its own: keep the axis "model" within a process'
            )
        if trains:
            _check_batch(config, self.mesh, self.model)
        self.local_batch = (config.batch_size or 0) // jax.process_count()  # None: another's weights are evaluated
        self.eval_batch = _eval_batch(config, self.mesh) // jax.process_count()
        self.shards = batch_shards(self.mesh) // jax.process_count()
        self.side = self.model.config.vision.image_size
        self.context_length = self.model.config.text.context_length
        self.canvas = canvas_side(config, self.side)
        self._embed = steps.make_embed_step(self.model, config.data.mean, config.data.std)
        self._gather = jax.jit(functools.partial(sharding.gather, mesh=self.mesh, rules=config.sharding))
        self._val_step = steps.make_val_step(self.model, config, self.mesh)
        self._loss_of = jax.jit(steps.objective_of(config))

    def view(self, batch_size: int) -> dict:
        """How the pipeline makes batches of so many rows in this process, in training and in evaluation."""
        return dict(batch_size=batch_size, image_side=self.side, process=self.process, canvas=self.canvas)

    @property
    def packs(self) -> bool:
        """Whether training packs its captions: config.model.pack_text, once settled (resolve.packing)."""
        return self.config.model.pack_text == "on" and self.config.model.pack_rows is not None

    @property
    def unit_captions(self) -> int:
        """Captions of a unit (common/packing.py) of a training batch."""
        return self.local_batch // (self.shards * self.config.accumulate) * (1 + self.config.data.two_views)

    @property
    def unit_rows(self) -> int:
        """Rows of a unit of a packed training batch."""
        return packing.scaled(self.config.model.pack_rows, self.unit_captions)

    def step_tflop(self, packs: bool, whole: bool = False) -> float:
        """Operations of a training step in TFLOP, of a batch whose captions are packed or padded; `whole`: of whole
        images, after config.model.vision.patch_dropout_until."""
        units = batch_shards(self.mesh) * self.config.accumulate
        rows = units * self.unit_rows if packs else None
        views = 1 + self.config.data.two_views
        patches = None if whole else self.model.config.kept_patches(self.config.model.vision.patch_dropout)
        size = self.config.batch_size
        return flops.step_flops(self.model.config, size, views, rows, patches, self._trained) / 1e12

    @functools.cached_property
    def _trained(self) -> set[str] | None:
        """Names of what is trained; None: all."""
        if not rules.freezes(self.config.optim):
            return None
        shapes = jax.eval_shape(lambda: self.model.init(jax.random.key(0), *self.model.example_inputs()))
        return rules.trained_names(self.config.optim, shapes["params"])

    def pack(self, tokens: np.ndarray, parts: int = 1) -> Packed | None:
        """This process's tokens (b, L) or (b, V, L), packed for its devices and for `parts` parts of the batch, as
        train/accumulation.py cuts it; None: training does not pack, or they do not fit."""
        if not self.packs:
            return None
        length = tokens.shape[-1]
        cut = tokens.reshape(self.shards, -1, parts, tokens.size // (len(tokens) * length), length).swapaxes(1, 2)
        tokens_UxcxL = cut.reshape(self.shards * parts, -1, length)
        n_Uxc = packing.lengths(tokens_UxcxL, self.tokenizer.eot_id)
        rows = packing.scaled(self.config.model.pack_rows, tokens_UxcxL.shape[1])
        return packing.pack(tokens_UxcxL, n_Uxc, rows)

    def eval_batches(self, source: Any, batch_size: int) -> Iterator[dict]:
        """Every sample of `source` once, with config.data's evaluation view."""
        from input_pipeline import pipeline

        squash = self.config.data.squash or weights_view.usual(self.model.config.vision).squash
        return pipeline.eval_batches(source, **self.view(batch_size), squash=squash)

    def encode_images(self, state: steps.TrainState, batch: dict) -> np.ndarray:
        """One batch of this process's share -> float32 (b, D) on the host."""
        return to_host(self._embed(state, to_devices(_pictures(batch), self.mesh)), self.mesh)

    def encode_texts(self, state: steps.TrainState, texts: list[str]) -> np.ndarray:
        """Any number of texts -> float32 (n, D) on the host, in batches of one shape."""
        if self.config.model.pack_text != "off":
            return self._encode_packed(state, texts)
        parts = []
        for start in range(0, len(texts), self.eval_batch):
            some = texts[start : start + self.eval_batch]
            padded = some + [""] * (self.eval_batch - len(some))
            tokens = self.tokenizer(padded, self.context_length)
            z = self._embed(state, to_devices({"tokens": tokens}, self.mesh))
            parts.append(to_host(z, self.mesh)[: len(some)])
        return np.concatenate(parts)

    def _encode_packed(self, state: steps.TrainState, texts: list[str]) -> np.ndarray:
        """The same in a quarter of the rows: no slower than padded, whatever the lengths."""
        rows = -(-self.eval_batch // (4 * self.shards))
        captions, parts, begin = 8 * rows, [np.zeros((0, self.model.config.embed_dim), np.float32)], 0
        while begin < len(texts):
            tokens = self.tokenizer(texts[begin : begin + self.shards * captions], self.context_length)
            n = packing.lengths(tokens, self.tokenizer.eot_id)
            packed, where = packing.fill(tokens, n, self.shards, captions, rows)
            z = to_host(self._embed(state, to_devices({"tokens": packed}, self.mesh)), self.mesh)
            parts.append(z.reshape(self.shards, captions, -1)[where])
            begin += len(parts[-1])
        return np.concatenate(parts)

    def validation(self, state: steps.TrainState, source: Any) -> dict[str, float]:
        """Mean of the loss's parts over the whole batches of `source`, as {"val/clip": ...}.

        Fewer samples than a batch are one smaller batch, and so is a batch with samples that cannot be read. With
        config.eval.diagnostics also how the first batch's embeddings lie (losses/diagnostics.py).

        Raises:
          InputError: a batch has fewer than two samples that can be read.
        """
        batches = evaluation.agreed(self.eval_batches(source, self.local_batch))
        parts, numbers = [], {}
        for number, batch in enumerate(batches):
            if number >= max(1, source.size // self.config.batch_size):
                continue  # the rest is read, so that its bad samples are named, and those of the batches before
            tokens = self.tokenizer(batch["caption"], self.context_length)
            packed = self.pack(tokens)
            states = processes.of_all(2 * int(batch["mask"].all()) + (packed is not None))
            whole, fits = min(states) >= 2, all(state % 2 for state in states)
            rows = to_devices(_pictures(batch) | {"tokens": packed if fits else tokens}, self.mesh)
            if not whole or (self.config.eval.diagnostics and not parts):
                z = self._embed_pairs(state, rows, batch["mask"])
                if len(z[0]) < 2:
                    raise InputError(f"a batch of config.data.val has {len(z[0])} samples that can be read")
                if self.config.eval.diagnostics and not parts:
                    numbers = _diagnostics(*z, np.exp(float(state.params["logit_scale"])))
            part = self._val_step(state, rows) if whole else self._loss_of(state.params, *z)
            parts.append(jax.device_get(part))  # one batch at a time: queued ones hold their pictures on the devices
        numbers |= {key: np.mean([float(part[key]) for part in parts]) for key in parts[0]}
        return {f"val/{key}": float(value) for key, value in numbers.items()}

    def _embed_pairs(
        self, state: steps.TrainState, rows: dict, mask_b: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings (n, D) of the pairs of a batch that are none of its padding, of all processes, on the host."""
        images, texts = {k: v for k, v in rows.items() if k != "tokens"}, {"tokens": rows["tokens"]}
        found = [to_host(self._embed(state, some), self.mesh) for some in (images, texts)]
        found.append(mask_b)
        if jax.process_count() > 1:
            found = jax.tree.map(np.concatenate, multihost_utils.process_allgather(found))
        z_img_BxD, z_txt_BxD, mask_B = found
        return z_img_BxD[mask_B], z_txt_BxD[mask_B]

    def encoder(self, state: steps.TrainState) -> evaluation.Encoder:
        """What the evaluations need of the model."""
        state = dataclasses.replace(state, params=self._gather(state.params))  # once, not in every batch
        return evaluation.Encoder(
            images=lambda batch: self.encode_images(state, batch),
            texts=lambda texts: self.encode_texts(state, texts),
            batches=lambda source: self.eval_batches(source, self.eval_batch),
            image_side=self.side,
            device=self.mesh.local_devices[0],
        )


def _without_packing(config: ConfigDict, model: models.CLIP | Adapted) -> ConfigDict:
    """With model.pack_text off where the text tower attends both ways, over the padding too."""
    if model.config.text.causal:
        return config
    if config.model.pack_text == "on":
        raise InputError(
            "config.model.pack_text=on. Expected auto or off: SigLIP's text tower attends both ways, also to padding"
        )
    config = configs.complete(config.to_dict())
    config.model.pack_text = "off"
    return config


def _check_batch(config: ConfigDict, mesh: jax.sharding.Mesh, model: models.CLIP | Adapted) -> None:
    """Whether batches divide over devices, parts and lists."""
    shards, batch, parts = batch_shards(mesh), config.batch_size, config.accumulate
    if batch % shards:
        raise InputError(
            f"config.batch_size={batch} does not divide over {shards} devices. Try {max(1, batch // shards) * shards}"
        )
    if batch % (shards * parts):
        raise InputError(
            f"config.batch_size={batch} does not divide into config.accumulate={parts} parts over {shards} devices"
        )
    if config.loss.list_size and batch % config.loss.list_size:
        raise InputError(
            f"config.loss.list_size={config.loss.list_size} does not divide config.batch_size={batch}. Expected a "
            "divisor, or None for lists of the whole batch"
        )
    if parts > 1 and isinstance(model.config.vision, models.ResNetConfig):
        raise InputError(
            f"config.accumulate={parts}: a ResNet's batch norm needs the statistics of the whole batch at every layer, "
            "so its batch cannot go through in parts. Use a ViT, or config.model.remat=True"
        )


def _eval_batch(config: ConfigDict, mesh: jax.sharding.Mesh) -> int:
    """Rows of an evaluation batch, over all devices. Without activations to keep, a device holds _EVAL_ROWS of any
    preset; and no more than training's, which was seen to fit."""
    shards = batch_shards(mesh)
    usual = _EVAL_ROWS_OF_A_CPU if mesh.devices.flat[0].platform == "cpu" else _EVAL_ROWS
    rows = config.eval.batch_size or min(config.batch_size or usual * shards, _EVAL_ROWS * shards)
    return -(-rows // shards) * shards


def image_side(config: ConfigDict) -> int:
    """Pixels along a side of the pictures of config.model, before there is a tokenizer to build it with."""
    if config.model.name is None:
        return config.model.image_size or 0  # settled once the data are open; only drawn scenes depend on it
    return resolve.vision_tower(config).image_size


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
            f"config.data.canvas={canvas} is less than the model's image_size, {side}. Give more, or None to choose it"
        )
    return canvas


def build_model(
    config: ConfigDict,
    tokenizer: Tokenizer | Vocabulary,
    devices: Devices | None = None,
    architecture: models.ClipConfig | None = None,
) -> models.CLIP | Adapted:
    """The model of config.model with the tokenizer's vocabulary and the objective's scale and bias.

    Its attention is chosen for `devices`; None: XLA's, which any device has. `architecture`: in place of the preset's,
    and without adapters.
    """
    fields = configs.network(config.model)
    if config.loss.objective == "siglip" or "siglip" in config.loss.terms:  # starts as Zhai et al. have it
        fields["logit_scale"] = math.log(10) if fields["logit_scale"] is None else fields["logit_scale"]
        fields["logit_bias"] = -10.0 if fields["logit_bias"] is None else fields["logit_bias"]
    try:
        if architecture is not None:
            dtype, choice = fields["dtype"], fields["attention"]
            attention = models.choose_attention(choice, architecture, dtype, devices) if devices else "xla"
            return models.CLIP(architecture, jax.numpy.dtype(dtype), attention=attention)
        words: dict[str, Any] = dict(vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id)
        model = models.build(fields.pop("name"), devices=devices, **words, **fields)
    except ValueError as error:
        raise InputError(f"config.model: {error}") from None
    start = config.model.logit_scale
    if start is not None and not model.config.siglip and not steps.MIN_LOG_SCALE <= start <= steps.MAX_LOG_SCALE:
        raise InputError(f"config.model.logit_scale={start}. Expected 0 to ln 100 = {steps.MAX_LOG_SCALE}")
    if (dropout := config.model.vision.patch_dropout) and isinstance(model.config.vision, models.ResNetConfig):
        raise InputError(f"config.model.vision.patch_dropout={dropout}: a ResNet has no patches. Expected 0, or a ViT")
    return model if config.optim.lora is None else Adapted(model, config.optim.lora)


def _pictures(batch: dict) -> dict:
    return {key: batch[key] for key in ("image", "size", "windows") if key in batch}


@jax.jit
def _diagnostics(z_img_BxD: jax.Array, z_txt_BxD: jax.Array, scale: jax.Array) -> dict:
    cosine = losses.gradient_cosine(z_img_BxD, z_txt_BxD, scale)
    return losses.embedding_diagnostics(z_img_BxD, z_txt_BxD) | {"gradient_cosine": cosine}
