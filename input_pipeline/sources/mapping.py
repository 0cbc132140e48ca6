"""Files in memory, without a file descriptor each: Python's mmap keeps one, and a process often may have 1,024."""

import ctypes
import mmap
import os

import numpy as np

from rankclip_jax.common.errors import InputError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64
_libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t
_FAILED = ctypes.c_void_p(-1).value
_MAPPINGS, _MOST = "/proc/self/maps", "/proc/sys/vm/max_map_count"  # of this process, one a line; how many it may have


class _Mapping:
    """Memory that is given back with the last array over it."""

    def __init__(self, path: str, size: int):
        self._span: tuple[int | None, int] = None, size
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size < size:
                raise InputError(f"{path} became shorter while it was opened; start again when it is complete")
            # Copy-on-write, because DLPack refuses what is read-only.
            address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, file.fileno(), 0)
        if address == _FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        self._span = address, size
        self.__array_interface__ = dict(version=3, data=(address, False), shape=(size,), typestr="|u1")

    def __del__(self) -> None:
        if self._span[0] is not None:
            _libc.munmap(*self._span)


def may_map(files: int) -> bool:
    """Whether the system lets this process map so many files and still have a quarter of its mappings for all else."""
    try:
        with open(_MAPPINGS, "rb") as now, open(_MOST, "rb") as most:
            return sum(1 for _ in now) + files <= int(most.read()) * 3 // 4
    except OSError:  # not Linux
        return True


def mapped(path: str | os.PathLike, size: int | None = None) -> np.ndarray:
    """The first bytes of a file (None: all), uint8 (size,). What is written to them stays in this process.

    Raises:
      InputError: the file is shorter.
      OSError: it cannot be read.
    """
    size = os.path.getsize(path) if size is None else size
    return np.asarray(_Mapping(os.fspath(path), size)) if size else np.zeros(0, np.uint8)
