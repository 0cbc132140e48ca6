"""manifest.json and bad_samples.jsonl of a folder of shards: finished shards with checksums, and skipped rows.

manifest.json is written when work begins and when all is done. In between each finished shard is a line of
manifest.jsonl: with all of them written for each, N shards would cost N x N.

Of a folder in a bucket, `folder` is the local copy of storage.output; the shards are in the bucket.
"""

import bisect
import hashlib
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from input_pipeline import shards
from rankclip_jax.common import files, storage
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.ownership import Owned
from rankclip_jax.common.progress import progress

_LINES = "manifest.jsonl"
# What reading a file of another kind, or a damaged one, raises.
_DAMAGED = (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError)


class Manifest:
    """The finished shards of a folder. Opening it verifies them and removes unfinished ones.

    Attributes:
      settings: determine the contents; all shards of a folder have the same settings.
      shards: one dict each, in order: name, rows [begin, end), samples, bytes, sha256, bad (reason -> count).
      bad: reason -> count over all shards.
      left_out: the same of rows that --min-score and --dedup leave out.
    """

    def __init__(self, folder: Path, settings: dict, others: tuple[str, ...] = ()):
        """Opens a new folder, or resumes one.

        Args:
          settings: include `rows` and `shard_size`, which determine the names of the shards.
          others: names of other files that the caller will write.

        Raises:
          InputError: `folder` cannot be written, has shards of other settings, or files that `prepare` did not write.
        """
        self._folder, self.settings, self.shards = folder, settings, []
        self._counted, self._so_far = 0, (0, 0)  # of so_far: each shard is counted once
        old = self._read()
        if old is None and (strangers := sorted(path.name for path in folder.glob("*.tfrecord"))):
            raise InputError(f"{folder} has shards ({strangers[0]} ...) but no manifest.json; give another folder")
        if old is not None:
            self._check_settings(old["settings"])
        self._url = storage.origin(folder)
        there = {storage.name_of(file.path): file.size for file in storage.files_in(self._url)} if self._url else {}
        self._owned = Owned(folder, "prepare", alone="give a new OUT_DIR")
        names = shards.names(settings["rows"], settings["shard_size"])
        self._parts = [shards.part_of(folder / name).name for name in names]
        self._owned.claim(["manifest.json", _LINES, "bad_samples.jsonl", *others, *names, *self._parts])
        self.remove_parts()
        if old is not None:
            self.shards = self._intact(self._with_lines(old["shards"]), there)
        self._write(complete=False)
        files.write_whole(folder / _LINES, "")  # not removed: a bucket keeps what this copy of it does not replace
        self._take_back_bad_samples()

    def remove_parts(self) -> None:
        """Removes the incomplete shards that a killed worker left."""
        for part in self._parts:
            self._owned.remove(part)

    @property
    def rows(self) -> int:
        return sum(end - begin for begin, end in (shard["rows"] for shard in self.shards))

    @property
    def bad(self) -> Counter:
        return sum((Counter(shard["bad"]) for shard in self.shards), Counter())

    @property
    def left_out(self) -> Counter:
        return sum((Counter(shard.get("left_out", {})) for shard in self.shards), Counter())

    def so_far(self) -> tuple[int, int]:
        """(rows that are not left out, bad ones) of the finished shards before the first that is not."""
        size = self.settings["shard_size"]
        while self._counted < len(self.shards) and self.shards[self._counted]["rows"][0] == self._counted * size:
            shard = self.shards[self._counted]
            bad = sum(shard["bad"].values())
            self._so_far = self._so_far[0] + shard["samples"] + bad, self._so_far[1] + bad
            self._counted += 1
        return self._so_far

    def add(self, shard: dict, bad_samples: list[dict]) -> None:
        """Records a finished shard and its bad samples, dicts of row, where, reason, detail.

        Raises:
          InputError: the disk is full or not writable.
        """
        shard["bad"] = dict(Counter(sample["reason"] for sample in bad_samples))
        # Before the shard's line: if the run stops in between, the next start removes these.
        for path, lines in ((self._folder / "bad_samples.jsonl", bad_samples), (self._folder / _LINES, [shard])):
            try:
                with open(path, "a", encoding="utf-8") as out:
                    out.writelines(json.dumps(line) + "\n" for line in lines)
                    out.flush()
                    os.fsync(out.fileno())
            except OSError as error:
                raise files.cannot_write(path, error) from None
        bisect.insort(self.shards, shard, key=lambda shard: shard["rows"])

    def add_lost(self, lost: list[dict]) -> None:
        """Lists what has no row in bad_samples.jsonl, from which the next start removes it. Raises as `add`."""
        path = self._folder / "bad_samples.jsonl"
        before = path.read_text(encoding="utf-8")
        files.write_whole(path, "".join(json.dumps(sample) + "\n" for sample in lost) + before)

    def finish(self) -> None:
        """Marks the folder as complete, and puts the bad samples in order."""
        path = self._folder / "bad_samples.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        row_of = {line: json.loads(line)["row"] for line in lines}
        files.write_whole(path, "".join(sorted(lines, key=lambda line: -1 if row_of[line] is None else row_of[line])))
        self._write(complete=True)
        storage.push(self._folder)  # before the lines go
        self._owned.remove(_LINES)
        if self._url:
            storage.delete(storage.join(self._url, _LINES))

    def _read(self):
        path = self._folder / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            return {"settings": dict(manifest["settings"]), "shards": _checked(manifest)}
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _DAMAGED as error:
            raise InputError(f"{path} is not a manifest of prepare: {error!r}; give another folder") from None

    def _with_lines(self, old):
        """`old` and the shards that were finished since manifest.json was written, in order."""
        path = self._folder / _LINES
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last line may be torn
            since = _checked({"settings": self.settings, "shards": whole})
        except _DAMAGED as error:
            raise InputError(f"{path} is not a list of prepare's shards: {error!r}; give another folder") from None
        return sorted({shard["name"]: shard for shard in [*old, *since]}.values(), key=lambda shard: shard["rows"])

    def _check_settings(self, old):
        where, new = storage.shown(self._folder), self.settings
        keys = sorted(key for key in old | new if key != "fingerprint" and old.get(key) != new.get(key))
        changes = "; ".join(f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys)
        if changes:
            raise InputError(f"{where} has shards of other settings ({changes}); give another folder")
        if old.get("fingerprint", new.get("fingerprint")) != new.get("fingerprint"):  # older ones have none
            raise InputError(f"{where} has shards of other data: SOURCE has changed since; give another folder")

    def _intact(self, old, there):
        """The shards that are as the manifest says: of a bucket, `there`, by name and size."""

        def is_whole(shard):
            if self._url:
                return there.get(shard["name"]) == (shard["bytes"] if shard["samples"] else None)
            return is_intact(self._folder / shard["name"], shard)

        kept = []
        with progress("verify", len(old), unit="shards") as bar, ThreadPoolExecutor() as pool:
            intact = pool.map(is_whole, old)
            for shard, good in zip(old, intact, strict=True):
                if good:
                    kept.append(shard)
                else:
                    print(f"{shard['name']} is missing or differs from manifest.json: written again", file=sys.stderr)
                    self._owned.remove(shard["name"])
                bar.update()
        return kept

    def _write(self, complete):
        manifest = {
            "complete": complete,
            "samples": sum(shard["samples"] for shard in self.shards),
            "bad": dict(self.bad),
            **({"left_out": dict(self.left_out)} if self.left_out else {}),
            "settings": self.settings,
            "shards": self.shards,
        }
        files.write_whole(self._folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def _take_back_bad_samples(self):
        """Keeps only lines about rows of finished shards; other rows will be read again."""
        path = self._folder / "bad_samples.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        size = self.settings["shard_size"]
        finished = {shard["rows"][0] // size for shard in self.shards if shard["bad"]}
        whole = [line for line in lines if line.endswith("\n")]  # the last line may be torn
        try:
            row_of = {line: json.loads(line)["row"] for line in whole}  # None: of what was lost with its file
            kept = [line for line in whole if row_of[line] is not None and row_of[line] // size in finished]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is not a list of prepare's bad samples: {error!r}; give another folder") from None
        files.write_whole(path, "".join(kept))


def _checked(manifest: dict) -> list[dict]:
    """The manifest's shards. Raises errors of several types if `Manifest` did not write them."""
    settings = manifest["settings"]
    for shard in manifest["shards"]:
        begin, end = shard["rows"]
        if shard["name"] != shards.name(begin // settings["shard_size"]) or not 0 <= begin < end <= settings["rows"]:
            raise ValueError(f"shard {shard['name']!r} of rows {begin} to {end}")
        sum((shard["samples"], shard["bytes"], *shard["bad"].values(), *shard.get("left_out", {}).values()))  # numbers
    return list(manifest["shards"])


def is_intact(path: Path, shard: dict) -> bool:
    """Whether a file matches the size and SHA-256 of its manifest entry."""
    if not shard["samples"]:
        return not path.exists()
    if not path.is_file() or path.stat().st_size != shard["bytes"]:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]
