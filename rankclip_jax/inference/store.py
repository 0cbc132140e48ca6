"""Files of embeddings: .npz, or Parquet for other tools; and folders of Parquet for collections larger than memory."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import whole
from rankclip_jax.common.foreign_files import refuse_inflating

ENDINGS = (".npz", ".parquet")
# Of a folder. Names with a leading _ are passed over by whatever reads a folder of Parquet.
ABOUT, BAD = "_about.json", "_bad_samples.jsonl"
_BAD = "rankclip_jax_bad"  # of a shard's metadata
_KEYS = {"data", "image_key", "delimiter", "model"}
SHARD = 4096  # images of a shard of a folder: the most that a stopped worker repeats


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The contents of a file.

    Attributes:
      z: float32 (n, D), rows of unit length.
      rows: int64 (n,), numbers of the images in the collection.
      names: of the images.
      about: metadata: collection and model.
      cosines: float32 (n,), of each image and its caption, NaN without one; None: of a collection without captions.
    """

    z: np.ndarray
    rows: np.ndarray
    names: list[str]
    about: dict
    cosines: np.ndarray | None = None


def write(
    path: Path,
    parts: Iterable[Embeddings],
    about: dict,
    unfinished: Path | None = None,
    bad: Sequence[str] | None = None,
) -> int:
    """Writes all parts as one file, completely or not at all; returns the number of rows.

    `unfinished`: the file's name until it is complete (files.whole). `bad`: of a shard, lines about what is not in it,
    which `parts` may add to; `read_bad` finds them.

    An .npz has arrays `embedding` (n, D) float32, `row` (n,) int64, `name` (n,) str, of a captioned collection `cosine`
    (n,) float32, and `about` (JSON); a Parquet file has the same columns, and `about` in its schema's metadata.
    """
    with whole(path, unfinished) as part:
        return _write_parquet(part, parts, about, bad) if path.suffix == ".parquet" else _write_npz(part, parts, about)


def read(path: Path) -> Embeddings:
    """Reads a file written by `write`. Raises InputError for any other file."""
    try:
        found = (_read_parquet if path.suffix == ".parquet" else _read_npz)(path)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as error:  # whatever NumPy and pyarrow raise on a damaged file
        raise _foreign(path, one_line(error)) from None
    return _checked(path, found)


def _checked(path: str | Path, found: Embeddings) -> Embeddings:
    n, about = len(found.names), found.about
    if not (found.z.ndim == 2 and len(found.z) == n and found.rows.shape == (n,) and np.isfinite(found.z).all()):
        raise _foreign(path, "its columns do not fit together")
    if not (isinstance(about, dict) and _KEYS <= about.keys()):
        raise _foreign(path, "it does not say of which collection and model it is")
    return found


def is_folder(path: str) -> bool:
    """Whether a path names a folder, as one of shards is: it is one, ends in a slash, or its name has no ending."""
    return not storage.is_http(path) and (path.endswith("/") or not Path(path).suffix or os.path.isdir(path))


def shard(number: int) -> str:
    """The file name of a shard."""
    return f"{number:05d}.parquet"


