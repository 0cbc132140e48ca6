"""Embeds a collection of images in parts, so that a stopped run resumes: to one file, or to a folder of shards."""

import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rankclip_jax.common import storage
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import whole, write_whole
from rankclip_jax.common.ownership import Owned, at_work, inside
from rankclip_jax.common.progress import progress
from rankclip_jax.inference import store
from rankclip_jax.inference.model import Model, load
from rankclip_jax.inference.pictures import Pictures, open_pictures

PART = 512  # images per part: the most that a stopped run repeats


def is_scored(model: Model, pictures: Pictures) -> bool:
    """Whether each image has a cosine with its caption; stderr says so where only the tokenizer is missing."""
    if pictures.captioned() and not model.source.tokenizer:
        print(f"no cosines with the captions: {model.source.path} has no tokenizer; give --tokenizer", file=sys.stderr)
        return False
    return pictures.captioned()


def embed(model: Model, pictures: Pictures, out: Path, about: dict) -> None:
    """Writes the embeddings of all images to `out` (.npz or .parquet; see `store.write`).

    With "cosines" in `about` (`is_scored`) also the cosine of each image with its caption; of several, their mean.

    Finished parts stay in OUT.parts until the end, and a restarted run resumes from them. Unusable images are left out
    and listed with the reason in OUT.bad_samples.jsonl.

    Args:
      model: from `rankclip_jax.load`.
      about: metadata of the file. A run resumes only with the same metadata.

    Raises:
      InputError: `out` has an unknown extension; it or its bad_samples.jsonl exists; its parts belong to another run or
        are not ours; another start is at work; or no image could be used.
    """
    if out.suffix not in store.ENDINGS:
        expected = f"{' or '.join(store.ENDINGS)}, or a folder, which ends in / or has no dot"
        raise InputError(f"--out {out}: unknown extension. Expected {expected}")
    if out.exists():
        raise InputError(f"{out} already exists; search it with --search, delete it, or give another --out")
    folder, named = (inside(out.parent, out.name + ending) for ending in (".parts", ".bad_samples.jsonl"))
    starts = range(0, pictures.size, PART)
    parts = Owned(folder, "embed", alone="move it away, or give another --out")
    if named.exists() and not parts.known:
        raise InputError(f"{named} already exists; move it away, or give another --out")
    _same_run(folder, about)
    parts.claim(["about.json", "unfinished", *(f"{start}.npz" for start in starts)])
    if not (folder / "about.json").exists():
        write_whole(folder / "about.json", json.dumps(about))
    with at_work(folder, "embed", "give another --out"):
        _write_parts(model, pictures, folder, starts, "cosines" in about)
        _list_left_out(pictures, folder, starts, named)
        count = store.write(out, (_part(folder, start)[0] for start in starts), about, folder / "unfinished")
        parts.dissolve()
    print(f"wrote {out}: {count:,} embeddings of {model.source.config.embed_dim} dimensions")


def _write_parts(model, pictures, folder, starts, scored):
    missing = [start for start in starts if not (folder / f"{start}.npz").exists()]
    if len(missing) < len(starts):
        print(f"resuming from {folder}: {len(starts) - len(missing)} of {len(starts)} parts are done")
    left = sum(min(PART, pictures.size - start) for start in missing)
    with ThreadPoolExecutor() as threads, progress("embed", left) as bar:
        for start in missing:
            rows = range(start, min(start + PART, pictures.size))
            _write_part(folder / f"{start}.npz", *_embed_rows(model, pictures, rows, threads, scored))
            bar.update(len(rows))


def _list_left_out(pictures, folder, starts, named):
    """Lists in the file `named` what the parts left out, and why."""
    lost = [json.dumps({"row": None, "where": where, "reason": reason}) for where, reason in pictures.lost]
    bad = lost + [line for start in starts for line in _part(folder, start)[1]]
    if len(bad) - len(lost) == pictures.size:
        raise _none_used(pictures, bad[0])
    if bad:
        lines = "".join(line + "\n" for line in bad)
        if named.exists() and named.read_text(encoding="utf-8", errors="replace") != lines:  # else from before a kill
            raise InputError(f"{named} belongs to another run; move it away, and run the same command again")
        write_whole(named, lines)
        print(f"{_left_out(len(bad), bad[0])}; all are listed in {named}")


