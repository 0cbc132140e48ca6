"""The columns of a Parquet file that hold images and captions, and what their values are."""

import json
from typing import Any, NamedTuple

import pyarrow as pa

from rankclip_jax.common.errors import InputError, printable


class Columns(NamedTuple):
    """The columns of a file that are unpacked.

    Attributes:
      image: the column.
      caption: the column; "": none.
      inside: path of the caption in the column's structs or JSON.
      several: whether captions are lists, or JSON with such.
      image_kind: .bytes or .path for a struct with only that field, :path for a column of paths; part of the cache key.
    """

    image: str
    caption: str
    inside: str | None = None
    several: bool = False
    image_kind: str = ""


def columns_of(
    file: str, schema: pa.Schema, image_keys: tuple[str, ...], caption_keys: tuple[str, ...], captions: bool
) -> Columns:
    """Those of the wanted keys that a file has. captions=False: it may have none of captions.

    Raises:
      InputError: no such column, or one of another type.
    """
    image, kind = _column(file, schema, image_keys, "image_key")
    image, image_kind = image if image in schema.names else image.partition(":")[0], ""
    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: _values_of(kind.field(i).type) for i in range(kind.num_fields)}
        if _is_bytes(fields.get("bytes")):
            image_kind = "" if _is_string(fields.get("path")) else ".bytes"
        elif _is_string(fields.get("path")):
            image_kind = ".path"
        else:
            raise _wrong_type(file, image, kind, "bytes, a path, or a struct of bytes and path")
    elif _is_string(kind):
        image_kind = ":path"
    elif not _is_bytes(kind):
        raise _wrong_type(file, image, kind, "bytes, a path, or a struct of bytes and path")
    if not captions and not any(key.partition(":")[0] in schema.names for key in caption_keys):
        return Columns(image, "", image_kind=image_kind)
    caption, kind = _column(file, schema, caption_keys, "caption_key")
    if caption not in schema.names:
        column, _, inside = caption.partition(":")
        return Columns(image, column, inside, True, image_kind)
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    several = any(is_list(kind) for is_list in lists)
    one = _values_of(kind.value_type) if several else kind
    if not (_is_string(one) or (_is_bytes(one) and not several)):
        raise _wrong_type(file, caption, kind, "strings or lists of strings; a field inside is COLUMN:FIELD")
    return Columns(image, caption, None, several, image_kind)


def _column(file: str, schema: pa.Schema, wanted: tuple[str, ...], option: str) -> tuple[str, pa.DataType]:
    """(the first of the wanted keys whose column is there, the type of the column's values)"""
    for key in wanted:
        name = key if key in schema.names else key.partition(":")[0]
        if (count := schema.names.count(name)) > 1:
            raise InputError(f"{file} has {count} columns {name!r}; rename all but one")
        if count:
            return key, _values_of(schema.field(name).type)
    names = printable(", ".join(schema.names)[:300])
    raise InputError(f"{file} has no column {' or '.join(wanted)}; its columns are: {names}; set config.data.{option}")


def _wrong_type(file: str, column: str, kind: pa.DataType, expected: str) -> InputError:
    return InputError(f"{file}: column {column} has type {kind}. Expected {expected}")


def _values_of(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_string(kind: pa.DataType | None) -> bool:
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_bytes(kind: pa.DataType | None) -> bool:
    known = (pa.binary(), pa.large_binary(), pa.binary_view())
    return kind is not None and (kind in known or pa.types.is_fixed_size_binary(kind))


def may_hold_paths(kind: pa.DataType) -> bool:
    """Whether images of this type may be given as paths."""
    kind = _values_of(kind)
    return _is_string(kind) or (pa.types.is_struct(kind) and kind.get_field_index("path") >= 0)


def image_of(value: Any) -> tuple[str, bytes]:
    """("image", its bytes) or ("path", the path); no bytes where there is neither."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return ("path", value.encode()) if isinstance(value, str) else ("image", value or b"")


def caption_of(value: Any, columns: Columns) -> tuple[str, bytes]:
    """("caption", one) or ("captions", what holds several, as JSON), in UTF-8."""
    if isinstance(value, dict | list) or (columns.several and value is None):
        return "captions", json.dumps(value, default=str).encode()
    return "captions" if columns.several else "caption", value.encode() if isinstance(value, str) else value or b""
