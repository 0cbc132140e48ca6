"""Names and axes of the weights in this project, in OpenAI's (and open_clip's) state dicts, and in Hugging Face's.

A layout maps a parameter's path here to its place there. Reading and writing iterate over the parameters of a config,
so missing, unknown and misshapen tensors are found by name. Scanned towers are unstacked for writing; reading returns
unrolled ones (`models.stack_layers` converts).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np

from rankclip_jax.common.trees import by_name, nested
from rankclip_jax.models import CLIP, ClipConfig, unstack_layers


@dataclasses.dataclass(frozen=True)
class Place:
    """Tensor `key` of the other layout; `axes` transposes ours to theirs; `part`: which third of its first axis."""

    key: str
    axes: tuple[int, ...] | None = None
    part: int | None = None


Layout = Callable[[str, int], Place]

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}  # (in, out) -> (out, in); (h, w, in, out) -> (out, in, h, w)


def openai(path: str, ndim: int) -> Place:
    """Place in OpenAI's state dict of the array at `path`, such as 'visual/layer1_0/conv1/kernel'."""
    path = re.sub(r"(resblocks|layer\d|downsample)_(\d+)", r"\1/\2", path.removeprefix("text/"))
    *modules, leaf = path.split("/")
    axes = _AXES[ndim] if leaf == "kernel" else None
    if modules[-1:] and modules[-1] in ("q_proj", "k_proj", "v_proj") and modules[-2] == "attn":
        # nn.MultiheadAttention stores q, k and v in one tensor, the attention pool in three.
        fused = ".".join([*modules[:-1], "in_proj_weight" if leaf == "kernel" else "in_proj_bias"])
        return Place(fused, axes, "qkv".index(modules[-1][0]))
    return Place(".".join([*modules, _LEAVES.get(leaf, leaf)]), axes)


_HUGGING_FACE = [
    (r"^visual/proj$", "visual_projection/kernel"),
    (r"^text/text_projection$", "text_projection/kernel"),
    (r"^visual/", "vision_model/"),
    (r"^text/", "text_model/"),
    (r"/class_embedding$", "/embeddings/class_embedding"),
    (r"/conv1/", "/embeddings/patch_embedding/"),
    (r"/positional_embedding$", "/embeddings/position_embedding/embedding"),
    (r"/token_embedding/", "/embeddings/token_embedding/"),
    (r"/ln_pre/", "/pre_layrnorm/"),  # their spelling
    (r"/ln_post/", "/post_layernorm/"),
    (r"/ln_final/", "/final_layer_norm/"),
    (r"/transformer/resblocks_(\d+)/", r"/encoder/layers/\1/"),
    (r"/ln_(\d)/", r"/layer_norm\1/"),
    (r"/attnpool/c_proj/", "/head/attention/out_proj/"),
    (r"/attnpool/([qkv]_proj)/", r"/head/attention/\1/"),
    (r"/attnpool/ln/", "/head/layernorm/"),
    (r"/attnpool/", "/head/"),
    (r"/attn/", "/self_attn/"),
    (r"/mlp/c_fc/", "/mlp/fc1/"),
    (r"/mlp/c_proj/", "/mlp/fc2/"),
]


def hugging_face(path: str, ndim: int) -> Place:
    """Place in the state dict of `transformers.CLIPModel` or `SiglipModel`, which have vision transformers only."""
    for pattern, new in _HUGGING_FACE:
        path = re.sub(pattern, new, path)
    *modules, leaf = path.split("/")
    axes = _AXES[ndim] if leaf == "kernel" else None
    if modules[-2:-1] == ["attention"] and modules[-1] != "out_proj":  # SigLIP's head is an nn.MultiheadAttention
        fused = ".".join([*modules[:-1], "in_proj_weight" if leaf == "kernel" else "in_proj_bias"])
        return Place(fused, axes, "qkv".index(modules[-1][0]))
    return Place(".".join([*modules, _LEAVES.get(leaf, leaf)]), axes)


_BIG_VISION = [
    (r"^visual/", "img/"),
    (r"^text/", "txt/"),
    (r"^logit_scale$", "t"),
    (r"^logit_bias$", "b"),
    (r"/conv1/", "/embedding/"),
    (r"/positional_embedding$", "/pos_embedding"),
    (r"/token_embedding/", "/Embed_0/"),
    (r"^img/ln_post/", "img/Transformer/encoder_norm/"),
    (r"^txt/ln_final/", "txt/Encoder_0/encoder_norm/"),
    (r"^img/transformer/resblocks_(\d+)/", r"img/Transformer/encoderblock_\1/"),
    (r"^txt/transformer/resblocks_(\d+)/", r"txt/Encoder_0/encoderblock_\1/"),
    (r"/mlp/c_fc/", "/MlpBlock_0/Dense_0/"),
    (r"/mlp/c_proj/", "/MlpBlock_0/Dense_1/"),
    (r"/ln_1/", "/LayerNorm_0/"),
    (r"/ln_2/", "/LayerNorm_1/"),
    (r"/attnpool/ln/", "/attnpool/LayerNorm_0/"),
    (r"/(attn|attnpool)/(q|k|v|out|c)_proj/", r"/\1/MultiHeadDotProductAttention_0/\2/"),
    (r"/q/", "/query/"),
    (r"/k/", "/key/"),
    (r"/v/", "/value/"),
    (r"/c/", "/out/"),
    (r"/attn/", "/"),
    (r"/attnpool/", "/MAPHead_0/"),
]


