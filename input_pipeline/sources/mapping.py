"""Files mapped into memory and closed."""

import ctypes
import mmap
import os
import weakref

import numpy as np

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def mapped(path: str | os.PathLike) -> np.memmap:
    """The bytes of a local file, uint8 (size,), copy-on-write; an empty one cannot be mapped. Raises OSError.

    Python's mmap, and so np.memmap, keeps every file open (before Python 3.13 always): more tars than the usual 1,024
    open files of a process could not be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            return np.zeros(0, np.uint8).view(np.memmap)
        access = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, size, access, mmap.MAP_PRIVATE, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), os.fspath(path))
    data = (ctypes.c_uint8 * size).from_address(address)
    weakref.finalize(data, _libc.munmap, address, size).atexit = False
    return np.ctypeslib.as_array(data).view(np.memmap)
