"""Converts published lists of image URLs and captions to one Parquet file with columns url and caption."""

import csv
import gzip
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import whole

_CAPTIONS = ("caption", "text", "txt", "alt", "alt_text", "description", "title")
_ROWS = 100_000  # rows in memory at a time


def normalise(path: Path, out: Path, url_column: str | None, caption_column: str | None) -> tuple[int, int]:
    """Writes `out` from a tsv, csv (both also .gz) or Parquet file.

    The URL column is recognised by its contents, the caption column by its name or as the only other column. A first
    line with a URL is not a header: CC3M's list is caption, URL, and CC12M's is URL, caption, both without a header. A
    tsv has no quoting, so a caption may contain quotation marks.

    Args:
      url_column, caption_column: names in the header that override this; None: as above.

    Returns:
      The number of lines written, and of lines left out because they have no URL or no caption.

    Raises:
      InputError: no such file, or ambiguous columns.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; give a list of URLs and captions (see docs/data.md)")
    try:
        rows = _parquet_rows(path) if path.suffix == ".parquet" else _text_rows(path)
        first = list(itertools.islice(rows, 1000))
        if not first:
            raise InputError(f"{path} is empty")
        columns, has_header = _columns(path, first, url_column, caption_column)
        return _write(itertools.chain(first[has_header:], rows), columns, out)
    except (UnicodeDecodeError, csv.Error, pa.ArrowException, gzip.BadGzipFile, EOFError) as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None


def _text_rows(path: Path) -> Iterator[list[str]]:
    name = path.name.removesuffix(".gz")
    opened = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    with io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as lines:
        if name.endswith(".csv"):
            yield from csv.reader(lines)
        else:
            # Only at line feeds: a caption may contain other characters that Python treats as line ends.
            yield from (line.rstrip("\r\n").split("\t") for line in lines)


def _parquet_rows(path: Path) -> Iterator[Sequence]:
    with pq.ParquetFile(path) as file:
        yield file.schema_arrow.names
        for batch in file.iter_batches(_ROWS):
            yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _is_url(value):
    return isinstance(value, str) and value.strip().startswith(("http://", "https://"))


def _columns(path, first, url_column, caption_column):
    """((index of the URL column, index of the caption column), whether the first row is a header)."""
    has_header = not any(_is_url(value) for value in first[0])
    names = [str(name) for name in first[0]] if has_header else []
    width = len(first[0])
    shown = ", ".join(names) if has_header else f"{width} without names"
    for asked in (url_column, caption_column):
        if asked is not None and asked not in names:
            raise InputError(f"{path} has no column {asked!r}; its columns: {shown}")
    body = first[has_header:]
    counts = [sum(_is_url(row[place]) for row in body if place < len(row)) for place in range(width)]
    if url_column is None and (not body or 2 * max(counts) < len(body)):
        raise InputError(f"{path} has no column of http(s) URLs in its first {len(body)} lines; its columns: {shown}")
    url = names.index(url_column) if url_column else counts.index(max(counts))
    others = [place for place in range(width) if place != url]
    named = [place for place in others if has_header and names[place].lower() in _CAPTIONS]
    if caption_column:
        return (url, names.index(caption_column)), has_header
    for candidates in (others, named):
        if len(candidates) == 1:
            return (url, candidates[0]), has_header
    raise InputError(f"{path}: cannot tell which column has the captions; add --caption-column; its columns: {shown}")


def _write(rows, columns, out):
    schema = pa.schema({"url": pa.string(), "caption": pa.string()})
    written = left_out = 0
    with whole(out) as part, pq.ParquetWriter(str(part), schema) as writer:
        while chunk := list(itertools.islice(rows, _ROWS)):
            pairs = [tuple(row[place] for place in columns) for row in chunk if len(row) > max(columns)]
            good = [(u.strip(), c.strip()) for u, c in pairs if _is_url(u) and isinstance(c, str) and c.strip()]
            urls, captions = zip(*good, strict=True) if good else ((), ())
            writer.write_table(pa.table({"url": urls, "caption": captions}, schema))
            written += len(good)
            left_out += len(chunk) - len(good)
    return written, left_out
