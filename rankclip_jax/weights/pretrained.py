"""Reads a trained model: a workdir, a folder of any supported layout, a weights file, or a model on the hub."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from rankclip_jax import config as configs
from rankclip_jax import models
from rankclip_jax.common import storage
from rankclip_jax.common.drawing import draw
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.foreign_files import read_json
from rankclip_jax.common.tokenizer import NO_SENTENCEPIECE, SENTENCEPIECE, Tokenizer, files_of_tokenizer
from rankclip_jax.common.trees import flatten, overlaid
from rankclip_jax.models.presets import Activation
from rankclip_jax.weights import checkpoint, formats, hub, lora
from rankclip_jax.weights import view as preprocess


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model that was read.

    Attributes:
      path: its source as it was given: a path, or a hub id; of one in a bucket, its copy here.
      config: the architecture.
      variables: {"params": ..., "batch_stats": ...} (the latter for a ResNet), float32 NumPy, blocks unrolled.
      view: its image preprocessing.
      tokenizer: None if the path has none.
      run: the complete training configuration of a workdir, otherwise None.
      step: the step of a workdir's checkpoint, otherwise None.
      averaged: whether these are a run's averages (config.optim.ema), not its last weights.
      origin: a sentence for the model card, of what was made from other models.
      loss_bias: of SigLIP's loss, where a run trained another architecture with it; no embedding reads it.
    """

    path: Path
    config: models.ClipConfig
    variables: dict
    view: preprocess.View
    tokenizer: Tokenizer | None
    run: ConfigDict | None = None
    step: int | None = None
    averaged: bool = False
    origin: str | None = None
    loss_bias: np.ndarray | None = None


def read(
    path: str | Path, tokenizer: str | None = None, activation: Activation = "quick_gelu", ema: bool = False
) -> Pretrained:
    """Reads a model.

    Args:
      path: a workdir (its best checkpoint by `config.checkpoint.best`, else its newest), or any path for
        `formats.read`, local, gs://, s3:// or http(s)://; or a hub id (`hub.locate`). A tokenizer next to the weights
        is used.
      tokenizer: as `Tokenizer.load` takes it; needed for text if the path has none.
      activation: of weights without a config: "quick_gelu" (OpenAI, RankCLIP) or "gelu" (most of open_clip's).
      ema: the averages of a workdir's run with config.optim.ema, instead of its weights.

    Raises:
      InputError: one line naming the path and what is wrong with it.
    """
    if storage.is_remote(path):
        copy = storage.fetched(str(path))
        try:
            return read(copy, tokenizer, activation, ema)
        except InputError as error:
            raise InputError(str(error).replace(str(copy), str(path))) from None
    path, found = Path(path), hub.locate(path)
    folder = found if found.is_dir() else found.parent
    has_words = folder.is_dir() and files_of_tokenizer([file.name for file in folder.iterdir()])
    words = Tokenizer.load(folder) if has_words else None
    given = Tokenizer.load(tokenizer) if tokenizer else None
    if not words and not given and (folder / SENTENCEPIECE).is_file():
        raise InputError(f"{path}: {NO_SENTENCEPIECE}")
    if words and given and words.vocabulary() != given.vocabulary():
        raise InputError(f"{path} has its own tokenizer, and {tokenizer} has other ids; do not give the latter")
    words = words or given
    # A workdir without checkpoints/ has them in config.checkpoint.folder.
    if found.is_dir() and ((found / storage.CHECKPOINTS).is_dir() or (found / "metrics.jsonl").is_file()):
        return _workdir(found, words, ema)
    if ema:
        raise InputError(f"{path} is not a workdir; only a run with config.optim.ema has averaged weights")
    # What pools at a text's highest id pools at the end of text, where no id above it comes in texts.
    end = words.eot_id if words and words.highest_id() == words.eot_id else None
    try:
        config, variables = formats.read(found, activation=activation, highest_id=end)
        view = preprocess.of_folder(folder, config.vision)
    except (ValueError, OSError) as error:
        raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if words:
        if max(words.start_id or 0, words.eot_id, words.pad_id) < config.text.vocab_size:
            words = words.within(config.text.vocab_size)
            if not config.text.causal:  # the tower pools no end, and its config need not name it
                config = dataclasses.replace(config, text=dataclasses.replace(config.text, eot_id=words.eot_id))
        if words.eot_id != config.text.eot_id or words.vocab_size > config.text.vocab_size:
            raise InputError(
                f"tokenizer {tokenizer or folder} has {words.vocab_size} ids, end-of-text {words.eot_id}; the model "
                f"{path} has {config.text.vocab_size}, end-of-text {config.text.eot_id}; give the tokenizer of its "
                "training"
            )
    _check_finite(path, variables)
    return Pretrained(path, config, variables, view, words)


def _check_finite(path: Path, variables: dict) -> None:
    """Raises InputError where a number of a model is NaN or infinite, which every embedding would be too."""
    for name, values in flatten(variables).items():
        size, finite = np.size(values), np.count_nonzero(np.isfinite(values))
        if finite < size:
            raise InputError(f"{path}: {size - finite:,} of {size:,} values of {name} are NaN or infinite; get it anew")


def untrained(model: Pretrained, seed: int = 0) -> Pretrained:
    """The same architecture, tokenizer and view with random parameters: the initial ones of a run with this config.seed
    (with config.model.scan_layers: other random values)."""
    network = models.CLIP(model.config)
    init = jax.jit(lambda: network.init(jax.random.key(seed), *network.example_inputs()))
    variables = jax.device_get(draw(init, jax.local_devices()[0]))
    return dataclasses.replace(model, variables=variables, run=None, step=None, averaged=False)


def _workdir(path: Path, tokenizer: Tokenizer | None, ema: bool) -> Pretrained:
    try:
        stored = read_json(path / "config.json")
    except (OSError, InputError) as error:
        raise InputError(f"{path} is a workdir, but its config.json cannot be read ({error}); restore it") from None
    run = configs.completed(stored)
    if ema and run.optim.ema is None:
        raise InputError(f"{path} has no averaged weights: its run has config.optim.ema=None")
    if tokenizer is None:
        raise InputError(f"{path} is a workdir, but has no tokenizer.json; restore it")
    found = checkpoint.read_variables(path, run.checkpoint, ("params", "batch_stats", *["ema"] * ema))
    if found is None:
        raise InputError(f"{path} has no complete checkpoint; train it first")
    step, variables = found
    config = models.build(**configs.network(run.model), vocab_size=tokenizer.vocab_size, eot_id=tokenizer.eot_id).config
    if ema:
        variables = overlaid(variables, variables.pop("ema"))
    variables["params"] = lora.merged(variables["params"])
    variables = {name: models.unstack_layers(tree) for name, tree in variables.items()}
    bias = None if config.siglip else variables["params"].pop("logit_bias", None)
    side = config.vision.image_size
    normal = run.data.mean or preprocess.MEAN, run.data.std or preprocess.STD
    squash = run.data.squash or preprocess.usual(config.vision).squash
    view = preprocess.View(side, side, *normal, squash=squash)
    _check_finite(path, variables)
    return Pretrained(path, config, variables, view, tokenizer, run, step, ema, loss_bias=bias)
