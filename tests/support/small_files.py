"""A disk that is full, for one process: files may grow to a size, and a write beyond it fails."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """No file may grow beyond `limit` bytes; Python ignores the signal, so that writes fail with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
