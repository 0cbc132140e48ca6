"""Reads the `.npz` of big_vision's two towers, in which SigLIP's authors publish its weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.foreign_files import refuse_inflating, refuse_stand_in
from rankclip_jax.models import ClipConfig, TextConfig, VitConfig
from rankclip_jax.weights.architecture import SIGLIP_EOS

_HEADS = r"/MultiHeadDotProductAttention_0/(query|key|value|out)/(kernel|bias)$"


def read_npz(path: Path) -> tuple[ClipConfig, dict[str, np.ndarray]]:
    """The architecture and the arrays by name (`layouts.big_vision`): blocks unrolled, heads side by side.

    Raises ValueError if the file is damaged, a stand-in (Git LFS), or is not SigLIP's towers.
    """
    refuse_stand_in(path)
    try:
        refuse_inflating(path)
        with np.load(path, allow_pickle=False) as file:
            stored = {name.removeprefix("params/"): file[name] for name in file.files if not name.startswith("opt/")}
    except InputError:
        raise
    except Exception as error:  # NumPy's reader and zipfile raise any of a dozen kinds
        raise ValueError(f"{path.name} is damaged or truncated ({one_line(error)}); download it again") from error
    arrays = {}
    for name, value in stored.items():
        if value.dtype == np.dtype("V2"):  # NumPy has no bfloat16, and keeps its bytes
            value = value.view(jnp.bfloat16)
        if "/encoderblock/" in name:  # scanned
            arrays |= {name.replace("encoderblock", f"encoderblock_{i}"): layer for i, layer in enumerate(value)}
        else:
            arrays[name] = value
    config = _architecture(arrays)
    return config, {name: _flat(name, value) for name, value in arrays.items()}


def _flat(name: str, value: np.ndarray) -> np.ndarray:
    """(D, H, Dh) -> (D, D) of a head's kernels, and the like; position embeddings without their leading 1."""
    if name.endswith("pos_embedding"):
        return value[0]
    found = re.search(_HEADS, name)
    if found is None:
        return value
    if found[2] == "bias":
        return value.reshape(-1)
    return value.reshape(-1, value.shape[-1]) if found[1] == "out" else value.reshape(len(value), -1)


def _architecture(arrays: Mapping[str, np.ndarray]) -> ClipConfig:
    def shape(name: str, ndim: int) -> tuple[int, ...]:
        found = arrays[name].shape if name in arrays else None
        if found is None or len(found) != ndim:
            what = "is missing" if found is None else f"has shape {found}, expected {ndim} sizes"
            raise ValueError(f"{name} {what}; these are not SigLIP's two towers of big_vision")
        return found

    def tower(encoder: str) -> tuple[int, int, int, int | None]:
        """Width, layers, heads, MLP."""
        width, heads, _ = shape(f"{encoder}/encoderblock_0/MultiHeadDotProductAttention_0/query/kernel", 3)
        mlp = shape(f"{encoder}/encoderblock_0/MlpBlock_0/Dense_0/kernel", 2)[1]
        layers = len({m[1] for name in arrays if (m := re.match(rf"{encoder}/encoderblock_(\d+)/", name))})
        return width, layers, heads, None if mlp == 4 * width else mlp

    patch = shape("img/embedding/kernel", 4)[0]
    grid = math.isqrt(shape("img/pos_embedding", 3)[1])
    # So400m/14's larger resolution is 384, of which 6 pixels are beyond the last patch; no shape shows that.
    side = 384 if (patch, grid) == (14, 27) else grid * patch
    shape("img/MAPHead_0/probe", 3)
    text_width, text_layers, text_heads, text_mlp = tower("txt/Encoder_0")
    length, vocabulary = shape("txt/pos_embedding", 3)[1], shape("txt/Embed_0/embedding", 2)[0]
    return ClipConfig(
        shape("txt/head/kernel", 2)[1],
        VitConfig(side, patch, *tower("img/Transformer"), pool="map"),
        TextConfig(text_width, text_heads, text_layers, length, vocabulary, SIGLIP_EOS, text_mlp, "last"),
        "gelu_tanh",
    )
