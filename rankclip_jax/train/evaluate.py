"""Mode eval: every evaluation that the configuration names, of a checkpoint or of weights from elsewhere."""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from optax import identity

from rankclip_jax import config as configs
from rankclip_jax import evaluation
from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.metrics_file import now
from rankclip_jax.common.ownership import Owned
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.evaluation import artifacts, results_file
from rankclip_jax.parallel import processes, sharding
from rankclip_jax.train import step as steps
from rankclip_jax.train import workdir as workdirs
from rankclip_jax.train.session import Session
from rankclip_jax.weights import checkpoint, pretrained


def evaluate(config: ConfigDict, workdir: str | Path | None, out: Path | None = None) -> dict:
    """Evaluates the workdir's best (or newest) checkpoint, and its averages beside it, or config.eval.model.

    Prints tables. Adds the results to WORKDIR/eval.json (evaluation/results_file.py), and writes WORKDIR/eval/ for the
    report: of the workdir's own run, or, while that was not evaluated, of the other model.

    Args:
      config: of a workdir's run, its own (`settings`).
      out: the file of the results, instead of WORKDIR/eval.json.

    Raises:
      InputError: there is nothing to evaluate, or nothing to evaluate on.
    """
    if config.eval.model is not None:
        session, state = _model(config)
    elif workdir is not None:
        session, state = _workdir(config, Path(workdir))
    else:
        raise InputError("nothing to evaluate: give the --workdir of a run, or --config.eval.model=PATH")
    step, folder, file = int(state.step), None, None
    own = config.eval.model is None
    if processes.is_first():
        writable = workdir is not None and (not os.path.exists(workdir) or os.access(workdir, os.W_OK))
        if workdir and not (writable or out):
            raise InputError(f"{workdir} cannot be written; give --out FILE for the results")
        file = out or (Path(workdir) / "eval.json" if workdir else None)
        before, claims = {}, {}
        if file:
            Owned(file.parent, "eval").check([file.name])
            before, claims[file.parent] = results_file.read(file), [file.name]
        if workdir and writable and (own or results_file.RUN not in before):
            folder = Path(workdir) / "eval"
            claims.setdefault(Path(workdir), []).extend(f"eval/{name}" for name in artifacts.names(config.eval))
        for place, names in claims.items():
            Owned(place, "eval").claim(names)
    sets = evaluation.open_sets(config.eval, session.side)
    results = evaluation.evaluate(config.eval, session.encoder(state), sets, folder=folder)
    if isinstance(state, steps.AveragedState):
        averaged = evaluation.evaluate(config.eval, session.encoder(steps.averaged(state)), sets)
        results = evaluation.beside(results, averaged)
    if not any(results[kind] for kind in evaluation.KINDS):
        raise InputError("; ".join(results["missing"].values()) or "config.eval names no set to evaluate on")
    if file:
        results |= {"evaluated": {"date": now(), "device": str(session.devices)}}
        results_file.add(file, results_file.key(config.eval.model), step, results)
    of = config.eval.model or f"step {step} of {workdir and storage.shown(workdir)}"
    print(f"{of}\n{evaluation.text(results)}", end="")
    return results


def settings(spec: str | None, workdir: Path | None, overrides: list[str]) -> ConfigDict:
    """The configuration of an evaluation: that of the workdir's run, with the evaluations of `spec` and `overrides`.

    Args:
      spec: as `config.load`; None: the workdir's own, or the defaults where config.eval.model is evaluated.

    Raises:
      InputError: another model, tokenizer, objective or view than the run's is asked for; or what is not there.
    """
    given = workdirs.settings(spec, workdir, overrides, fallback={})
    old = workdirs.stored_config(workdir) if workdir else None
    if old is not None and workdir and given.eval.model is None:
        workdirs.check_same_config(workdir, old, given)
        return configs.with_stored(given, old)
    if not any(override.startswith("model.activation=") for override in overrides):
        given.model.activation = None  # the run's is not that of another model
    return given


def _workdir(config: ConfigDict, workdir: Path) -> tuple[Session, steps.TrainState]:
    if not (workdir / "tokenizer.json").exists():
        if (workdir / "config.json").exists():
            raise InputError(f"{workdir} has no tokenizer.json; restore it")
        raise InputError(f"{workdir} holds no trained run; train there first")
    session = Session(config, Tokenizer.load(str(workdir / "tokenizer.json")), trains=False)
    abstract = steps.Fresh(session.model, identity(), 0, session.mesh, config.sharding, config.optim).abstract
    kept = [field.name for field in dataclasses.fields(abstract) if field.name not in ("step", "opt_state")]
    variables = {name: getattr(abstract, name) for name in kept}
    restored = checkpoint.restore_variables(workdir, config.checkpoint, variables)
    if restored is None:
        raise InputError(f"{workdir} holds no complete checkpoint; train there first with --mode=train")
    return session, type(abstract)(jnp.int32(restored.step), **restored.state, opt_state=())


def _model(config: ConfigDict) -> tuple[Session, steps.TrainState]:
    read = pretrained.read(config.eval.model, config.tokenizer.path, config.model.activation or "quick_gelu")
    session = session_of(config, read)
    return session, state_of(session, read)


def session_of(config: ConfigDict, read: pretrained.Pretrained) -> Session:
    """A session for a model of any origin, with config's devices and evaluations.

    Raises:
      InputError: the model has no tokenizer, or a preprocessing that the evaluation has not.
    """
    name = config.eval.model or read.path
    if read.tokenizer is None:
        raise InputError(
            f"{name} has no tokenizer; give --config.tokenizer.path a tokenizer.json or a hub id "
            '(OpenAI\'s is "openai/clip-vit-base-patch32")'
        )
    side = read.config.vision.image_size
    if (read.view.resize, read.view.crop) != (side, side):
        raise InputError(
            f"{name} resizes images to {read.view.resize} pixels and crops {read.view.crop}; evaluation "
            f"resizes to {side}, the size that it crops"
        )
    config = configs.complete(config.to_dict())
    with config.ignore_type():
        config.data.mean, config.data.std = tuple(read.view.mean), tuple(read.view.std)
        config.data.squash = read.view.squash
        config.batch_size = None  # of a training, which this is not
    return Session(config, read.tokenizer, architecture=read.config, trains=False)


def state_of(session: Session, read: pretrained.Pretrained) -> steps.TrainState:
    """The parameters of a model on the session's devices."""
    params, batch_stats = read.variables["params"], read.variables.get("batch_stats", {})
    state = steps.TrainState(jnp.int32(read.step or 0), params, batch_stats, opt_state=())
    return jax.device_put(state, sharding.state_shardings(state, session.mesh, session.config.sharding))
