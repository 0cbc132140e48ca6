"""Reads the tensors of a PyTorch file without PyTorch and without running code from the file.

A `.pt` is a zip archive: `data.pkl` is a pickle that describes the objects, `data/<n>` has the bytes of each tensor.
Unpickling calls whatever the pickle names, so this reader allows only what tensors need: OrderedDict, storages, the
functions that build a tensor from a storage (ours, not PyTorch's), and, for TorchScript archives such as OpenAI's,
inert replacements for modules. Everything else is refused by name.
The archive's layout: PyTorch's torch/csrc/jit/docs/serialization.md.
"""

import collections
import dataclasses
import io
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from rankclip_jax.common.errors import one_line
from rankclip_jax.weights.pickle_check import RefusedError, check_pickle

_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


def read_torch_file(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict of a `.pt`, `.pth` or `.bin` file, as arrays of the saved dtypes.

    Reads a plain state dict, a checkpoint that holds one (RankCLIP's, open_clip's, Lightning's; the optimiser's tensors
    are not read), and a TorchScript archive (OpenAI's; names are the modules' attributes).

    Raises:
      ValueError: one line naming the file: truncated, not a PyTorch archive, no state dict, or a pickle that names
        anything not needed for tensors.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _state_dict(_unpickle(archive))
            _check_total(tensors, path.stat().st_size)
            return {name: tensor.array(archive) for name, tensor in tensors.items()}
    except RefusedError as e:
        raise ValueError(f"{path}: {e}") from None
    except zipfile.BadZipFile as e:
        raise ValueError(
            f"{path}: {e}: truncated, or not a PyTorch archive; if the file is older than PyTorch 1.6, load and save "
            "it with a newer PyTorch"
        ) from None
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as e:  # zipfile and what follows a damaged description may raise nearly anything
        raise ValueError(f"{path}: damaged ({one_line(e, kind=True)}); download it again") from e


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    entry: str  # name in the zip
    size: int  # elements


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor that is read only when needed: checkpoints also have optimiser moments."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, archive: zipfile.ZipFile) -> np.ndarray:
        flat = np.frombuffer(_read(archive, self.storage.entry), np.uint8)
        # Strides come from the file: never read outside its bytes.
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if flat.size != self.storage.size * self.storage.dtype.itemsize:
            raise RefusedError(
                f"{self.storage.entry} has {flat.size} bytes; expected {self.storage.size} elements of "
                f"{self.storage.dtype}"
            )
        if math.prod(self.shape) and not 0 <= last < self.storage.size:
            raise RefusedError(f"a tensor extends beyond its storage {self.storage.entry}")
        if 0 in self.shape:
            return np.zeros(self.shape, self.storage.dtype)
        flat = flat.view(self.storage.dtype)[self.offset :]
        strides = [s * flat.itemsize for s in self.strides]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, strides)).reshape(self.shape)