def embed_to_folder(
    model: Model,
    pictures: Pictures,
    out: Path,
    about: dict,
    run: Callable[[Iterator[int]], Generator[int]] | None = None,
) -> None:
    """Writes the embeddings of all images to a folder of Parquet shards of `store.SHARD` images (without the unusable,
    which `store.BAD` lists with their reasons). Memory does not grow with the number of images.

    Finished shards are kept, so the same command resumes.

    Args:
      out: local; or the copy of a folder in a bucket (storage.output), where the shards are written.
      about: as of `embed`.
      run: numbers of shards -> those that are written, in any order; None: one after the other, in this process.

    Raises:
      InputError: the folder is of another run or has files of others, another start is at work there, or no image
        could be used.
    """
    where, names = storage.shown(out), [store.shard(number) for number in range(store.shards(pictures.size))]
    owned = Owned(out, "embed", alone="move them away, or give another --out")
    _same_run(out, about, store.ABOUT)
    owned.claim([store.ABOUT, store.BAD, *names, *map(_part_of, names)])
    if not (out / store.ABOUT).exists():
        write_whole(out / store.ABOUT, json.dumps(about))
    with at_work(out, "embed", "give another --out"):
        storage.push(out)
        _write_shards(model, pictures, where, names, about, run)
        for name in names:
            owned.remove(_part_of(name))
        _list_bad(model, pictures, out, where)


def _write_shards(model, pictures, where, names, about, run):
    there = {storage.name_of(path) for path in store.files(where)}
    missing = [number for number, name in enumerate(names) if name not in there]
    if len(missing) < len(names):
        print(f"resuming: {len(names) - len(missing)} of {len(names)} shards of {where} are done")

    def rows_of(number):
        return range(number * store.SHARD, min((number + 1) * store.SHARD, pictures.size))

    with ThreadPoolExecutor() as threads, progress("embed", sum(len(rows_of(number)) for number in missing)) as bar:

        def written():
            for number in missing:
                write_shard(model, pictures, where, number, about, threads, bar.update)
                yield number

        with contextlib.closing(run(iter(missing)) if run else written()) as done:
            for number in done:
                if run:
                    bar.update(len(rows_of(number)))


def _list_bad(model, pictures, out, where):
    """Lists what was left out, and says what was written."""
    count, bad, example = 0, 0, ""
    with (
        whole(out / store.BAD) as part,
        open(part, "w", encoding="utf-8") as file,
        ThreadPoolExecutor(32) as pool,  # a bucket answers slowly
    ):
        for place, reason in pictures.lost:
            line = json.dumps({"row": None, "where": place, "reason": reason})
            file.write(line + "\n")
            example = example or line
        paths = [storage.join(where, store.shard(number)) for number in range(store.shards(pictures.size))]
        for rows, lines in pool.map(store.read_bad, paths):
            file.writelines(line + "\n" for line in lines)
            count, bad, example = count + rows, bad + len(lines), example or next(iter(lines), "")
    if not count:
        raise _none_used(pictures, example)
    if example:
        print(f"{_left_out(bad + len(pictures.lost), example)}; all are listed in {storage.join(where, store.BAD)}")
    print(f"wrote {where}: {count:,} embeddings of {model.source.config.embed_dim} dimensions")


def write_shard(
    model: Model,
    pictures: Pictures,
    where: str,
    number: int,
    about: dict,
    threads: ThreadPoolExecutor,
    done: Callable[[int], object] = lambda count: None,
) -> None:
    """Writes a shard to the folder `where`, local or in a bucket, whole or not at all. done(n): n more images."""
    begin, bad = number * store.SHARD, []

    def parts():
        for start in range(begin, min(begin + store.SHARD, pictures.size), PART):
            rows = range(start, min(start + PART, begin + store.SHARD, pictures.size))
            z, good, names, cosines, lines = _embed_rows(model, pictures, rows, threads, "cosines" in about)
            bad.extend(lines)
            yield store.Embeddings(z, np.array(good, np.int64), names, about, cosines)
            done(len(rows))

    name = store.shard(number)
    if not storage.is_remote(where):
        store.write(Path(where, name), parts(), about, Path(where, _part_of(name)), bad)
        return
    with tempfile.TemporaryDirectory(prefix="rankclip_jax.") as folder:
        store.write(Path(folder, name), parts(), about, None, bad)
        storage.write(storage.join(where, name), Path(folder, name).read_bytes())


def _part_of(name: str) -> str:
    return f"_{name}.part"


@dataclasses.dataclass(frozen=True)
class Worker:
    """What a worker of `embed_to_folder` needs to know, which may lie on another machine. It loads the model once.

    Attributes:
      model: path, tokenizer and activation, as of `load`.
      pictures: the arguments of open_pictures.
      about: as of `embed`.
      where: the folder of the shards, which all workers can write.
    """

    model: tuple
    pictures: tuple
    about: dict
    where: str

    def __call__(self, number: int, threads: int) -> int:
        """Writes the shard."""
        model, pictures = _of_worker(self.model, self.pictures)
        found = model.identity() | {"size": pictures.size, "names": pictures.fingerprint()}
        if found != {key: self.about[key] for key in found}:
            raise InputError("a worker finds another model or collection: every machine needs the same files")
        with ThreadPoolExecutor(threads) as pool:
            write_shard(model, pictures, self.where, number, self.about, pool)
        return number


