"""Reads weights of all supported formats as (config, variables), and writes them as safetensors folders."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from rankclip_jax.common.errors import one_line
from rankclip_jax.common.files import whole, write_whole
from rankclip_jax.common.foreign_files import beginning, read_json, refuse_stand_in
from rankclip_jax.models import ClipConfig
from rankclip_jax.models.presets import Activation
from rankclip_jax.weights import architecture, big_vision, layouts, orbax_folder
from rankclip_jax.weights.torch_file import read_torch_file

_OPEN_CLIP_CONFIG = "open_clip_config.json"
# A folder's weights: the first of these that it has.
WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def read(
    path: str | Path,
    config: ClipConfig | None = None,
    activation: Activation = "quick_gelu",
    highest_id: int | None = None,
) -> tuple[ClipConfig, dict]:
    """Reads a CLIP from a file or folder.

    Args:
      path: a Hugging Face folder of a CLIP or SigLIP (config.json and model.safetensors or pytorch_model.bin, sharded
        or not), an open_clip folder (open_clip_config.json), a folder of `write_orbax`, or a file: OpenAI's `.pt`
        (TorchScript or state dict), a checkpoint of the RankCLIP code, open_clip or Lightning, a `.safetensors` of
        either layout, SigLIP's `.npz` of big_vision. A config file next to a file is used.
      config: overrides config files and shapes.
      activation: of files without a config: 'quick_gelu' (OpenAI, RankCLIP) or 'gelu' (most of open_clip's models).
      highest_id: of the tokenizer, for what pools at a text's highest id (architecture.py); None: the vocabulary's.

    Returns:
      The config and {'params': ..., 'batch_stats': ...} (the latter for a ResNet): nested dicts of float32 NumPy
      arrays, transformer blocks unrolled (`models.stack_layers(params)` for a scanned model).

    Raises:
      FileNotFoundError: no such path.
      ValueError: one line that starts with the path: truncated, unsafe, not a CLIP, or not of its config's architecture
        (the tensor is named).
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        if (path / orbax_folder.CONFIG).is_file():
            return orbax_folder.read_orbax(path)
        folder, weights = (path, _weights_in(path)) if path.is_dir() else (path.parent, path)
        if weights.suffix == ".npz":
            config, state = big_vision.read_npz(weights)
            return config, layouts.from_state(state, config, layouts.big_vision)
        state = _without_wrappers(_read_state(weights))
        hugging_face = any(k.startswith(("vision_model.", "text_model.")) for k in state)
        if config is None:
            config = config_in(folder, hugging_face, highest_id) or (
                None if hugging_face else architecture.from_weights(state, activation, highest_id)
            )
        if config is None:
            raise ValueError("Hugging Face weights without config.json; put it next to them")
        layout = layouts.hugging_face if hugging_face else layouts.openai
        return config, layouts.from_state(state, config, layout)
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(str(path)) else f"{path}: {e}") from e


def write_hf(
    folder: str | Path, config: ClipConfig, variables: Mapping, bos_id: int | None = None, pad_id: int | None = None
) -> None:
    """Writes `config.json` and `model.safetensors` (float32) for `transformers.CLIPModel` or `SiglipModel`.

    variables: {'params': ...}, unrolled or scanned. bos_id, pad_id: the tokenizer's, only recorded: the model does not
    use them. Raises ValueError for a ResNet, which Hugging Face does not support.
    """
    described = architecture.to_hugging_face(config, bos_id, pad_id)
    state = layouts.to_state(variables, config, layouts.hugging_face)
    if config.siglip:
        state |= {name: state[name].reshape(1) for name in ("logit_scale", "logit_bias")}
    folder = _new_folder(folder)
    _write_weights(folder / "model.safetensors", state)
    _write_json(folder / "config.json", described)


def write_openai(folder: str | Path, config: ClipConfig, variables: Mapping) -> None:
    """Writes OpenAI's state dict as `open_clip_model.safetensors` with an `open_clip_config.json`.

    `open_clip.create_model("local-dir:FOLDER")` loads it. `safetensors.torch.load_file` gives the state dict for
    OpenAI's own class. The config also contains our ClipConfig, so `read` returns exactly what was written.
    Architectures that open_clip does not have (stem 'small') get no 'model_cfg', and only `read` can use the folder.
    """
    state = layouts.to_state(variables, config, layouts.openai)
    for key in [k for k in state if k.endswith(".running_mean")]:
        # PyTorch's strict loading needs this counter; with momentum 0.1 nothing reads it.
        state[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
    described: dict = {"rankclip_jax": dataclasses.asdict(config)}
    if model_cfg := architecture.to_open_clip(config):
        described["model_cfg"] = model_cfg
    folder = _new_folder(folder)
    _write_weights(folder / "open_clip_model.safetensors", state)
    _write_json(folder / _OPEN_CLIP_CONFIG, described)


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder}: no weights found. Expected one of {', '.join(WEIGHTS)}")


