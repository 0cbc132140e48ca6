"""What is where: files below a folder, their sizes and times, local or not."""

import contextlib
import datetime
import email.utils
import functools
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.storage.place import (
    Place,
    answer_of,
    endpoint,
    explained,
    is_http,
    is_remote,
    parent,
    place_of,
    store_of,
)

_TOGETHER = 256  # local files that one thread looks at: to start a task takes longer than to look
_MANY = 8  # files of one folder that are looked for by a listing of it
_PATIENCE = 60  # seconds


class File(NamedTuple):
    """`size`: bytes; `time`: what changes when the file does: its time in ns, or the store's generation."""

    path: str
    size: int
    time: int


def stat(paths: Sequence[str]) -> list[File | None]:
    """Size and time of each file; None: there is none. One listing answers for many files of one folder of a bucket.

    Raises:
      InputError: the store cannot be reached or may not be listed; or a local file cannot be read.
    """
    found: dict[str, File | None] = {}
    remote = [path for path in paths if is_remote(path) and not is_http(path)]
    folders = [folder for folder, count in Counter(map(parent, remote)).items() if count > _MANY]
    for folder in folders:
        found |= dict.fromkeys((path for path in remote if parent(path) == folder), None)
        found |= {file.path: file for file in _listed(folder, recursive=False)}
    single = [path for path in dict.fromkeys(paths) if path not in found]
    near, far = ([path for path in single if is_remote(path) == remote] for remote in (False, True))
    groups = [near[at : at + _TOGETHER] for at in range(0, len(near), _TOGETHER)] + [[path] for path in far]
    with ThreadPoolExecutor(32) as pool:
        for group, files in zip(groups, pool.map(lambda group: list(map(_stat, group)), groups), strict=True):
            found |= zip(group, files, strict=True)
    return [found[path] for path in paths]


def exists(path: str) -> bool:
    """Whether there is a file. Raises InputError as `stat`."""
    return stat([path])[0] is not None


def is_folder(path: str) -> bool:
    """Whether there is a folder: in a bucket, any file whose name begins with it and a slash. Raises as `stat`."""
    if not is_remote(path):
        return os.path.isdir(path)
    place = place_of(path)
    if place.web:
        return False
    return _info(path, place, f"{place.root}/{place.key}".rstrip("/")).type.name == "Directory"


def files_below(folder: str) -> list[File]:
    """All files below a folder of a bucket, at any depth, in the order of their names. Raises InputError as `stat`."""
    return _listed(folder, recursive=True)


def files_in(folder: str) -> list[File]:
    """The files right in a folder of a bucket. Raises InputError as `stat`."""
    return _listed(folder, recursive=False)


def _stat(path: str) -> File | None:
    if not is_remote(path):
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        return File(path, found.st_size, found.st_mtime_ns)
    place = place_of(path)
    if place.web:
        return _head(path, place)
    info = _info(path, place, f"{place.root}/{place.key}")
    return _file(path, info) if info.is_file else None


def check_bucket(path: str) -> None:
    """Raises InputError where the bucket of a path is not there, as far as that can be seen."""
    place = place_of(path)
    if not place.web:
        with contextlib.suppress(OSError):  # whoever may read may not always look at the bucket itself
            store = _file_system(place.scheme, place.root, endpoint(place.scheme))
            if store.get_file_info(place.root).type.name == "NotFound":
                raise InputError(f"{path}: there is no bucket {place.root}")


def _listed(folder: str, recursive: bool) -> list[File]:
    place = place_of(folder)
    if place.web:
        raise InputError(f"{folder}: there are no listings over http; name the files, for example {{00000..00331}}.tar")
    from pyarrow import fs

    base = f"{place.root}/{place.key}".rstrip("/")
    infos = _info(folder, place, fs.FileSelector(base, recursive=recursive, allow_not_found=True))
    files = []
    for info in infos:
        if info.is_file:
            # Google's client leaves the bucket out where the service does not repeat it.
            name = info.path if info.path.startswith(f"{place.root}/") else f"{place.root}/{info.path}"
            files.append(_file(f"{place.scheme}://{name}", info))
    return sorted(files)


def _file(path: str, info: Any) -> File:
    changed = info.mtime_ns
    if not changed:  # the service tells no time
        store, key = store_of(place_of(path))
        answer = answer_of(path, store.read(key, byte_range=slice(0, 0)))
        changed = int.from_bytes(answer.stamp.generation[-7:], "little")
    return File(path, info.size, changed)


def _info(path: str, place: Place, what: Any) -> Any:
    try:
        return _file_system(place.scheme, place.root, endpoint(place.scheme)).get_file_info(what)
    except OSError as error:
        raise explained(path, error) from None


@functools.cache
def _file_system(scheme: str, root: str, address: str | None) -> Any:
    try:
        from pyarrow import fs

        if scheme == "s3":
            return _amazon(fs, root, address)
        return fs.GcsFileSystem(**_google(address))
    except ImportError:
        raise InputError(f"{scheme}://{root}: this pyarrow has no {scheme}://; install pyarrow from PyPI") from None


def _google(address: str | None) -> dict[str, Any]:
    token = os.environ.get("GOOGLE_AUTH_TOKEN_FOR_TESTING")
    options: dict[str, Any] = {"retry_time_limit": datetime.timedelta(seconds=_PATIENCE)}
    if address:
        parts = urllib.parse.urlsplit(address)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    if token:
        expires = datetime.datetime.now() + datetime.timedelta(days=365)
        return options | {"access_token": token, "credential_token_expiration": expires}
    return options | ({"anonymous": True} if address else {})


def _amazon(fs: Any, bucket: str, address: str | None) -> Any:
    options: dict[str, Any] = {"connect_timeout": 20, "request_timeout": 20}
    if address:
        parts = urllib.parse.urlsplit(address)
        options |= {"endpoint_override": parts.netloc, "scheme": parts.scheme}
    elif not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        try:
            options["region"] = fs.resolve_s3_region(bucket)
        except OSError as error:
            raise explained(f"s3://{bucket}", error) from None
    return fs.S3FileSystem(**options)


def _head(path: str, place: Place) -> File | None:
    begin, address = time.monotonic(), f"{place.scheme}://{place.root}{place.key}{place.query}"
    for wait in (1, 2, 4, 8, 16, 0):
        try:
            with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=20) as answer:
                return _described(path, answer.headers)
        except urllib.error.HTTPError as error:
            if error.code in (404, 410):
                return None
            if error.code < 500 and error.code not in (408, 429):
                raise InputError(f"{path} cannot be read: {error.code} {error.reason}") from None
            problem: Exception = error
        except (OSError, http.client.HTTPException) as error:
            problem = error
        if not wait or time.monotonic() - begin > _PATIENCE:
            break
        time.sleep(wait)
    raise explained(path, problem)


def _described(path: str, headers: Any) -> File:
    length, changed = headers.get("Content-Length", ""), headers.get("Last-Modified")
    if not length.isascii() or not length.isdigit():
        raise InputError(f"{path}: the server does not say how long it is")
    try:
        when = email.utils.parsedate_to_datetime(changed).timestamp() if changed else 0
    except ValueError:
        when = 0
    return File(path, int(length), int(when * 1e9))
