"""What is ours in a folder: the files that a command wrote itself, as the marker `.rankclip_jax` there lists them.

A command removes and replaces nothing else. It claims its names before it writes them; a name that is taken by a file
of somebody else is refused. Folders older than the markers are recognised by what is in them. Names that were
read from a file are not trusted: none may lead out of its folder, directly or by a link.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import make_folder, write_whole

MARKER = ".rankclip_jax"  # JSON: command -> names, relative to the folder
ORIGIN = ".in_bucket.json"  # of a local copy: where the folder is (storage/copies.py)
INDEX = ".rankclip_index"  # the folder of what is known of the shards in a folder, ours by its name
_TORN = re.compile(rf"\.{re.escape(MARKER)}\.[0-9a-f]{{16}}\.part")  # what a kill leaves of the first marker


def inside(folder: Path, name: object) -> Path:
    """folder/name, for a name that may come from anywhere.

    Raises:
      InputError: `name` is not a relative path of plain names, or there is a symbolic link on its way.
    """
    path = Path(folder)
    if not isinstance(name, str) or not _is_plain(name):
        raise InputError(f"{str(name)[:200]!r} is not a file name in {folder}: it would lead elsewhere")
    for part in name.split("/"):
        path = path / part
        if path.is_symlink():
            raise InputError(f"{path} is a symbolic link, which is not followed: put the file or folder itself there")
    return path


def _is_plain(name: object) -> bool:
    parts = name.split("/") if isinstance(name, str) else [""]
    return not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts)


class Owned:
    """The files of one command in a folder."""

    def __init__(self, folder: str | Path, command: str, alone: str | None = None):
        """Reads the marker; writes nothing.

        Args:
          command: a key of the marker, and the word for it in messages.
          alone: what to do, in words, where the folder holds files of others; None: it may.

        Raises:
          InputError: with `alone`, the folder is not empty and not the command's; or its marker is damaged.
        """
        self.folder, self._command = Path(folder), command
        there = listed(self.folder)
        self.known = command in there  # whether the command was at work here before
        self._own = set(there.get(command, ()))
        if alone and not self.known:
            ours = {name.split("/")[0] for names in there.values() for name in names} | {MARKER, INDEX, ORIGIN}
            strangers = sorted(name for name in set(_entries(self.folder)) - ours if not _TORN.fullmatch(name))
            if strangers:
                raise InputError(f"{folder} holds files that {command} did not write ({strangers[0]} ...); {alone}")

    def check(self, names: Iterable[str]) -> None:
        """Raises InputError where a name is taken by what the command did not write. An empty folder takes none."""
        for name in names:
            path = inside(self.folder, name)
            if name not in self._own and path.exists() and not (path.is_dir() and not _entries(path)):
                raise InputError(
                    f"{path} is there already, and {self._command} did not write it; move it away, or give another "
                    "folder"
                )

    def claim(self, names: Iterable[str]) -> None:
        """Lists names in the marker, making the folder if need be. Raises as `check` does, or if it cannot write."""
        names = list(names)
        self.check(names)
        self.wrote(names)

    def wrote(self, names: Iterable[str]) -> None:
        """Lists names that the command has just written where nothing was."""
        make_folder(self.folder)
        there = listed(self.folder)  # again: another command may have been here since
        self._own = {*there.get(self._command, ()), *names}
        if self._own != set(there.get(self._command, ())) or not (self.folder / MARKER).exists():
            there[self._command] = sorted(self._own)
            write_whole(self.folder / MARKER, json.dumps(there, indent=0) + "\n")

    def remove(self, name: str) -> None:
        """Removes a file of the command, or a folder of nothing but such files; nothing where there is none.

        Raises:
          InputError: it is not, or not all of it, the command's.
        """
        path = inside(self.folder, name)
        files = [path] if path.is_file() else []
        for folder, folders, names in os.walk(path):
            links = [one for one in folders if os.path.islink(os.path.join(folder, one))]
            files += [Path(folder, one) for one in (*links, *names)]
        for file in files:
            if file.relative_to(self.folder).as_posix() not in self._own:
                raise InputError(f"{file} would be removed, and {self._command} did not write it; move it away")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def clear(self, names: Iterable[str]) -> None:
        """Removes those of `names`, plain ones, that are the command's: folders with all in them, a link itself."""
        for path in (self.folder / name for name in names if name in self._own):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def dissolve(self) -> None:
        """Removes all the command's files and the marker, and the folder if nothing else is in it."""
        for name in self._own:
            self.remove(name)
        (self.folder / MARKER).unlink(missing_ok=True)
        if not _entries(self.folder):
            self.folder.rmdir()


