"""What a path with a scheme names, which store answers for it, and what its errors mean.

Environment: TENSORSTORE_GCS_HTTP_URL (another host for gs://), AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL (for s3://),
AWS_REGION, and what Google's and Amazon's own tools read for credentials.
"""

import functools
import os
import re
import sys
import urllib.parse
from pathlib import Path
from typing import Any, NamedTuple

from rankclip_jax.common.errors import InputError, one_line

_BUCKETS = ("gs", "s3")
_RETRIES = {"max_retries": 20, "initial_delay": "200ms", "max_delay": "16s"}  # five minutes in all
_PATIENCE = 30.0  # seconds, after which a wait is worth a line
_CONCURRENCY = {"limit": 256}  # requests at once; TensorStore's own 32 are 640 a second at 50 ms
# By default a read waits for ever for an answer that never comes.
_LOW_SPEED = {"TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "20", "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1"}
_STAYS = ":/?[]@!$&'()*+,;=%~"  # of an address, beside letters and digits; also what is quoted already
# TensorStore quotes a key, but for /!$&'()*+,:;= which may not mean the same as %2F and so on (S3 reads + as a blank).
# Of its base_url it keeps what is quoted, up to the last folder or name with one of these.
_KEPT = re.compile(r"^((?:.*%(?:2[1467-9A-CF]|3[ABD])[^/]*)?)(.*)", re.IGNORECASE)
_LONGEST = 2**16  # characters of an address; at eight million bytes curl ends the process
_GOOGLE = "GOOGLE_APPLICATION_CREDENTIALS, gcloud's application_default_credentials.json, the machine's metadata server"
_AMAZON = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials, the machine's metadata server"


class Place(NamedTuple):
    """scheme://root/key: `root` is a bucket, or a host.

    An http address is as it is sent: `key` with its first slash, `query` with its question mark.
    """

    scheme: str
    root: str
    key: str
    query: str = ""

    @property
    def web(self) -> bool:
        """Whether it is an http address, which has no listing."""
        return self.scheme not in _BUCKETS


class NoPlaceError(InputError):
    """A path that names nothing that can be read: its own fault, not the store's."""


def is_remote(path: Any) -> bool:
    """Whether the path has a scheme, such as gs://."""
    return "://" in str(path)


def is_http(path: str) -> bool:
    """Whether the path is a web address; its scheme may be in capitals, as any."""
    return path[:8].lower().startswith(("http://", "https://"))


def local(path: str, what: str) -> Path:
    """A path to write to; ~ is the home folder, also where no shell says so, as in --out=~/x.

    Raises InputError for gs:// and the like, of which a Path would make a folder `gs:`, and for "", which would be the
    current folder.
    """
    if not path:
        raise InputError(f"{what} is empty. Expected a local path")
    if is_remote(path):
        raise InputError(f"{what} must be a local path; copy it to {path} when it is complete")
    return Path(os.path.expanduser(path))


def place_of(path: str) -> Place:
    """Raises NoPlaceError where the scheme is none that can be read, or no bucket or no possible host is named."""
    if is_http(path):
        return _web_place(path)
    scheme, _, rest = path.partition("://")
    if scheme not in _BUCKETS:
        raise NoPlaceError(
            f"{path}; {scheme}:// is not supported: copy or mount it, or give a local path, gs://, s3:// or http(s)://"
        )
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise NoPlaceError(f"{path}; no bucket is named. Expected {scheme}://BUCKET/NAME")
    return Place(scheme, bucket, key)


def _web_place(path: str) -> Place:
    if len(path) > _LONGEST:
        raise NoPlaceError(f"{path[:100]}...; not a valid address: {len(path)} characters long")
    try:
        parts = urllib.parse.urlsplit(path)
        user, at, _ = parts.netloc.rpartition("@")
        host = (parts.hostname or "").encode("idna").decode()  # as the network names a host in any script
        if not re.fullmatch(r"[\w.~%:-]+", host, re.ASCII):
            raise ValueError("it names no host" if not host else "no host has this name")
        site = (f"[{host}]" if ":" in host else host) + (f":{parts.port}" if parts.port is not None else "")
        user, key, query = (urllib.parse.quote(part, safe=_STAYS) for part in (user, parts.path, parts.query))
        return Place(parts.scheme, user + at + site, key, f"?{query}" if query else "")
    except ValueError as error:
        raise NoPlaceError(f"{path}; not a valid address: {error}") from None


def join(folder: str, *names: str) -> str:
    """A path below a folder, local or not."""
    return "/".join([folder.rstrip("/"), *names]) if is_remote(folder) else os.path.join(folder, *names)


def parent(path: str) -> str:
    """The folder of a file."""
    return path.rpartition("/")[0] if is_remote(path) else os.path.dirname(path)


def name_of(path: str) -> str:
    """The last part of a path."""
    return path.rstrip("/").rpartition("/")[2]


def store_of(place: Place) -> tuple[Any, str | bytes]:
    """(the open tensorstore.KvStore, the key in it)"""
    if not place.web:
        return _opened(place.scheme, place.root, "", endpoint(place.scheme)), place.key
    kept, rest = _KEPT.findall(place.key)[0]
    return _opened(place.scheme, place.root + kept, place.query, None), urllib.parse.unquote_to_bytes(rest)


def endpoint(scheme: str) -> str | None:
    """The address of what answers in place of Google's or Amazon's own; None: theirs."""
    names = {"gs": ["TENSORSTORE_GCS_HTTP_URL"], "s3": ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]}.get(scheme, [])
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