@functools.lru_cache(maxsize=1)
def _of_worker(model, pictures):
    path, tokenizer, activation = model
    opened = open_pictures(*pictures)
    opened.captioned()  # reads the captions of a table here, once, which else each thread would do
    return load(path, tokenizer=tokenizer, activation=activation), opened


def encode(model: Model, pictures: Pictures) -> store.Embeddings:
    """The embeddings of all usable images, in memory; stderr says how many were left out.

    Raises:
      InputError: no image could be used.
    """
    parts, bad = [], []
    with ThreadPoolExecutor() as threads, progress("embed", pictures.size) as bar:
        for start in range(0, pictures.size, PART):
            rows = range(start, min(start + PART, pictures.size))
            *part, _, reasons = _embed_rows(model, pictures, rows, threads, scored=False)
            parts.append(part)
            bad += reasons
            bar.update(len(rows))
    if len(bad) == pictures.size:
        raise _none_used(pictures, bad[0])
    if bad:
        print(_left_out(len(bad), bad[0]), file=sys.stderr)
    z, rows, names = zip(*parts, strict=True)
    rows, names = (list(itertools.chain.from_iterable(some)) for some in (rows, names))
    return store.Embeddings(np.concatenate(z), np.array(rows, np.int64), names, {})


def _embed_rows(model, pictures, rows, threads, scored):
    good, bad = [], []

    def prepare(row):
        try:
            return row, model.source.view(pictures.image(row)), None
        except InputError as error:
            return row, None, str(error)

    def views():
        for row, view, reason in threads.map(prepare, rows):
            if reason is None:
                good.append(row)
                yield view
            else:
                bad.append(json.dumps({"row": row, "where": pictures.name(row), "reason": reason}))

    z_NxD = model.encode_views(views())
    cosines = _cosines(model, z_NxD, list(threads.map(pictures.captions, good))) if scored else None
    return z_NxD, good, [pictures.name(row) for row in good], cosines, bad


def _cosines(model, z_NxD, captions):
    """float32 (N,): the mean of each row's cosines with its captions; NaN without one."""
    rows_T = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    z_txt_TxD = model.encode_captions(itertools.chain.from_iterable(captions))
    cosines_T = np.einsum("td,td->t", z_NxD[rows_T], z_txt_TxD, dtype=np.float64)
    sums_N, counts_N = (np.bincount(rows_T, weights, len(captions)) for weights in (cosines_T, None))
    return np.where(counts_N > 0, sums_N / np.maximum(counts_N, 1), np.nan).astype(np.float32)


def _write_part(path: Path, z_NxD: np.ndarray, rows: list, names: list, cosines: Any, bad: list) -> None:
    with whole(path) as part, open(part, "wb") as file:
        names, bad = np.array(names, dtype=str), np.array(bad, dtype=str)
        scores = {} if cosines is None else {"cosine": cosines}
        np.savez(file, embedding=z_NxD, row=np.array(rows, np.int64), name=names, bad=bad, **scores)


def _part(folder: Path, start: int) -> tuple[store.Embeddings, list[str]]:
    """A finished part, and the lines of its unusable images."""
    file = folder / f"{start}.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            names, cosines = arrays["name"].tolist(), arrays.get("cosine")
            found = store.Embeddings(arrays["embedding"], arrays["row"], names, {}, cosines)
            return found, arrays["bad"].tolist()
    except Exception as error:  # whatever NumPy raises on a damaged file
        raise InputError(f"{file} is damaged ({one_line(error)}); delete it, and run the same command again") from None


def _same_run(folder: Path, about: dict, name: str = "about.json") -> None:
    stored = folder / name
    if stored.exists():
        try:
            old = dict(json.loads(stored.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{stored} is damaged ({error}); move {folder} away, or give another --out") from None
        younger = {"activation", "view", "names", "captions"} - set(old)  # keys that parts of before do not have
        keys = [key for key in old | about if key not in younger and old.get(key) != about.get(key)]
        changed = [f"{key}: {old.get(key)!r} -> {about.get(key)!r}" for key in keys]
        if changed:
            raise InputError(f"{folder} belongs to another run ({'; '.join(changed)}); delete it, or change --out")


def _none_used(pictures: Pictures, example: str) -> InputError:
    return InputError(f"none of the {pictures.size} images could be used; for example {_place_and_reason(example)}")


def _left_out(count: int, example: str) -> str:
    return f"{count} images were left out, for example {_place_and_reason(example)}"


def _place_and_reason(line: str) -> str:
    sample = json.loads(line)
    return f"{sample['where']}: {sample['reason']}"