def big_vision(path: str, ndim: int) -> Place:
    """Place in big_vision's two towers, as `big_vision.read_npz` gives them: in flax's axes, as here."""
    for pattern, new in _BIG_VISION:
        path = re.sub(pattern, new, path)
    return Place(path)


# Tensors that are not weights: sizes that OpenAI registered as buffers, masks, position ids, batch counters. And, of
# CLIP's towers, the bias of SigLIP's loss: no embedding and no softmax depends on it.
IGNORED = re.compile(
    r"input_resolution|context_length|vocab_size|(.*\.)?attn_mask|.*\.position_ids|.*\.num_batches_tracked|logit_bias"
)


def from_state(state: Mapping[str, np.ndarray], config: ClipConfig, layout: Layout) -> dict:
    """{'params': ...} and, for a ResNet, 'batch_stats', as float32 NumPy arrays in unrolled layout.

    Raises ValueError, one line, naming the tensors that are missing, unknown, or of another shape.
    """
    shapes = template(config)
    used, missing, fused = set(), [], {}
    ours: dict = {}
    for name, shape in shapes.items():
        place = layout(_within(name), len(shape))
        used.add(place.key)
        if place.key not in state:
            missing.append(place.key)
            continue
        theirs = state[place.key]
        expected = tuple(shape[a] for a in place.axes) if place.axes else shape
        if place.part is not None:
            expected = (3 * expected[0], *expected[1:])
        if theirs.shape != expected and not (expected == () and theirs.size == 1):
            raise ValueError(f"{place.key} has shape {theirs.shape}; expected {expected} for this architecture")
        if not jax.dtypes.issubdtype(theirs.dtype, np.floating):
            raise ValueError(f"{place.key} is {theirs.dtype}. Expected floating point: quantised weights are not read")
        if place.part is not None:
            theirs = fused.setdefault(place.key, np.split(theirs, 3))[place.part]
        value = theirs.transpose(np.argsort(place.axes)) if place.axes else theirs
        ours[name] = np.ascontiguousarray(value, np.float32).reshape(shape)
    if missing:
        raise ValueError(f"missing tensors: {_some(dict.fromkeys(missing))}")
    unknown = [k for k in state if k not in used and not IGNORED.fullmatch(k)]
    if unknown:
        raise ValueError(f"unknown tensors: {_some(unknown)}; this is not a CLIP of the expected architecture")
    return nested(ours)


def to_state(variables: Mapping, config: ClipConfig, layout: Layout) -> dict[str, np.ndarray]:
    """The float32 state dict of `variables` ({'params': ..., 'batch_stats': ...}, unrolled or scanned).

    Raises ValueError naming a parameter that is missing, unknown, or of another shape.
    """
    arrays = by_name({k: unstack_layers(v) for k, v in variables.items() if v})
    shapes = template(config)
    for odd in shapes.keys() ^ arrays.keys():
        raise ValueError(f"{odd} is {'missing' if odd in shapes else 'unknown'}: config of another model?")
    state: dict = {}
    for name, value in arrays.items():
        if np.shape(value) != shapes[name]:
            raise ValueError(f"{name} has shape {np.shape(value)}; expected {shapes[name]} for the config")
        place = layout(_within(name), len(shapes[name]))
        value = np.asarray(value, np.float32)
        value = value.transpose(place.axes) if place.axes else value
        if place.part is None:
            state[place.key] = value
        else:
            state.setdefault(place.key, [None] * 3)[place.part] = value
    return {k: np.array(np.concatenate(v) if isinstance(v, list) else v, order="C") for k, v in state.items()}


@functools.cache
def template(config: ClipConfig) -> dict[str, tuple[int, ...]]:
    """Name, such as "params/visual/proj", -> shape of every array of the model, unrolled. To be read only."""
    model = CLIP(config, scan_layers=True)  # which traces one block of a tower for all

    def init():
        variables = model.init(jax.random.key(0), *model.example_inputs())
        return {collection: unstack_layers(tree) for collection, tree in variables.items()}

    return {name: x.shape for name, x in by_name(jax.eval_shape(init)).items()}


def _within(name: str) -> str:
    """A parameter's path in its collection, "params" or "batch_stats"."""
    return name.partition("/")[2]


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