@functools.lru_cache(128)  # each query of an http address is a store of its own; a read holds its store
def _opened(scheme: str, root: str, query: str, address: str | None) -> Any:
    kind = {"gs": "gcs", "s3": "s3"}.get(scheme, "http")
    context = _context(kind, address)
    import tensorstore

    if kind == "http":
        spec = {"driver": "http", "base_url": f"{scheme}://{root}{query}"}
    else:
        spec = {"driver": kind, "bucket": root} | (_amazon(address) if kind == "s3" else {})
    try:
        return tensorstore.KvStore.open(spec, context=context).result()
    except ValueError as error:
        raise explained(f"{scheme}://{root}", error) from None


@functools.cache  # one for all stores of an endpoint, or each would have as many requests at once
def _context(kind: str, address: str | None) -> Any:
    for name, value in _LOW_SPEED.items():
        os.environ.setdefault(name, value)
    import tensorstore

    return tensorstore.Context({f"{kind}_request_retries": _RETRIES, f"{kind}_request_concurrency": _CONCURRENCY})


def _amazon(address: str | None) -> dict[str, Any]:
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    spec: dict[str, Any] = {"endpoint": address} if address else {}
    if region or address:
        spec["aws_region"] = region or "us-east-1"
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # else the usual places, of which Amazon's library logs every empty one
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def answer_of(path: str, future: Any) -> Any:
    """The result of a request of TensorStore's, which tries again in silence. Raises what it raises."""
    try:
        return future.result(timeout=_PATIENCE)
    except TimeoutError:
        place = place_of(path)
        _say_that_it_waits(f"{place.scheme}://{place.root}")
        return future.result()


@functools.cache  # once a store, however many wait
def _say_that_it_waits(store: str) -> None:
    print(f"{store} has not answered for {_PATIENCE:g} s; trying for about five minutes", file=sys.stderr, flush=True)


def explained(path: str, error: Exception) -> InputError:
    """The one line for what a store says."""
    said, place = one_line(error), place_of(path)
    google, where = place.scheme == "gs", f"{place.scheme}://{place.root}"
    looked = _GOOGLE if google else _AMAZON
    if re.search(r"NoSuchBucket|specified bucket|no such bucket|NO_SUCH_BUCKET|bucket does not exist", said, re.I):
        return InputError(f"{path}: there is no bucket {place.root}")
    if not place.web:
        if re.search(
            r"access token|credential|UNAUTHENTICATED|\b401\b|anonymous|InvalidAccessKey|SignatureDoes", said, re.I
        ):
            then = "; run: gcloud auth application-default login" if google else ""
            return InputError(f"{path}: no valid credentials (looked for: {looked}){then}")
        if re.search(r"PERMISSION_DENIED|ACCESS_DENIED|AccessDenied|forbidden|\b403\b", said, re.I):
            return InputError(
                f"{path}: no permission in {where}: the account of this machine may not do that, or has no credentials "
                f"(looked for: {looked})"
            )
    many = "" if place.scheme in _BUCKETS else "; pictures from many sites: python -m input_pipeline.download first"
    return InputError(f"{path} cannot be reached: {said}{many}")