def shards(size: int) -> int:
    """The number of shards of a collection."""
    return -(-size // SHARD)


def about_of(path: str) -> dict:
    """The metadata of what `chunks` reads. Raises InputError as `chunks`."""
    if not is_folder(path):
        first = next(chunks(path), None)
        if first is None:
            raise _foreign(path, "it is empty")
        return first.about
    about = _about(path)
    if about is None:
        raise InputError(f"no such folder of embeddings: {path}")
    there = set(map(storage.name_of, files(path)))
    missing = [number for number in range(shards(about["size"])) if shard(number) not in there]
    if missing:
        raise InputError(f"{path} lacks {shard(missing[0])}, and {len(missing)} shards in all; finish it with --out")
    return about


def chunks(path: str) -> Iterator[Embeddings]:
    """What `write` or a run with a folder wrote, in order, so that it need not fit in memory: Parquet by row groups,
    mapped where it is local, an .npz at once.

    Raises:
      InputError: it is something else, damaged or not complete.
    """
    if is_folder(path):
        for number in range(shards(about_of(path)["size"])):
            yield from _row_groups(storage.join(path, shard(number)))
    elif path.endswith(".parquet"):
        yield from _row_groups(path)
    else:
        yield read(Path(path))


def _row_groups(path: str) -> Iterator[Embeddings]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        where = pa.BufferReader(storage.read(path)) if storage.is_remote(path) else pa.memory_map(path)
        with pq.ParquetFile(where) as file:
            for group in range(file.num_row_groups):
                yield _checked(path, _of_table(file.read_row_group(group)))
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise error if isinstance(error, InputError) else _foreign(path, one_line(error)) from None


def read_bad(path: str) -> tuple[int, list[str]]:
    """(rows of a shard, the lines about what is not in it). Raises InputError for any other file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        (there,) = storage.stat([path])
        if there is None:
            raise InputError(f"no such file: {path}")
        found = pq.read_metadata(storage.RemoteFile(path, there.size) if storage.is_remote(path) else path)
        return found.num_rows, json.loads(found.metadata[_BAD.encode()])
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
        raise error if isinstance(error, InputError) else _foreign(path, one_line(error)) from None


def _about(folder: str) -> dict | None:
    """The metadata of a folder of shards; None: it is none."""
    try:
        about = json.loads(storage.read(storage.join(folder, ABOUT)))
        return about if _KEYS <= about.keys() and isinstance(about.get("size"), int) else None
    except storage.MissingError:
        return None
    except (ValueError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, InputError) else _foreign(folder, one_line(error)) from None


def files(folder: str) -> list[str]:
    """The files of a folder. Raises InputError where it cannot be listed."""
    return [file.path for file in storage.files_in(folder)] if storage.is_remote(folder) else os.listdir(folder)


def is_store(data: str) -> bool:
    """Whether a path names what `chunks` reads: an .npz, a Parquet file with its metadata, or a folder of shards."""
    if is_folder(data):
        return _about(data) is not None
    path = Path(data)
    if path.suffix != ".parquet" or not path.is_file():
        return path.suffix == ".npz"
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return b"rankclip_jax" in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError):
        return False


def _write_npz(path: Path, parts: Iterable[Embeddings], about: dict) -> int:
    parts = list(parts)
    columns: dict[str, Any] = {
        "embedding": np.concatenate([part.z for part in parts]),
        "row": np.concatenate([part.rows for part in parts]),
        "name": np.array([name for part in parts for name in part.names], dtype=str),
        "about": json.dumps(about),
    }
    cosines = [part.cosines for part in parts if part.cosines is not None]
    columns |= {"cosine": np.concatenate(cosines)} if cosines else {}
    with open(path, "wb") as out:
        np.savez(out, **columns)
    return sum(len(part.names) for part in parts)


def _write_parquet(path: Path, parts: Iterable[Embeddings], about: dict, bad: Sequence[str] | None) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, writer = 0, None
    for part in parts:
        if writer is None:
            width = part.z.shape[1]
            fields = [("name", pa.string()), ("row", pa.int64()), ("embedding", pa.list_(pa.float32(), width))]
            fields += [("cosine", pa.float32())] if part.cosines is not None else []
            schema = pa.schema(fields, metadata={"rankclip_jax": json.dumps(about)})
            writer = pq.ParquetWriter(path, schema)
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(part.z.ravel()), width)
        columns = [pa.array(part.names, pa.string()), pa.array(part.rows), embedding]
        columns += [pa.array(part.cosines)] if part.cosines is not None else []
        writer.write_table(pa.table(columns, schema))
        count += len(part.names)
    if writer is not None:
        if bad is not None:
            writer.add_key_value_metadata({_BAD: json.dumps(list(bad))})
        writer.close()
    return count


def _read_npz(path: Path) -> Embeddings:
    refuse_inflating(path)
    with np.load(path, allow_pickle=False) as arrays:
        names, about = arrays["name"].tolist(), json.loads(str(arrays["about"]))
        return Embeddings(arrays["embedding"], arrays["row"], names, about)


def _read_parquet(path: Path) -> Embeddings:
    import pyarrow.parquet as pq

    return _of_table(pq.read_table(path))


def _of_table(table: Any) -> Embeddings:
    about = json.loads(table.schema.metadata[b"rankclip_jax"])
    column = table["embedding"].combine_chunks()
    z_NxD = column.values.to_numpy().reshape(len(column), column.type.list_size)
    return Embeddings(z_NxD, table["row"].to_numpy(), table["name"].to_pylist(), about)


def _foreign(path: str | Path, why: str) -> InputError:
    return InputError(f"{path} is not a file of embeddings written by rankclip_jax.embed ({why})")