def _read_state(path: Path) -> dict[str, np.ndarray]:
    if path.name.endswith(".index.json"):
        parts = read_json(path).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(shard, str) for shard in parts.values()):
            raise ValueError(f"{path.name} has no weight_map of names; download it again")
        shards = sorted(set(parts.values()))
        if any(shard.endswith(".index.json") for shard in shards):
            raise ValueError(f"{path.name} names another index as a shard; download it again")
        if any("/" in shard for shard in shards):
            raise ValueError(f"{path.name} names a shard in another folder; shards must be next to it")
        absent = [shard for shard in shards if not (path.parent / shard).exists()]
        if absent:
            raise ValueError(f"shard {absent[0]} is missing ({len(absent)} of {len(shards)} shards); download it again")
        return {k: v for shard in shards for k, v in _read_state(path.parent / shard).items()}
    refuse_stand_in(path)
    with open(path, "rb") as f:
        start = f.read(9)
    if start[:4] == b"PK\x03\x04":
        return read_torch_file(path)
    if start[8:] == b"{":  # eight bytes of length, then JSON
        try:
            return safetensors.numpy.load_file(path)
        except (safetensors.SafetensorError, KeyError) as e:
            raise ValueError(f"{path.name} is damaged or truncated ({one_line(e)}); download it again") from e
        except (AttributeError, TypeError) as e:  # of a type that NumPy lacks
            raise ValueError(f"{path.name} cannot be read ({one_line(e)}); save it as float32 or bfloat16") from e
    raise ValueError(
        f"{path.name} is neither safetensors nor a PyTorch archive{beginning(path)}; if it is older than PyTorch 1.6, "
        "load and save it with a newer PyTorch"
    )


# What wraps a module names it in front of whatever is within: DistributedDataParallel, torch.compile, FSDP, and
# activation checkpointing, also around a single tower or block.
_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def _without_wrappers(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A CLIP's own names: without wrappers, without the attribute that holds it ("model." in Lightning's modules; what
    is next to it is left out), and without "text." of open_clip's separate text tower."""
    state = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    with_scale = [name.removesuffix("logit_scale") for name in state if re.fullmatch(r"(.*\.)?logit_scale", name)]
    # A loss in the same module may have a scale too.
    towers = {match[1] for name in state if (match := re.match(r"(.*?)(visual|vision_model)\.", name))}
    holders = [holder for holder in with_scale if holder in towers]
    if len(holders) > 1:
        names = ", ".join(holder or "without a prefix" for holder in sorted(holders))
        raise ValueError(f"holds several models: {names}; save the one that you mean alone")
    holder = holders[0] if holders else ""
    state = {name.removeprefix(holder): value for name, value in state.items() if name.startswith(holder)}
    return {name.removeprefix("text."): value for name, value in state.items()}


def config_in(folder: Path, hugging_face: bool, highest_id: int | None = None) -> ClipConfig | None:
    """The architecture that a folder's config file gives; None without one. Raises ValueError for another than CLIP."""
    name = "config.json" if hugging_face else _OPEN_CLIP_CONFIG
    if not (folder / name).exists():
        return None
    described = read_json(folder / name)
    try:
        if hugging_face:
            return architecture.from_hugging_face(described, highest_id)
        if "rankclip_jax" in described:
            return architecture.from_ours(described["rankclip_jax"])
        return architecture.from_open_clip(described["model_cfg"], highest_id)
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as e:
        raise ValueError(f"{folder / name} does not describe a CLIP ({one_line(e, kind=True)})") from e


def _write_json(path: Path, contents: dict) -> None:
    write_whole(path, json.dumps(contents, indent=2) + "\n")


def _write_weights(path: Path, state: dict[str, np.ndarray]) -> None:
    with whole(path) as part:
        try:
            # transformers refuses files without this metadata.
            safetensors.numpy.save_file(state, part, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:
            if refused := re.search(r"os error (\d+)", str(error)):  # which only its words tell
                raise OSError(int(refused[1]), os.strerror(int(refused[1]))) from None
            raise


def _new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
