"""Reads a trained model from any path: a workdir, a folder of any supported layout, or a weights file."""

import dataclasses
import json
from pathlib import Path

import jax
from ml_collections import ConfigDict

from rankclip_jax import config as configs
from rankclip_jax import models
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.models.presets import Activation
from rankclip_jax.weights import checkpoint, formats
from rankclip_jax.weights import view as preprocess


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model read from a path.

    Attributes:
      path: its source.
      config: the architecture.
      variables: {"params": ..., "batch_stats": ...} (the latter for a ResNet), float32 NumPy, blocks unrolled.
      view: its image preprocessing.
      tokenizer: None if the path has none.
      run: the complete training configuration of a workdir, otherwise None.
      step: the step of a workdir's checkpoint, otherwise None.
    """

    path: Path
    config: models.ClipConfig
    variables: dict
    view: preprocess.View
    tokenizer: Tokenizer | None
    run: ConfigDict | None = None
    step: int | None = None


def read(path: str | Path, tokenizer: str | None = None, activation: Activation = "quick_gelu") -> Pretrained:
    """Reads a model.

    Args:
      path: a workdir (its best checkpoint by `config.checkpoint.best`, else its newest), or any path for
        `formats.read`. A tokenizer.json next to the weights is used.
      tokenizer: the path of a tokenizer.json, or a hub id; needed for text if the path has no tokenizer.
      activation: of weights without a config: "quick_gelu" (OpenAI, RankCLIP) or "gelu" (most of open_clip's).

    Raises:
      InputError: one line naming the path and what is wrong with it.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    own = folder / "tokenizer.json"
    words = Tokenizer.load(str(own)) if own.is_file() else None
    given = Tokenizer.load(tokenizer) if tokenizer else None
    if words and given and words.vocabulary() != given.vocabulary():
        raise InputError(f"{path} has its own tokenizer, and {tokenizer} has other ids; do not give the latter")
    words = words or given
    # A workdir without checkpoints/ has them in config.checkpoint.folder.
    if path.is_dir() and ((path / "checkpoints").is_dir() or (path / "metrics.jsonl").is_file()):
        return _workdir(path, words)
    try:
        config, variables = formats.read(path, activation=activation)
        view = preprocess.of_folder(folder, config.vision.image_size)
    except (ValueError, OSError) as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if words and (words.eot_id != config.text.eot_id or words.vocab_size > config.text.vocab_size):
        raise InputError(
            f"tokenizer {tokenizer or own} has {words.vocab_size} ids, end-of-text {words.eot_id}; the model {path} "
            f"has {config.text.vocab_size}, end-of-text {config.text.eot_id}; give the tokenizer of its training"
        )
    return Pretrained(path, config, variables, view, words)


def untrained(model: Pretrained, seed: int = 0) -> Pretrained:
    """The same architecture, tokenizer and view with random parameters: the initial ones of a run with this config.seed
    (with config.model.scan_layers: other random values)."""
    network = models.CLIP(model.config)
    variables = jax.device_get(jax.jit(lambda: network.init(jax.random.key(seed), *network.example_inputs()))())
    return dataclasses.replace(model, variables=variables, run=None, step=None)


def _workdir(path: Path, tokenizer: Tokenizer | None) -> Pretrained:
    try:
        run = configs.complete(json.loads((path / "config.json").read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is a workdir, but its config.json cannot be read ({error}); restore it") from None
    if tokenizer is None:
        raise InputError(f"{path} is a workdir, but has no tokenizer.json; restore it")
    found = checkpoint.read_variables(path, run.checkpoint)
    if found is None:
        raise InputError(f"{path} has no complete checkpoint; train it first")
    step, variables = found
    config = models.build(**run.model.to_dict(), vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id).config
    variables = {name: models.unstack_layers(tree) for name, tree in variables.items()}
    variables["params"].pop("logit_bias", None)  # of SigLIP's loss; affects neither embeddings nor a softmax
    side = config.vision.image_size
    return Pretrained(path, config, variables, preprocess.View(side, side), tokenizer, run, step)
