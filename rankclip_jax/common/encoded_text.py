"""Bytes to text by their mark or a given encoding. What cannot be decoded is found again in the row that has it."""

import codecs
import io
import re
from typing import Any, TextIO

from rankclip_jax.common.errors import InputError

# Half a surrogate pair: a byte that could not be decoded ("surrogateescape"), or an escape of JSON that is no letter.
HALF = re.compile("[\ud800-\udfff]")
_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # begins as UTF-16's
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
# Scripts that no word mixes. Two bytes of GB18030, Shift-JIS or EUC can by chance be one letter of these in UTF-8.
_SCRIPTS = "[\u00c0-\u02ff]+|[\u0370-\u03ff]+|[\u0400-\u052f]+|[\u0590-\u05ff]+|[\u0600-\u06ff]+|[\u0530-\u07ff]"
_ACCENTS = "[\u0300-\u036f]"  # on letters of any script
_HEAD = 1 << 20  # bytes looked at for that
_SET_ENCODING = "set config.data.encoding to the encoding of the file, latin-1 or gb18030 for example"


class EncodedText:
    """The text of a file.

    Attributes:
      data: its bytes as UTF-8, without a mark.
      decodable: False: some bytes are known to be wrong, and still are in `data`.
    """

    def __init__(self, file: str, raw: Any, encoding: str | None):
        """`raw`: bytes, or an mmap of them. Raises InputError for what is not text, or not UTF-16 as its mark says."""
        self._file, self._encoding = file, encoding
        mark = next((mark for mark in _MARKS if raw[: len(mark)] == mark), b"")
        self._codec = codecs.lookup(_MARKS.get(mark) or encoding or "utf-8").name
        self._decoded: str | None = None
        self.data: Any = memoryview(raw)[len(mark) :]
        self.decodable = True
        if self._codec != "utf-8":
            try:
                self._decoded = str(self.data, self._codec)
            except UnicodeDecodeError as error:
                if self._codec.startswith(("utf-16", "utf-32", "utf-7")):  # nothing is certain after a wrong byte
                    raise InputError(f"{file} is not {self._codec} at byte {error.start + len(mark):,}") from None
                self._decoded, self.decodable = str(self.data, self._codec, "surrogateescape"), False
            self.data = self._decoded.encode("utf-8", "surrogateescape")
        elif bytes(self.data[:4]) == b"PK\3\4":
            raise InputError(f"{file} is an Excel or zip file, not a table of text; save it as csv")
        elif 0 in bytes(self.data[:2]):
            order = "be" if self.data[0] == 0 else "le"
            raise InputError(f"{file} looks like UTF-16 without a mark; set config.data.encoding=utf-16-{order}")
        elif not mark and encoding is None:
            self._refuse_mixed_scripts()

    def open(self) -> TextIO:
        """The text, with HALF for each byte that cannot be decoded. Line ends are kept, at which iteration stops."""
        if self._decoded is not None:
            return io.StringIO(self._decoded, newline="")
        raw = io.BufferedReader(_Bytes(self.data), 1 << 20)
        return io.TextIOWrapper(raw, "utf-8", "surrogateescape", newline="")

    def undecodable(self, row: int, text: str) -> str:
        """The reason for a row whose `text` has HALF. Raises InputError if no encoding was given."""
        byte = ord(HALF.search(text).group()) - 0xDC00  # type: ignore[union-attr]
        reason = f"byte 0x{byte:02x} is not {self._codec}"
        if self._encoding is None:
            shown = " ".join(HALF.sub(lambda half: f"\\x{ord(half.group()) - 0xDC00:02x}", text).split())[:60]
            raise InputError(
                f'{self._file} row {row}: {reason} (in "{shown}"); {_SET_ENCODING}, or to utf-8 to leave such rows out '
                "(an evaluation set has its own key `encoding`, embed and download have --encoding)"
            )
        return reason

    def _refuse_mixed_scripts(self) -> None:
        head = str(self.data[:_HEAD], "utf-8", "ignore")
        words = list(re.finditer("[\u00c0-\u07ff]{2,}", head))
        mixed = [word for word in words if len(re.findall(_SCRIPTS, re.sub(_ACCENTS, "", word.group()))) > 1]
        if 2 * len(mixed) > len(words):
            row = max(0, head.count("\n", 0, mixed[0].start()) - 1)
            word = mixed[0].group()
            raise InputError(
                f"{self._file} row {row}: the bytes from 0x{word.encode()[0]:02x} on are UTF-8 by chance only "
                f"({word!r} mixes scripts); {_SET_ENCODING}, or to utf-8 if that is right"
            )


class _Bytes(io.RawIOBase):
    """A memoryview as a file. io.BytesIO would copy it."""

    def __init__(self, view: memoryview):
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
