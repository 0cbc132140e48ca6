"""The one home of bytes and listings, wherever they lie: local files, gs://, s3:// and what is compatible, http(s)://.

Bytes come through TensorStore's key-value stores (C++: many reads at once, no thread a read, its own retries); listings
of buckets through pyarrow's file systems, which know sizes.
"""

from rankclip_jax.common.storage.copies import (
    CHECKPOINTS,
    check_ours,
    fetched,
    origin,
    output,
    push,
    shown,
    take,
    workdir,
)
from rankclip_jax.common.storage.holding import Held
from rankclip_jax.common.storage.listing import File, check_bucket, exists, files_below, files_in, is_folder, stat
from rankclip_jax.common.storage.place import NoPlaceError, is_http, is_remote, join, local, name_of, parent
from rankclip_jax.common.storage.reading import MissingError, ReadAhead, RemoteFile, delete, read, write

__all__ = [
    "CHECKPOINTS",
    "File",
    "Held",
    "MissingError",
    "NoPlaceError",
    "ReadAhead",
    "RemoteFile",
    "check_bucket",
    "check_ours",
    "delete",
    "exists",
    "fetched",
    "files_below",
    "files_in",
    "is_folder",
    "is_http",
    "is_remote",
    "join",
    "local",
    "name_of",
    "origin",
    "output",
    "parent",
    "push",
    "read",
    "shown",
    "stat",
    "take",
    "workdir",
    "write",
]
