"""The training step: a pure function of a state and a batch, jitted over a mesh of all devices."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from rankclip_jax.common.devices import devices_of
from rankclip_jax.common.drawing import compiler_options, draw, only
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.trees import overlaid
from rankclip_jax.losses import RANKING, LossSpec, clip_loss, rank_weight, weighted_loss
from rankclip_jax.models import CLIP, images, uncut_layers
from rankclip_jax.parallel.mesh import batch_axes
from rankclip_jax.parallel.sharding import gather, params_shardings, state_shardings
from rankclip_jax.train import average, forward, rules
from rankclip_jax.train.accumulation import loss_and_grads
from rankclip_jax.weights.lora import Adapted

# OpenAI clamps the learned scale of the logits to at most 100; below 1 it would flatten them.
MIN_LOG_SCALE, MAX_LOG_SCALE = 0.0, float(np.log(100))


@flax.struct.dataclass
class TrainState:
    """All that a step changes. Randomness is not in it: keys are folded from the seed and `step`.

    Attributes:
      step: int32 scalar, updates done so far.
      params: float32 tree of the model.
      batch_stats: running statistics of batch norms; empty for ViT.
      opt_state: of optax.
    """

    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState


@flax.struct.dataclass
class AveragedState(TrainState):
    """The state of a run with config.optim.ema. `ema`: {"params", "batch_stats"}, as average.begin has them."""

    ema: dict


def averaged(state: AveragedState) -> AveragedState:
    """With the averages as its weights."""
    params, stats = overlaid(state.params, state.ema["params"]), state.ema.get("batch_stats", {})
    return dataclasses.replace(state, params=params, batch_stats=stats)


class Fresh:
    """A state before its first step: its shapes at once, its numbers when they are asked for. Traced once for both.

    Attributes:
      abstract: shapes, dtypes and shardings, nothing allocated: what a checkpoint is restored into.
    """

    def __init__(
        self,
        model: CLIP | Adapted,
        tx: optax.GradientTransformation,
        seed: int,
        mesh: jax.sharding.Mesh,
        sharding: str | Sequence | None,
        optim: ConfigDict | None = None,
    ):
        """`sharding`: config.sharding, with which the state is born. `optim`: as fresh_state."""
        self._init, self._mesh = (lambda: fresh_state(model, tx, seed, optim)), mesh
        shapes = jax.eval_shape(self._init)
        self._shardings = state_shardings(shapes, mesh, sharding)
        self.abstract: TrainState = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self._shardings
        )

    def state(self, taken: TrainState | None = None) -> TrainState:
        """Drawn from the seed. `taken`: `abstract` with some arrays in place of shapes; they stay and are not drawn."""
        if taken is None:
            return self._drawn(self._init, self._shardings)
        leaves, tree = jax.tree.flatten(taken)
        missing = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]
        shardings = list(itertools.compress(jax.tree.leaves(self._shardings), missing))
        drawn = iter(self._drawn(only(self._init, missing), shardings))
        return jax.tree.unflatten(tree, [next(drawn) if lacks else x for x, lacks in zip(leaves, missing, strict=True)])

    def _drawn(self, init, shardings):
        options = compiler_options(devices_of(self._mesh).platform)
        jitted = jax.jit(init, out_shardings=shardings, compiler_options=options)
        whole = all(sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings))
        if whole and jax.process_count() == 1:  # each device has room for all of it
            return jax.device_put(draw(jitted, self._mesh.devices.flat[0]), shardings)
        return jitted()


def fresh_state(
    model: CLIP | Adapted, tx: optax.GradientTransformation, seed: int | jax.Array, optim: ConfigDict | None = None
) -> TrainState:
    """A state before its first step; `seed` may be traced, so that one program makes the states of many seeds.

    `optim`: config.optim; None, or without ema: no averages.
    """
    variables = model.init(jax.random.key(seed), *model.example_inputs())
    params, stats = variables["params"], variables.get("batch_stats", {})
    state = jnp.int32(0), params, stats, tx.init(params)
    if optim is None or optim.ema is None:
        return TrainState(*state)
    return AveragedState(*state, average.begin(params, stats, optim))


def loss_spec(config: ConfigDict) -> LossSpec:
    """The objective of config.loss.

    Raises:
      InputError: all of its weights are 0, or config.data.two_views lacks the contrastive term that it adds to.
    """
    loss = config.loss.to_dict()
    spec = LossSpec(**loss | {"schedule": loss["schedule"] or "ramp"})  # None where no training settled it
    try:
        weights = spec.weights()
    except ValueError as error:
        raise InputError(f"config.loss: {error}") from None
    if config.data.two_views and "clip" not in weights:
        raise InputError(
            f"config.data.two_views adds to the contrastive term, and config.loss.objective={spec.objective} has none "
            "or gives it no weight. Use another objective, or set config.loss.terms.clip=1.0"
        )
    return spec


def make_train_step(
    model: CLIP | Adapted,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    *,
    total_steps: int,
    steps_per_epoch: int,
    whole: bool = False,
) -> jax.stages.Wrapped:
    """Returns jitted train_step(state, batch) -> (state, metrics); the state given is donated.

    `batch`: pictures as input_pipeline's TrainBatches gives them (images.views) and "tokens" int32 (B, L) or (B, V,
    L), split over batch_axes; B is global, and so are the batch statistics and the negatives. Or "tokens" are Packed, a
    unit for each device and part, device by device: another program, the same numbers. `metrics`: float32 scalars.
    With config.accumulate > 1 (no batch norm) the activations of that part of the batch are held at a time, for the
    same gradient. `whole`: of whole images, as the steps after config.model.vision.patch_dropout_until are.
    """
    seed_key = jax.random.key(config.seed)
    length = dict(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    update = train_step_function(model, tx, config, mesh, **length, whole=whole)

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        return update(state, batch, seed_key)

    return jax.jit(train_step, donate_argnums=0)


def train_step_function(
    model: CLIP | Adapted,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    mesh: jax.sharding.Mesh | None,
    *,
    total_steps: int,
    steps_per_epoch: int,
    whole: bool = False,
) -> Callable:
    """Returns what `make_train_step` jits: train_step(state, batch, seed_key) -> (state, metrics).

    A pure function to scan over batches, or to vmap over states and keys of several seeds. `mesh` None: one device,
    no sharding. `seed_key`: of all randomness of the run; a step folds its number in. `whole`: as make_train_step.
    """
    spec = loss_spec(config)
    ramp_epochs = spec.ramp_epochs or -(-total_steps // steps_per_epoch)
    kept = None if whole else model.config.kept_patches(config.model.vision.patch_dropout)

    def train_step(state: TrainState, batch: dict, seed_key: jax.Array) -> tuple[TrainState, dict]:
        rows = forward.rows_of(batch, state.step, seed_key, model, config, kept)
        ramp = rank_weight(state.step // steps_per_epoch + 1, ramp_epochs)
        used = state.params if mesh is None else gather(state.params, mesh, config.sharding)
        trained, frozen = rules.split(used, config.optim)

        def loss_of(trained, embeds):
            z_img_BxVxD, z_txt_BxVxD, batch_stats = embeds
            params = rules.join(trained, frozen)
            loss, parts = _objective(z_img_BxVxD, z_txt_BxVxD, params, spec, ramp, mesh)
            return loss, (parts, batch_stats)

        embed = forward.embed_function(model, config, frozen, state.batch_stats, kept)
        constrain = functools.partial(forward.constrained, mesh=mesh)
        value, grads = loss_and_grads(embed, loss_of, trained, rows, config.accumulate, constrain)
        loss, (parts, batch_stats) = value
        zeros = jax.tree.map(jnp.zeros_like, frozen)
        grads = uncut_layers(rules.join(grads, zeros))  # the optimiser leaves out what is frozen
        params, opt_state, grad_norm = _updated(state, grads, tx, config, mesh)
        # SigLIP's authors do not: its published scales are above 100.
        if not model.config.siglip and trained["logit_scale"] is not None:
            params = clamp_logit_scale(params)
        metrics = {"loss": loss, **parts, "grad_norm": grad_norm, "logit_scale": _scale(state.params)}
        if "logit_bias" in state.params:
            metrics["logit_bias"] = state.params["logit_bias"]
        if spec.objective in RANKING:
            metrics["rank_weight"] = ramp if spec.schedule == "ramp" else jnp.float32(1)
        new = dict(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
        if config.optim.ema is not None and isinstance(state, AveragedState):
            new["ema"] = average.update(state.ema, params, batch_stats, state.step, config.optim.ema)
        return dataclasses.replace(state, **new), metrics

    return train_step


def _updated(state, grads, tx, config, mesh):
    """(parameters, opt_state, norm of the gradients) after the optimiser's step."""
    if mesh is not None:  # each device updates its own part
        where = params_shardings(grads, mesh, config.sharding)
        grads = jax.lax.with_sharding_constraint(grads, where)
    opt_state, grad_norm = state.opt_state, optax.tree.norm(grads)
    on_cpu = mesh is not None and devices_of(mesh).platform == "cpu"
    if on_cpu and config.optim.grad_clip_norm is None:
        opt_state = _counters_after(grad_norm, opt_state)
    updates, opt_state = tx.update(grads, opt_state, state.params)
    return optax.apply_updates(state.params, updates), opt_state, grad_norm