class _Module:
    """Replaces a TorchScript module: keeps its attributes and does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state


class _Unused:
    """Replaces a value beside the weights, such as the arguments of a run: does nothing, whatever it is called with."""

    def __new__(cls, *_: Any) -> "_Unused":
        return object.__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _rebuild_tensor(storage, offset, shape, strides, requires_grad=False, hooks=None, metadata=None):
    if metadata:
        raise RefusedError(f"a tensor with {', '.join(map(str, metadata))} still to be applied; save it resolved")
    ints = (offset, *shape, *strides)
    valid = isinstance(storage, _Storage) and len(shape) == len(strides)
    if not valid or not all(type(n) is int and n >= 0 for n in ints):
        raise RefusedError("a tensor with an invalid description")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data, *_):
    return data


def _rebuild_list(items, *_):
    return items


_ALLOWED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch.jit._pickle", "build_intlist"): _rebuild_list,
    ("torch.jit._pickle", "build_doublelist"): _rebuild_list,
    ("torch.jit._pickle", "build_boollist"): _rebuild_list,
    ("torch.jit._pickle", "build_tensorlist"): _rebuild_list,
    ("torch.jit._pickle", "restore_type_tag"): _rebuild_list,
    **{("torch", name): name for name in _DTYPES},
    # What training scripts keep in the same file: {"model": ..., "args": Namespace, "best": numpy's number}.
    ("argparse", "Namespace"): _Unused,
    # Python 3.13 names the module pathlib._local.
    **{(module, f"{kind}Path"): _Unused for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")},
    ("torch", "Size"): _Unused,
    ("torch", "device"): _Unused,
    **{("torch", name): _Unused for name in ("float16", "bfloat16", "float32", "float64")},
    ("numpy", "dtype"): _Unused,
    ("numpy.core.multiarray", "scalar"): _Unused,
    ("numpy._core.multiarray", "scalar"): _Unused,
    ("_codecs", "encode"): _Unused,
}
# The names that trainers give a state dict in their checkpoints, tried in this order.
_HOLDERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "weights", "params")


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, root: str):
        super().__init__(io.BytesIO(data))
        self.root = root

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) not in _ALLOWED:
            raise RefusedError(
                f"refused: its pickle asks for {module}.{name}, which tensors do not need and which may run "
                "code; if you trust the file, load it with PyTorch and save only its state_dict()"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, size = pid
        if not all(isinstance(word, str) for word in (kind, dtype, key)) or type(size) is not int:
            raise RefusedError("refused: a storage with an invalid description")
        if kind != "storage" or dtype not in _DTYPES:
            raise RefusedError(f"refused: unknown storage {dtype}")
        return _Storage(_DTYPES[dtype], f"{self.root}data/{key}", size)


def _read(archive: zipfile.ZipFile, entry: str) -> bytes:
    """An entry of the archive; no larger than the file, as PyTorch stores it as it is."""
    try:
        info = archive.getinfo(entry)
    except KeyError:
        raise RefusedError(f"truncated: {entry} is missing; download the file again") from None
    if info.compress_type != zipfile.ZIP_STORED:
        raise RefusedError(f"refused: {entry} is compressed, as PyTorch never does; load and save it with PyTorch")
    return archive.read(info)


_MOST_SHARED = 16  # times the size of the file: tied weights are few


def _check_total(tensors: dict[str, _Tensor], file_bytes: int) -> None:
    """Views may repeat a storage's bytes without end."""
    total = sum(math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in tensors.values())
    if total > _MOST_SHARED * file_bytes:
        raise RefusedError(f"refused: its tensors take {total:,} bytes, and the file has {file_bytes:,}")


def _unpickle(archive: zipfile.ZipFile) -> Any:
    roots = [n.removesuffix("data.pkl") for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"]]
    if len(roots) != 1:
        raise RefusedError("a zip without data.pkl, so not a PyTorch archive")
    (root,) = roots
    order = f"{root}byteorder"
    if order in archive.namelist() and _read(archive, order) != b"little":
        raise RefusedError("saved on a big-endian machine, which is not supported; save it on a little-endian one")
    try:
        data = _read(archive, f"{root}data.pkl")
        check_pickle(data)
        return _Unpickler(data, root).load()
    except (RefusedError, zipfile.BadZipFile):
        raise
    except Exception as e:  # a damaged pickle may raise nearly anything
        raise RefusedError(f"its pickle is damaged ({one_line(e, kind=True)})") from e


def _state_dict(obj: Any) -> dict[str, _Tensor]:
    found = _tensors_in(obj)
    if not found:
        what = f"a dict with keys {', '.join(map(str, list(obj)[:8]))}" if isinstance(obj, dict) else type(obj).__name__
        raise RefusedError(f"no state dict found, but {what}. Expected one under {', '.join(_HOLDERS[:2])}, ...")
    return found


def _tensors_in(obj: Any, depth: int = 4) -> dict[str, _Tensor]:
    """The state dict in what was unpickled: under a name of _HOLDERS, here, or in the only dict that has tensors."""
    if isinstance(obj, _Module):
        return dict(_module_tensors(obj, ""))
    if not isinstance(obj, dict) or not depth:  # a pickle can nest a dict in itself
        return {}
    for holder in _HOLDERS:
        if found := _tensors_in(obj.get(holder), depth - 1):
            return found
    if here := _named(obj):
        return here
    within = {name: _named(value) for name, value in obj.items() if isinstance(value, dict) and _named(value)}
    if len(within) > 1:
        raise RefusedError(f"several state dicts: {', '.join(map(str, within))}; save the one that you mean alone")
    return next(iter(within.values()), {})


def _named(obj: dict) -> dict[str, _Tensor]:
    return {name: value for name, value in obj.items() if isinstance(value, _Tensor) and isinstance(name, str)}


def _module_tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, _Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _module_tensors(value, f"{prefix}{name}.")
