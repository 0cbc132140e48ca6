"""Reads the headers of a tar: ustar, pax and GNU."""

import zlib
from collections.abc import Iterator

from input_pipeline.sources.offset_index import Bytes
from rankclip_jax.common.errors import InputError

BLOCK = 512
ELSEWHERE = -2  # in place of the length of a link, whose data is elsewhere, and of a sparse file, whose data has gaps
_COMPRESSED = (0, b"\x1f\x8b"), (4, b"1AY&SY"), (0, b"\xfd7zXZ\0"), (0, b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_ADLER_PRIME = 65521


class TornError(Exception):
    """A tar that cannot be parsed from byte `at` on."""

    def __init__(self, what: str, at: int, cut_off: bool = True):
        super().__init__(f"{what} at byte {at}")
        self.at, self.cut_off = at, cut_off


def members(data: Bytes, size: int, path: str) -> Iterator[tuple[str, int, int]]:
    """Yields (name, begin, length) of the files in a tar (ustar, pax or GNU), links and sparse files with ELSEWHERE.

    Raises:
      TornError: at a broken header.
    """
    if any(bytes(data[at : at + len(magic)]) == magic for at, magic in _COMPRESSED):
        raise InputError(f"{path} is compressed, so its members cannot be read by number; decompress it first")
    at, ended, long_name, long_size = 0, False, None, None
    while at + BLOCK <= size:
        head = bytes(data[at : at + BLOCK])
        if not head.strip(b"\0"):
            # The end mark. Concatenated tars also have one in the middle.
            at, ended = at + BLOCK, True
            continue
        length = _length(head)
        if length is None:
            raise TornError("a broken header", at, cut_off=False)
        kind, begin, ended = head[156:157], at + BLOCK, False
        if kind in (b"0", b"\0", b"7") and long_size is not None:
            length = long_size
        more = kind == b"S" and head[482]
        while more:  # GNU: further headers of a sparse file
            more, begin = begin + BLOCK <= size and data[begin + 504], begin + BLOCK
        end = begin + _padded(length)
        if begin + length > size:
            raise TornError("truncated inside the member that starts", at)
        if kind == b"x":  # pax: the next member's name or size, if they do not fit into its header
            records = _pax_records(bytes(data[begin : begin + length]))
            long_name = records.get("path", long_name)
            if "size" in records:
                long_size = _digits(records["size"].encode(), 10)
                if long_size is None:
                    raise TornError("a size that is not a number", at, cut_off=False)
        elif kind == b"L":  # GNU: the same for its name
            long_name = _long_name(bytes(data[begin : begin + length]))
        else:
            if kind in (b"0", b"\0", b"7"):  # a regular file
                yield long_name or name_of(head), begin, length
            elif kind in (b"1", b"2", b"S"):
                yield long_name or name_of(head), begin, ELSEWHERE
            long_name = long_size = None
        at = end
    if not ended:
        raise TornError("no end mark, so it may be truncated", min(at, size))


def name_before(data: bytes) -> str | None:
    """The name of the member whose header ends `data`; a long one, of the pax or GNU header before, if that is there.

    None: there is no such header.
    """
    name, begin = None, len(data)
    for at in range(len(data) - BLOCK, -1, -BLOCK):
        head = data[at : at + BLOCK]
        kind, length = head[156:157], _length(head)
        if length is None:
            continue
        if name is None and (at + BLOCK == begin or kind == b"S"):  # of a sparse file further headers can follow
            name, begin = name_of(head), at
        elif name is not None and kind in (b"x", b"L") and at + BLOCK + _padded(length) == begin:
            content = data[at + BLOCK : at + BLOCK + length]
            return _long_name(content) if kind == b"L" else _pax_records(content).get("path", name)
    return name


def _length(head):
    """The length of what follows a header; None: it is broken."""
    stored, length = _number(head[148:156]), _number(head[124:136])
    # The sum of all bytes, with spaces in the checksum field. Adler-32 starts with this sum, and is computed in C.
    whole = None not in (stored, length) and (
        zlib.adler32(head) % 65536 == (1 + stored - 8 * ord(" ") + sum(head[148:156])) % _ADLER_PRIME
    )
    return length if whole else None


def _padded(length):
    return -(-length // BLOCK) * BLOCK


def _long_name(content):
    return content.rstrip(b"\0").decode(errors="replace")


def _number(field):
    if field[0] == 0x80:  # GNU: more than 8 GB. Negative numbers begin with 0xff
        return int.from_bytes(field[1:], "big")
    return _digits(field.split(b"\0")[0].strip() or b"0", 8)


def _digits(text, base):
    """A number of digits alone, since `int` also takes signs and underscores; None: it is none."""
    return int(text, base) if text.isdigit() and len(text) < 30 and max(text) < ord("0") + base else None


def name_of(head: bytes) -> str:
    """The name in a header of 512 bytes, behind ustar's prefix; bytes that are not UTF-8 are replaced."""
    name, prefix = (head[a:b].split(b"\0")[0].decode(errors="replace") for a, b in ((0, 100), (345, 500)))
    return f"{prefix}/{name}" if prefix and head[257:263] == b"ustar\0" else name


def _pax_records(data):
    records = {}
    while data:
        text, space, _ = data.partition(b" ")
        length = _digits(text, 10) or 0
        if not space or not 0 < length <= len(data):
            break
        key, _, value = data[len(text) + 1 : length - 1].partition(b"=")
        records[key.decode(errors="replace")] = value.decode(errors="replace")
        data = data[length:]
    return records