@contextlib.contextmanager
def at_work(place: Path, command: str, alone: str) -> Iterator[None]:
    """Keeps other starts of a command out of a folder until the end of the block. Nothing is left of it after a kill.

    Args:
      place: the folder, or a file in it, which network file systems can lock too.
      alone: what to do, in words, where another start is at work.

    Raises:
      InputError: another start is at work there.
    """
    import fcntl  # Windows has none

    held = os.open(place, os.O_RDONLY if place.is_dir() else os.O_RDWR)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            folder = place if place.is_dir() else place.parent
            raise InputError(f"another {command} is at work in {folder}; wait for its end, or {alone}") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(held)


def listed(folder: Path) -> dict[str, list[str]]:
    """What is ours in a folder: {command: names}. Raises InputError where the marker is damaged."""
    marker = folder / MARKER
    if not os.path.lexists(marker):
        return _of_before(folder)
    try:
        found = json.loads(inside(folder, MARKER).read_text(encoding="utf-8"))
        for name in (name for names in found.values() for name in names):
            if not _is_plain(name):
                raise ValueError(f"{str(name)[:200]!r} is not a file name here")
        return {command: list(names) for command, names in found.items()}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(f"{marker} is damaged ({error}); move it away, or give another folder") from None


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from None


def _of_before(folder: Path) -> dict[str, list[str]]:
    """What is ours in a folder without a marker, by the files that only our commands write: {command: names}."""
    entries = _entries(folder)
    found: dict[str, list[str]] = {}

    def add(command, *patterns, below=""):
        names = _entries(folder / below) if below else entries
        prefix = f"{below}/" if below else ""
        ours = [prefix + name for name in names if any(re.fullmatch(pattern, name) for pattern in patterns)]
        found[command] = found.get(command, []) + ours

    config = _json(folder / "config.json")
    if {"loss", "model", "optim", "checkpoint", "data"} <= config.keys():
        elsewhere = isinstance(config["checkpoint"], dict) and config["checkpoint"].get("folder")
        if elsewhere or (folder / "checkpoints").is_dir():
            add("train", r"(config|tokenizer)\.json", r"metrics\.jsonl", r"checkpoints", r"curves\.png")
            add("train", r"data\.json", r"\.lock")
            add("train", r"bad_samples(\.process\d+)?\.jsonl")
            add("eval", r"eval\.json")
            add("eval", r"(zero_shot|geometry)_.*\.npz", r"retrieval_.*\.json", below="eval")
            add("launch", r"train\.log")
    manifest = _json(folder / "manifest.json")
    shards, settings = manifest.get("shards"), manifest.get("settings")
    if isinstance(shards, list) and isinstance(settings, dict) and {"rows", "shard_size"} <= settings.keys():
        add("prepare", r"manifest\.json", r"bad_samples\.jsonl", r"\d{5,}\.tfrecord(\.part)?")
        if "tokenizer" in settings:
            add("prepare", r"tokenizer\.json")
    if "URLS" in _json(folder / "_download" / "settings.json"):
        add("download", r"settings\.json", r"urls\.parquet", r"img2dataset\.log", below="_download")
        add("download", r"\d{5,}(\.tar|\.parquet|_stats\.json)")
        add("download", r"\d+\.feather", below="_tmp")
    if {"data", "image_key", "delimiter", "model", "size"} <= _json(folder / "about.json").keys():
        add("embed", r"about\.json", r"\d+\.(npz|unfinished)")
    if any(_is_study_run(folder / below) for below in ("runs", "search")):
        add("study", r"results\.(json|md)", r"(curves|dynamics)\.png")
    return found


def _is_study_run(folder: Path) -> bool:
    names = [name for name in _entries(folder) if re.fullmatch(r".+-lr[^/]+-seed\d+\.json", name)]
    return bool(names) and {"objective", "lr", "seed", "config"} <= _json(folder / names[0]).keys()


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