def _counters_after(grad_norm: jax.Array, opt_state: optax.OptState) -> optax.OptState:
    """The same opt_state, whose counters wait for the norm of the gradients, and so for all that reads the weights.

    XLA on a CPU would else copy each weight in each step, since it cannot prove that the weight is read before it is
    replaced. What clips gradients waits for the norm anyway. A norm that is no number ends the run; it moves them.
    """
    late = jnp.isnan(grad_norm).astype(jnp.int32)
    return jax.tree.map(lambda x: x + late if jnp.issubdtype(x.dtype, jnp.integer) else x, opt_state)


def clamp_logit_scale(params: dict) -> dict:
    """Params with the logit scale brought into [0, ln 100], as OpenAI does after each update."""
    return params | {"logit_scale": jnp.clip(params["logit_scale"], MIN_LOG_SCALE, MAX_LOG_SCALE)}


def _scale(params):
    return jnp.exp(params["logit_scale"])


def _objective(z_img_BxVxD, z_txt_BxVxD, params, spec, ramp, mesh):
    """The objective of the first views; with a second view of each, the contrastive term gives half its weight to the
    mean of the images' contrastive loss with their second views and the captions' with theirs (CyCLIP's "inmodal")."""
    z_img_BxD, z_txt_BxD = z_img_BxVxD[:, 0], z_txt_BxVxD[:, 0]
    weights, scale = spec.weights(ramp), _scale(params)
    two_views = z_img_BxVxD.shape[1] == 2
    if two_views:
        weights["clip"] /= 2
    # The loss's rows go over all devices, the towers' only over those that hold different rows.
    axes = None
    if mesh is not None:
        axes = mesh.axis_names if z_img_BxD.shape[0] % mesh.size == 0 else batch_axes(mesh)
    bias = params.get("logit_bias", 0.0)
    loss, parts = weighted_loss(z_img_BxD, z_txt_BxD, scale, bias, spec, weights, mesh=mesh, axes=axes)
    if two_views:
        pairs = [(z[:, 0], z[:, 1]) for z in (z_img_BxVxD, z_txt_BxVxD)]
        second = sum(clip_loss(*z, scale, mesh=mesh, axes=axes) for z in pairs) / 2
        loss, parts = loss + weights["clip"] * second, parts | {"clip_second_view": jax.lax.stop_gradient(second)}
    return loss, parts


