"""Mode eval: every evaluation that the configuration names, of a checkpoint or of weights from elsewhere."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rankclip_jax import evaluation
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import write_whole
from rankclip_jax.common.ownership import Owned
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.evaluation import artifacts
from rankclip_jax.models import images
from rankclip_jax.parallel import sharding
from rankclip_jax.train import optim
from rankclip_jax.train import step as steps
from rankclip_jax.train.session import Session
from rankclip_jax.weights import checkpoint, pretrained


def evaluate(config: ConfigDict, workdir: str | Path) -> dict:
    """Evaluates the workdir's best (or newest) checkpoint, or config.eval.model.

    Prints tables, writes WORKDIR/eval.json ({"step", "zero_shot": {set: numbers}, ..., "missing": {"kind/set":
    reason}}) and WORKDIR/eval/ for the report.

    Raises:
      InputError: there is nothing to evaluate, or nothing to evaluate on.
    """
    workdir = Path(workdir)
    session, state = _workdir(config, workdir) if config.eval.model is None else _model(config)
    step = int(state.step)
    folder = workdir / "eval" if jax.process_index() == 0 else None
    if folder:
        Owned(workdir, "eval").claim(["eval.json", *(f"eval/{name}" for name in artifacts.names(config.eval))])
    results = evaluation.evaluate(config.eval, session.encoder(state), folder=folder)
    if not any(results[kind] for kind in evaluation.KINDS):
        raise InputError("; ".join(results["missing"].values()) or "config.eval names no set to evaluate on")
    if jax.process_index() == 0:
        write_whole(workdir / "eval.json", json.dumps({"step": step, **results}, indent=2) + "\n")
        print(f"{config.eval.model or f'step {step} of {workdir}'}\n{evaluation.text(results)}", end="")
    return results


def _workdir(config, workdir):
    if not (workdir / "tokenizer.json").exists():
        raise InputError(f"{workdir} holds no trained run (no tokenizer.json); train there first with --mode=train")
    session = Session(config, Tokenizer.load(str(workdir / "tokenizer.json")))
    # The rates do not matter here, but the optimiser's state has its place in the checkpoint.
    tx = optim.make_optimizer(config.optim, config.optim.warmup_steps + 1, 1)
    abstract = steps.abstract_state(session.model, tx, session.mesh, config.sharding)
    restored = checkpoint.restore(workdir, config.checkpoint, abstract, best=True)
    if restored is None:
        raise InputError(f"{workdir} holds no complete checkpoint; train there first with --mode=train")
    return session, restored.state


def _model(config):
    read = pretrained.read(config.eval.model, config.tokenizer.path)
    if read.tokenizer is None:
        raise InputError(
            f"{config.eval.model} has no tokenizer; give --config.tokenizer.path a tokenizer.json or a hub id "
            '(OpenAI\'s is "openai/clip-vit-base-patch32")'
        )
    side = read.config.vision.image_size
    if (read.view.mean, read.view.std, read.view.resize, read.view.crop) != (images.MEAN, images.STD, side, side):
        raise InputError(f"{config.eval.model} prepares its pictures otherwise than CLIP does; evaluation does not")
    session = Session(config, read.tokenizer, architecture=read.config)
    variables = read.variables
    state = steps.TrainState(
        jnp.int32(read.step or 0), variables["params"], variables.get("batch_stats", {}), opt_state=()
    )
    return session, jax.device_put(state, sharding.state_shardings(state, session.mesh, config.sharding))
