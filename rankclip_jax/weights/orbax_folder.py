"""Folder with a model only: rankclip_jax.json (the architecture) and an Orbax checkpoint of its arrays."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import write_whole
from rankclip_jax.common.foreign_files import read_json
from rankclip_jax.common.trees import by_name, nested
from rankclip_jax.models import ClipConfig, unstack_layers
from rankclip_jax.weights import architecture, late_callbacks, layouts

CONFIG, ARRAYS = "rankclip_jax.json", "variables"
UNFINISHED = ARRAYS + ".orbax-checkpoint-tmp"  # Orbax's name for the arrays until all are written


def write_orbax(folder: str | Path, config: ClipConfig, variables: Mapping) -> None:
    """Writes {'params': ..., 'batch_stats': ...} in float32, blocks unrolled (scanned ones are unstacked).

    Raises ValueError naming a parameter that is missing, unknown or of another shape than the config's, or if the
    folder already has arrays.
    """
    layouts.to_state(variables, config, layouts.openai)  # raises if they do not fit
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: unstack_layers(tree) for name, tree in variables.items() if tree}
    arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), arrays)
    with late_callbacks.one_report(), ocp.StandardCheckpointer() as writer:
        try:
            writer.save(folder / ARRAYS, arrays)
            writer.wait_until_finished()
        except Exception as error:  # whatever Orbax and TensorStore raise on a full disk
            raise InputError(f"cannot write {folder / ARRAYS}: {one_line(error)}") from None
    write_whole(folder / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_orbax(folder: Path) -> tuple[ClipConfig, dict]:
    """Reads a folder of `write_orbax` as NumPy arrays. Raises ValueError if the checkpoint is missing or incomplete."""
    try:
        config = architecture.from_ours(read_json(folder / CONFIG))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a CLIP ({one_line(error, kind=True)})") from error
    shapes = layouts.template(config)
    abstract = nested({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    with late_callbacks.one_report(), ocp.PyTreeCheckpointer() as reader:
        try:
            arrays = reader.restore(
                folder.resolve() / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract),
                ),
            )
        except Exception as error:  # whatever Orbax and TensorStore raise on damage of every kind
            raise ValueError(
                f"{ARRAYS} is not a complete Orbax checkpoint of this model ({one_line(error)})"
            ) from error
    read = by_name(arrays)
    for name, shape in shapes.items():
        if read[name].shape != shape:
            raise ValueError(f"{name} has shape {read[name].shape}; expected {shape} for this architecture")
    return config, arrays
