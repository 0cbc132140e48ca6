"""Files of embeddings: .npz, or Parquet for other tools and for collections larger than memory."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import whole
from rankclip_jax.common.foreign_files import refuse_inflating

ENDINGS = (".npz", ".parquet")


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


def write(path: Path, parts: Iterable[Embeddings], about: dict, unfinished: Path | None = None) -> int:
    """Writes all parts as one file, completely or not at all; returns the number of rows.

    `unfinished`: the file's name until it is complete (files.whole).

    An .npz has arrays `embedding` (n, D) float32, `row` (n,) int64, `name` (n,) str, of a captioned collection `cosine`
    (n,) float32, and `about` (JSON); a Parquet file has the same columns, and `about` in its schema's metadata.
    """
    with whole(path, unfinished) as part:
        return (_write_parquet if path.suffix == ".parquet" else _write_npz)(part, parts, about)


def read(path: Path) -> Embeddings:
    """Reads a file written by `write`. Raises InputError for any other file."""
    try:
        found = (_read_parquet if path.suffix == ".parquet" else _read_npz)(path)
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except Exception as error:  # whatever NumPy and pyarrow raise on a damaged file
        raise _foreign(path, one_line(error)) from None
    n, about = len(found.names), found.about
    if not (found.z.ndim == 2 and len(found.z) == n and found.rows.shape == (n,) and np.isfinite(found.z).all()):
        raise _foreign(path, "its columns do not fit together")
    if not (isinstance(about, dict) and {"data", "image_key", "delimiter", "model"} <= about.keys()):
        raise _foreign(path, "it does not say of which collection and model it is")
    return found


def is_store(path: Path) -> bool:
    """Whether a path names a file of `write`: an .npz, or a Parquet file with its metadata."""
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


def _write_parquet(path: Path, parts: Iterable[Embeddings], about: dict) -> int:
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
        writer.close()
    return count


def _read_npz(path: Path) -> Embeddings:
    refuse_inflating(path)
    with np.load(path, allow_pickle=False) as arrays:
        names, about = arrays["name"].tolist(), json.loads(str(arrays["about"]))
        return Embeddings(arrays["embedding"], arrays["row"], names, about)


def _read_parquet(path: Path) -> Embeddings:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"rankclip_jax"])
    column = table["embedding"].combine_chunks()
    z_NxD = column.values.to_numpy().reshape(len(column), column.type.list_size)
    return Embeddings(z_NxD, table["row"].to_numpy(), table["name"].to_pylist(), about)


def _foreign(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a file of embeddings written by rankclip_jax.embed ({why})")
