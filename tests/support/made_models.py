"""Workdirs as training leaves them, made without training: random parameters, checkpoints, tokenizer, metrics."""

import json
from pathlib import Path

import jax
import numpy as np

from rankclip_jax import config as configs
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.train import step as steps
from rankclip_jax.train.session import build_model
from rankclip_jax.weights.saving import Checkpoints

CAPTIONS = ["a photo of a cat", "two dogs on a beach", "a red circle on grey", "the small blue star"] * 5
VIT = dict(
    name="ViT-tiny",
    image_size=32,
    context_length=16,
    vision=dict(layers=2, width=64, heads=1),
    text=dict(layers=2, width=64, heads=1),
)
SIGLIP = VIT | dict(name="SigLIP-B/16", embed_dim=64, vision=VIT["vision"] | dict(patch_size=8))
RESNET = dict(
    name="RN-tiny",
    image_size=16,
    context_length=16,
    vision=dict(layers=(1, 1), width=16),
    text=dict(layers=1),
)


def make_config(model, **groups):
    """A complete configuration of `model` (fields of config.model), with whole groups or keys replaced."""
    return configs.complete(dict(model=model, batch_size=8, optim=dict(warmup_steps=1)) | groups)


def make_variables(config, tokenizer, seed=0):
    """(model, its variables): random ones, nowhere at their initial zeros and ones."""
    model = build_model(config, tokenizer)
    return model, drawn(model, seed)


def drawn(model, seed=0):
    """As make_variables, without compiling anything."""
    return drawn_like(jax.eval_shape(lambda: model.init(jax.random.key(0), *model.example_inputs())), seed)


def drawn_like(shapes, seed=0):
    """As drawn, of the variables' shapes."""
    rng = np.random.default_rng(seed)

    def draw(path, x):
        name = path[-1].key
        if name in ("scale", "var"):
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        return np.asarray(2.5 if name == "logit_scale" else rng.normal(0, 0.15, x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def made_state(model, tx, mesh, sharding=None):
    """A state before its first step: parameters as of drawn, moments of zero. Nothing is compiled."""
    abstract = steps.Fresh(model, tx, 0, mesh, sharding).abstract
    params = drawn_like(abstract.params)
    params["logit_scale"] = np.float32(model.initial_scale)
    if "logit_bias" in params:
        params["logit_bias"] = np.float32(-10 if model.initial_bias is None else model.initial_bias)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    state = state.replace(params=params, batch_stats=drawn_like(abstract.batch_stats))
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, abstract)


def make_workdir(path: Path, model, scores=(0.5,), **groups) -> Path:
    """A workdir with one checkpoint a score (its zero_shot/seen/top1), at steps 1, 2 ..., each of other parameters."""
    config = make_config(model, checkpoint=dict(best="zero_shot/seen/top1", keep=len(scores)), **groups)
    path.mkdir(parents=True)
    tokenizer = Tokenizer.train(CAPTIONS, 400)
    tokenizer.save(path / "tokenizer.json")
    (path / "config.json").write_text(configs.to_json(config))
    checkpoints = Checkpoints(path, config.checkpoint)
    with (path / "metrics.jsonl").open("w") as out:
        for step, score in enumerate(scores, 1):
            metrics = {"zero_shot/seen/top1": score}
            variables = make_variables(config, tokenizer, seed=step)[1]
            moments = {"mu": np.ones(3, np.float32)}
            state = steps.TrainState(np.int32(step), variables["params"], variables.get("batch_stats", {}), moments)
            checkpoints.save(step, state, 0)
            checkpoints.score(step, metrics)
            out.write(json.dumps({"step": step, "loss": 9.0}) + "\n" + json.dumps({"step": step, **metrics}) + "\n")
    checkpoints.close()
    return path
