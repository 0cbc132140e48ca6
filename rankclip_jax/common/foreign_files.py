"""Files that people give: what a download or a clone left in the place of a file is named."""

import json
import re
import zipfile
from pathlib import Path

from rankclip_jax.common.errors import InputError, one_line

_LFS = re.compile(rb"version https://(git-lfs\.github|hawser\.github)\.com/spec/")
_AGAIN = "; download it again"
_MOST_INFLATED = 16


def refuse_stand_in(path: Path) -> None:
    """Raises InputError where a file is empty, a Git LFS pointer or a web page. An OSError passes through.

    Called before a file of weights, a tokenizer or a configuration is read.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
    text = head.removeprefix(b"\xef\xbb\xbf").strip(b"\0 \t\r\n")
    if not text:
        raise InputError(f"{path} {'begins with blanks or zeros only' if head else 'is empty'}{_AGAIN}")
    _refuse_pointer(path, text)
    if text.startswith(b"<"):
        title = re.search(rb"<(title|message)>(.+?)</", text, re.IGNORECASE | re.DOTALL)
        said = f" ({_line(title[2])!r})" if title else ""
        raise InputError(f"{path} is a web page{said}, such as a login or an error message{_AGAIN}")


def refuse_pointer(path: Path) -> None:
    """Raises InputError where a file is a Git LFS pointer. An OSError passes through."""
    with open(path, "rb") as file:
        _refuse_pointer(path, file.read(4096))


def _refuse_pointer(path, text):
    if _LFS.match(text):
        size = re.search(rb"^size (\d+)", text, re.MULTILINE)
        real = f" to {int(size[1]):,} bytes that are not here" if size else ""
        raise InputError(f"{path} is a Git LFS pointer{real}; run `git lfs pull` in its folder, or download the file")


def refuse_inflating(path: Path) -> None:
    """Raises InputError where a zip, such as an .npz, takes far more memory than its file has bytes.

    Weights and embeddings are hardly smaller when compressed. A zipfile.BadZipFile or an OSError passes through.
    """
    with zipfile.ZipFile(path) as archive:
        inflated = sum(entry.file_size for entry in archive.infolist())
    if inflated > _MOST_INFLATED * path.stat().st_size:
        raise InputError(f"{path} has {path.stat().st_size:,} bytes and would take {inflated:,} in memory; refused")


def beginning(path: Path) -> str:
    """How a file of another kind begins, for a message: ", it begins with 'Entry not found'"; "" unless it is text."""
    with open(path, "rb") as file:
        head = file.read(80)
    return f", it begins with {_line(head)!r}" if re.fullmatch(rb"[\t\r\n\x20-\x7e]+", head) else ""


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises InputError, naming the file, for anything else; an OSError passes through."""
    refuse_stand_in(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, a number of too many digits, too deep
        raise InputError(f"{path} is not valid JSON ({one_line(error)}){beginning(path)}{_AGAIN}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__} as JSON; expected an object, {{...}}")
    return found


def _line(text: bytes) -> str:
    return " ".join(text.decode("utf-8", "replace").split())[:80]