def make_val_step(model: CLIP | Adapted, config: ConfigDict, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    """Returns jitted val_step(state, batch) -> the objective's parts (float32 scalars), as in evaluation."""
    spec = loss_spec(config)

    def val_step(state, batch):
        variables = {"params": gather(state.params, mesh, config.sharding), "batch_stats": state.batch_stats}
        views_BxSxSx3 = images.views(batch, model.config.vision.image_size)[:, 0]
        pixels = images.normalize(views_BxSxSx3, config.data.mean, config.data.std)
        z_img_BxD, z_txt_BxD, _ = model.apply(variables, pixels, batch["tokens"])
        return _objective(z_img_BxD[:, None], z_txt_BxD[:, None], state.params, spec, 1.0, mesh)[1]

    return jax.jit(val_step)


def objective_of(config: ConfigDict) -> Callable:
    """Returns loss_of(params, z_img (B, D), z_txt (B, D)) -> the objective's parts, on one device, for any B.

    Rows beyond the last whole list of config.loss.list_size are left out; fewer rows than a list are one list.
    """
    whole = loss_spec(config)

    def loss_of(params: dict, z_img_BxD: jax.Array, z_txt_BxD: jax.Array) -> dict:
        spec = whole
        if size := whole.list_size:
            rows = len(z_img_BxD) // size * size
            spec = whole if rows else dataclasses.replace(whole, list_size=None)
            z_img_BxD, z_txt_BxD = (z[: rows or None] for z in (z_img_BxD, z_txt_BxD))
        return _objective(z_img_BxD[:, None], z_txt_BxD[:, None], params, spec, 1.0, None)[1]

    return loss_of


def make_embed_step(
    model: CLIP | Adapted, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> jax.stages.Wrapped:
    """Returns jitted embed(state, batch) -> float32 (B, D) of unit norm, of the pictures or of batch["tokens"].

    `mean`, `std`: as images.normalize.
    """

    def embed(state, batch):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        if "image" in batch:
            pixels = images.views(batch, model.config.vision.image_size)[:, 0]
            return model.apply(variables, images.normalize(pixels, mean, std), method="encode_image")
        return model.apply(variables, batch["tokens"], method="encode_text")

    return jax.jit(embed)
