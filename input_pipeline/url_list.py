"""Converts published lists of image URLs and captions to one Parquet file with columns url and caption."""

import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rankclip_jax.common import tables
from rankclip_jax.common.delimited import DELIMITERS
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import whole

_CAPTIONS = ("caption", "text", "txt", "alt", "alt_text", "description", "title")
_URLS = ("url", "image_url", "img_url", "image")  # where several columns have URLs
_ROWS = 100_000  # rows in memory at a time


def normalise(
    path: Path, out: Path, url_column: str | None, caption_column: str | None, encoding: str | None = None
) -> tuple[int, int]:
    """Writes `out` from a Parquet file or any table (common/tables.py).

    The URL column is recognised by its contents, of several by its name; the caption column by its name or as the only
    other column. A first line with a URL is not a header: CC3M's list is caption, URL, and CC12M's is URL, caption,
    both without a header. Several captions of a URL become lines of one.

    Args:
      url_column, caption_column: names in the header that override this; None: as above.
      encoding: as tables.read_table.

    Returns:
      The number of rows written, and of rows left out because they are bad, or have no URL or no caption.

    Raises:
      InputError: no such file, ambiguous columns, or as tables.read_table.
    """
    if not path.is_file():
        raise InputError(f"no such file: {path}; give a list of URLs and captions (see docs/data.md)")
    if path.suffix != ".parquet":
        return _write(*_of_table(path, url_column, caption_column, encoding), out)
    try:
        with pq.ParquetFile(path) as file:
            chunks = ([column.to_pylist() for column in batch.columns] for batch in file.iter_batches(_ROWS))
            names, first = file.schema_arrow.names, next(chunks, [])
            head = [names, *itertools.islice(zip(*first, strict=True), 1000)]
            columns, _ = _columns(path, head, url_column, caption_column)
            pairs = ([chunk[place] for place in columns] for chunk in itertools.chain([first] if first else [], chunks))
            return _write(pairs, 0, out)
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read as Parquet: {one_line(error)}") from None


def _of_table(
    path: Path, url_column: str | None, caption_column: str | None, encoding: str | None
) -> tuple[Iterator[list[list]], int]:
    """(lists of URLs and of their captions, so many rows at a time; the number of bad rows)"""
    usual = "," if path.name.lower().removesuffix(".gz").endswith(".csv") else "\t"
    failed: InputError | None = None
    for delimiter in (usual, *(one for one in DELIMITERS if one != usual)):
        first = tables.read_first(str(path), delimiter=delimiter, encoding=encoding)
        try:
            (url, caption), has_header = _columns(path, first, url_column, caption_column)
            break
        except InputError as error:
            failed = failed or error
    else:
        raise failed or AssertionError
    if failed:
        print(f"{path}: its columns are separated by {delimiter!r}, not by {usual!r}", file=sys.stderr)
    names = [name.strip() for name in first[0]] if has_header else [str(place) for place in range(len(first[0]))]
    table = tables.read_table(
        str(path),
        (names[url],),
        (names[caption],),
        delimiter=delimiter,
        encoding=encoding,
        names=None if has_header else names,
    )
    assert table.texts is not None
    columns, starts = (table.images, table.texts), range(0, len(table.images), _ROWS)
    pairs = ([column.slice(start, _ROWS).to_pylist() for column in columns] for start in starts)
    return pairs, len(table.bad)


def _is_url(value):
    return isinstance(value, str) and re.match(r"\s*https?://", value, re.IGNORECASE) is not None


def _columns(path, first, url_column, caption_column):
    """((index of the URL column, index of the caption column), whether the first row is a header)."""
    if not first or not first[0]:
        raise InputError(f"{path} is empty")
    has_header = not any(_is_url(value) for value in first[0])
    names = [str(name).strip() for name in first[0]] if has_header else []
    width = len(first[0])
    shown = ", ".join(names) if has_header else f"{width} without names"
    for asked in (url_column, caption_column):
        if asked is not None and asked not in names:
            raise InputError(f"{path} has no column {asked!r}; its columns: {shown}")
    body = first[has_header:]
    counts = [sum(_is_url(row[place]) for row in body if place < len(row)) for place in range(width)]
    if url_column is None and (not body or 2 * max(counts) < len(body)):
        raise InputError(f"{path} has no column of http(s) URLs in its first {len(body)} lines; its columns: {shown}")
    likely = [place for place in range(width) if 2 * counts[place] >= len(body)]
    likely = [place for place in likely if has_header and names[place].lower() in _URLS] or likely
    if url_column is None and len(likely) > 1:
        raise InputError(f"{path}: cannot tell which column has the URLs; add --url-column; its columns: {shown}")
    url = names.index(url_column) if url_column else likely[0]
    others = [place for place in range(width) if place != url]
    named = [place for place in others if has_header and names[place].lower() in _CAPTIONS]
    if caption_column:
        return (url, names.index(caption_column)), has_header
    for candidates in (others, named):
        if len(candidates) == 1:
            return (url, candidates[0]), has_header
    raise InputError(f"{path}: cannot tell which column has the captions; add --caption-column; its columns: {shown}")


def _write(chunks, left_out, out):
    schema = pa.schema({"url": pa.string(), "caption": pa.string()})
    written = 0
    with whole(out) as part, pq.ParquetWriter(str(part), schema) as writer:
        for urls, captions in chunks:
            pairs = [(url, _caption(text)) for url, text in zip(urls, captions, strict=True)]
            good = [(url.strip(), text) for url, text in pairs if _is_url(url) and text]
            columns = zip(*good, strict=True) if good else ((), ())
            writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
            written += len(good)
            left_out += len(pairs) - len(good)
    return written, left_out


def _caption(value):
    """A text without blanks around it; several as lines, which config.data.captions_per_line reads; "": none."""
    texts = value if isinstance(value, list) else [value]
    return "\n".join(filter(None, (text.strip() for text in texts if isinstance(text, str))))
