"""A trained model in three lines: `model = rankclip_jax.load(path)`, `encode_image`, `encode_text`, `zero_shot`."""

import itertools
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rankclip_jax import models
from rankclip_jax.common import packing
from rankclip_jax.common.devices import devices_of
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.packing import Packed
from rankclip_jax.common.progress import progress
from rankclip_jax.evaluation import zero_shot
from rankclip_jax.models.presets import Activation
from rankclip_jax.parallel.mesh import batch_sharding, make_mesh
from rankclip_jax.weights import pretrained


def load(
    path: str | Path,
    *,
    tokenizer: str | None = None,
    activation: Activation = "quick_gelu",
    dtype: str = "float32",
    ema: bool = False,
) -> "Model":
    """Loads a model for inference on all local devices.

    Args:
      path: a workdir, a folder written by `rankclip_jax.convert`, a Hugging Face or open_clip folder, or a file: an
        OpenAI or RankCLIP `.pt`, an open_clip `.pt` or `.safetensors`.
      tokenizer: the path of a tokenizer.json, or a hub id. Needed for texts if the path has no tokenizer, as with a
        `.pt`. CLIP's own is that of "openai/clip-vit-base-patch32".
      activation: of weights without a config: "quick_gelu" (OpenAI, RankCLIP) or "gelu" (most of open_clip's).
      dtype: of the towers' computation, "float32" or "bfloat16".
      ema: of a workdir: the averages of a run with config.optim.ema, instead of its weights.

    Raises:
      InputError: one line: no such path, not a model, damaged, unsafe, or inconsistent.
    """
    return Model(pretrained.read(path, tokenizer, activation, ema), dtype)


class Model:
    """Encodes images and texts. Created by `load`.

    Batches and texts are padded to a few sizes, so calls of any size compile only a few programs.

    Attributes:
      source: architecture, variables, tokenizer and view (pretrained.Pretrained).
      batch_size: the largest batch of the towers; may be changed to suit the memory.
      scale, bias: the logits are scale * cosine + bias; CLIP's have no bias (0).
    """

    def __init__(self, source: pretrained.Pretrained, dtype: str = "float32"):
        if getattr(dtype, "__name__", str(dtype)) not in ("float32", "bfloat16"):  # int8 would give nonsense
            raise InputError(f"dtype={dtype!r}. Expected float32 or bfloat16")
        self.source, self.batch_size = source, 64
        self.scale = float(np.exp(source.variables["params"]["logit_scale"]))
        self.bias = float(source.variables["params"].get("logit_bias", 0.0))
        self._mesh = make_mesh({"data": -1}, jax.local_devices())
        attention = models.choose_attention("auto", source.config, dtype, devices_of(self._mesh))
        network = models.CLIP(source.config, jnp.dtype(dtype), attention=attention)
        replicated = jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec())
        self._variables = jax.device_put(source.variables, replicated)
        mean, std = (jnp.array(values, jnp.float32) for values in (source.view.mean, source.view.std))

        def embed(variables, batch):
            if not isinstance(batch, Packed) and batch.dtype == jnp.uint8:
                pixels = (batch.astype(jnp.float32) / 255 - mean) / std
                return network.apply(variables, pixels, method="encode_image")
            return network.apply(variables, batch, method="encode_text")

        self._embed = jax.jit(embed)

    def identity(self) -> dict[str, str]:
        """What identifies the model of stored embeddings: a checksum of all parameters, and what they leave open."""
        checksum = 0
        for leaf in jax.tree.leaves(self.source.variables):
            checksum = zlib.crc32(np.ascontiguousarray(leaf).data, checksum)
        source = self.source
        return {"model": f"{checksum:08x}", "activation": source.config.activation, "view": repr(source.view)}

    def encode_image(self, images: Any) -> np.ndarray:
        """Images -> float32 (n, D), rows of unit length.

        images: a PIL image, a path or a uint8 array (H, W, 3); any iterable of these; or an array (n, H, W, 3). One
        image gives n = 1. Raises InputError with the number of the unusable image.
        """
        if _is_one(images) or getattr(images, "ndim", 0) == 3:
            images = [images]

        def prepare(numbered: tuple[int, Any]) -> np.ndarray:
            number, image = numbered
            try:
                return self.source.view(image)
            except InputError as error:
                raise InputError(f"image {number}: {error}") from None

        with ThreadPoolExecutor() as threads, progress("encode images", _length(images)) as bar:
            views = lambda some: np.stack(list(threads.map(prepare, some)))  # noqa: E731
            return self._encode(enumerate(images), views, bar.update)

    def encode_views(self, views: Iterable[np.ndarray]) -> np.ndarray:
        """Views of `source.view`, uint8 (S, S, 3) -> float32 (n, D), rows of unit length. Prints nothing."""
        return self._encode(views, np.stack, lambda count: None)

    def encode_text(self, texts: str | Iterable[str] | np.ndarray) -> np.ndarray:
        """Texts -> float32 (n, D), rows of unit length.

        texts: a str or any iterable of str; or the tokenizer's int token ids (n, L), L at most the context length, and
        SigLIP's padded as it was trained.
        Raises InputError without a tokenizer, for ids outside the model's vocabulary, and CLIP's without end-of-text.
        """
        config = self.source.config.text
        if isinstance(texts, np.ndarray | jax.Array) and texts.dtype.kind not in "OUT":  # those are of str
            ids_NxL = _check_ids(np.asarray(texts), config)
            with progress("encode texts", len(ids_NxL), unit="texts") as bar:
                return self._encode(ids_NxL, lambda rows: self._packed(np.stack(rows)), bar.update)
        prepare = self._tokenized()
        if _is_one(texts):
            texts = [texts]
        with progress("encode texts", _length(texts), unit="texts") as bar:
            return self._encode(texts, prepare, bar.update)

    def encode_captions(self, texts: Iterable[str]) -> np.ndarray:
        """As `encode_text`, of several texts. Prints nothing."""
        return self._encode(texts, self._tokenized(), lambda count: None)

    def _tokenized(self) -> Callable:
        tokenizer, length = self.source.tokenizer, self.source.config.text.context_length
        if tokenizer is None:
            raise InputError(
                f"{self.source.path} has no tokenizer; give load(..., tokenizer=) a tokenizer.json or a hub id. "
                'For a model with the vocabulary of OpenAI\'s CLIP, use "openai/clip-vit-base-patch32"'
            )

        def prepare(some: Sequence) -> np.ndarray | Packed:
            return self._packed(tokenizer(_strings(some, "a text"), length))

        return prepare

    def zero_shot(
        self, images: Any, classnames: str | Iterable[str], templates: str | Iterable[str] | None = None
    ) -> np.ndarray:
        """Probabilities, float32 (n, classes), rows sum to 1: the softmax of the scaled cosines with the classes.

        A class is the normalised mean embedding of its prompts: each of `templates` (None: "a photo of a {}.") with
        the class name in place of {}. images: as for `encode_image`; one str is one class, or one template. Raises
        InputError for no classes, what is no str, or a template without {}.
        """
        names = _strings(classnames, "a class name")
        templates = _strings(() if templates is None else templates, "a template") or list(zero_shot.DEFAULT_TEMPLATES)
        odd = next((template for template in templates if "{}" not in template), None)
        if odd is not None or not names:
            raise InputError("zero_shot needs class names" if odd is None else f"template {odd!r} has no {{}}")
        z_cls_CxD = zero_shot.class_embeddings(self.encode_text, names, templates)
        logits_NxC = self.scale * self.encode_image(images) @ z_cls_CxD.T
        weights_NxC = np.exp(logits_NxC - logits_NxC.max(axis=1, keepdims=True, initial=-np.inf))
        return weights_NxC / weights_NxC.sum(axis=1, keepdims=True)

    def _encode(self, items: Iterable, prepare: Callable, done: Callable[[int], None]) -> np.ndarray:
        """prepare: at most batch_size items -> (b, ...), or Packed; done(b) is called after each batch. Returns float32
        (n, D)."""
        if self.batch_size < 1:
            raise InputError(f"batch_size={self.batch_size}. Expected at least 1")
        parts, running = [np.zeros((0, self.source.config.embed_dim), np.float32)], deque()

        def collect():
            count, z_BxD = running.popleft()
            parts.append(np.asarray(z_BxD)[:count])
            done(count)

        items = iter(items)
        while some := tuple(itertools.islice(items, self.batch_size)):
            batch = prepare(some)
            running.append((len(some), self._embed(self._variables, self._pad(batch))))
            if len(running) > 1:  # the host prepares a batch while the devices process the one before
                collect()
        while running:
            collect()
        return np.concatenate(parts)

    def _pad(self, batch: np.ndarray | Packed) -> Any:
        """Pads with rows of zeros to a power of two, and to at least one row per device; Packed has its size."""
        if isinstance(batch, Packed):
            return jax.device_put(batch, batch_sharding(self._mesh))
        rows = self._padded(len(batch))
        padded = np.zeros((rows, *batch.shape[1:]), batch.dtype)
        padded[: len(batch)] = batch
        return jax.device_put(padded, batch_sharding(self._mesh))

    def _padded(self, count: int) -> int:
        rows = max(_power_of_two(count), self._mesh.size)
        return -(-rows // self._mesh.size) * self._mesh.size

    def _packed(self, ids_BxL: np.ndarray) -> np.ndarray | Packed:
        """The ids shortened, or packed in a power of two of rows a device, whichever are fewer tokens; SigLIP's as they
        are."""
        if not self.source.config.text.causal:
            return ids_BxL
        short_BxL, units, (count, length) = self._shorten(ids_BxL), self._mesh.size, ids_BxL.shape
        missing = self._padded(count) - count
        ids_UxcxL = np.pad(ids_BxL, ((0, missing), (0, 0))).reshape(units, -1, length)
        lengths_B = packing.lengths(ids_BxL, self.source.config.text.eot_id)
        lengths_Uxc = np.pad(lengths_B, (0, missing)).reshape(units, -1)
        rows = 1
        while rows * length < lengths_Uxc.shape[1] * short_BxL.shape[1]:
            packed = packing.pack(ids_UxcxL, lengths_Uxc, rows)
            if packed is not None:
                return packed
            rows *= 2
        return short_BxL

    def _shorten(self, ids_BxL: np.ndarray) -> np.ndarray:
        """Cuts after the last end-of-text, at 16, 32, 64 ...: attention is causal, so later tokens have no effect."""
        ends_B = np.argmax(ids_BxL == self.source.config.text.eot_id, axis=1)
        return ids_BxL[:, : max(16, _power_of_two(int(ends_B.max()) + 1))]


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _is_one(given: Any) -> bool:
    """Whether this is one item, not several; an array without axes is one too."""
    return isinstance(given, str) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0


def _length(items: Any) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


def _strings(given: Any, what: str) -> list[str]:
    """One str or several, as a list. Raises InputError where there is something else."""
    strings = [given] if _is_one(given) else list(given)
    odd = [one for one in strings if not isinstance(one, str)]
    if odd:
        raise InputError(f"{what} must be a str; got {type(odd[0]).__name__}")
    return strings


def _check_ids(ids_NxL: np.ndarray, config: models.TextConfig) -> np.ndarray:
    if ids_NxL.ndim != 2 or not np.issubdtype(ids_NxL.dtype, np.integer):
        raise InputError(f"token ids must be an integer array (n, L); got {ids_NxL.dtype} {ids_NxL.shape}")
    if not 0 < ids_NxL.shape[1] <= config.context_length:
        raise InputError(f"token ids have shape {ids_NxL.shape}; the model takes 1 to {config.context_length} per text")
    if ids_NxL.size and not 0 <= ids_NxL.min() <= ids_NxL.max() < config.vocab_size:
        raise InputError(f"token ids from {ids_NxL.min()} to {ids_NxL.max()}; the model has {config.vocab_size}")
    ends_N = (ids_NxL == config.eot_id).any(axis=1)
    if config.causal and not ends_N.all():  # such a text would have the embedding of its first token
        raise InputError(f"token ids: text {ends_N.argmin()} has no end-of-text, {config.eot_id}, where it is embedded")
    return ids_NxL.astype(np.int32)
