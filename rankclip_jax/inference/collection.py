"""Embeds a collection of images in parts, so that a stopped run resumes."""

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.files import whole, write_whole
from rankclip_jax.common.ownership import Owned, inside
from rankclip_jax.common.progress import progress
from rankclip_jax.inference import store
from rankclip_jax.inference.model import Model
from rankclip_jax.inference.pictures import Pictures

PART = 512  # images per part: the most that a stopped run repeats


def embed(model: Model, pictures: Pictures, out: Path, about: dict) -> None:
    """Writes the embeddings of all images to `out` (.npz or .parquet; see `store.write`).

    Of a captioned collection, also the cosine of each image with its caption; of several, their mean.

    Finished parts stay in OUT.parts until the end, and a restarted run resumes from them. Unusable images are left out
    and listed with the reason in OUT.bad_samples.jsonl.

    Args:
      model: from `rankclip_jax.load`.
      about: metadata of the file. A run resumes only with the same metadata.

    Raises:
      InputError: `out` has an unknown extension; it or its bad_samples.jsonl exists; its parts belong to another run or
        are not ours; or no image could be used.
    """
    if out.suffix not in store.ENDINGS:
        raise InputError(f"--out {out}: unknown extension. Expected {' or '.join(store.ENDINGS)}")
    if out.exists():
        raise InputError(f"{out} already exists; search it with --search, delete it, or give another --out")
    folder, named = (inside(out.parent, out.name + ending) for ending in (".parts", ".bad_samples.jsonl"))
    scored = pictures.captioned()
    if scored and not model.source.tokenizer:
        print(f"no cosines with the captions: {model.source.path} has no tokenizer; give --tokenizer", file=sys.stderr)
        scored = False
    about = about | ({"cosines": True} if scored else {})
    starts = range(0, pictures.size, PART)
    parts = Owned(folder, "embed", alone="move it away, or give another --out")
    if named.exists() and not parts.known:
        raise InputError(f"{named} already exists; move it away, or give another --out")
    _same_run(folder, about)
    parts.claim(["about.json", "unfinished", *(f"{start}.npz" for start in starts)])
    if not (folder / "about.json").exists():
        write_whole(folder / "about.json", json.dumps(about))
    missing = [start for start in starts if not (folder / f"{start}.npz").exists()]
    if len(missing) < len(starts):
        print(f"resuming from {folder}: {len(starts) - len(missing)} of {len(starts)} parts are done")
    left = sum(min(PART, pictures.size - start) for start in missing)
    with ThreadPoolExecutor() as threads, progress("embed", left) as bar:
        for start in missing:
            rows = range(start, min(start + PART, pictures.size))
            _write_part(folder / f"{start}.npz", *_embed_rows(model, pictures, rows, threads, scored))
            bar.update(len(rows))

    lost = [json.dumps({"row": None, "where": where, "reason": reason}) for where, reason in pictures.lost]
    bad = lost + [line for start in starts for line in _part(folder, start)[1]]
    if len(bad) - len(lost) == pictures.size:
        raise InputError(f"none of the {pictures.size} images could be used; for example {_place_and_reason(bad[0])}")
    if bad:
        lines = "".join(line + "\n" for line in bad)
        if named.exists() and named.read_text(encoding="utf-8", errors="replace") != lines:  # else from before a kill
            raise InputError(f"{named} belongs to another run; move it away, and run the same command again")
        write_whole(named, lines)
        print(f"{len(bad)} images were left out, for example {_place_and_reason(bad[0])}; all are listed in {named}")
    count = store.write(out, (_part(folder, start)[0] for start in starts), about, folder / "unfinished")
    parts.dissolve()
    print(f"wrote {out}: {count:,} embeddings of {model.source.config.embed_dim} dimensions")


def encode(model: Model, pictures: Pictures) -> store.Embeddings:
    """The embeddings of all usable images, in memory; stderr says how many were left out.

    Raises:
      InputError: no image could be used.
    """
    parts, bad = [], []
    with ThreadPoolExecutor() as threads, progress("embed", pictures.size) as bar:
        for start in range(0, pictures.size, PART):
            rows = range(start, min(start + PART, pictures.size))
            *part, _, reasons = _embed_rows(model, pictures, rows, threads)
            parts.append(part)
            bad += reasons
            bar.update(len(rows))
    if len(bad) == pictures.size:
        raise InputError(f"none of the {pictures.size} images could be used; for example {_place_and_reason(bad[0])}")
    if bad:
        print(f"{len(bad)} images were left out, for example {_place_and_reason(bad[0])}", file=sys.stderr)
    z, rows, names = zip(*parts, strict=True)
    rows, names = (list(itertools.chain.from_iterable(some)) for some in (rows, names))
    return store.Embeddings(np.concatenate(z), np.array(rows, np.int64), names, {})


def _embed_rows(model, pictures, rows, threads, scored=False):
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


def _same_run(folder: Path, about: dict) -> None:
    stored = folder / "about.json"
    if stored.exists():
        try:
            old = dict(json.loads(stored.read_text()))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"{stored} is damaged ({error}); move {folder} away, or give another --out") from None
        changed = [f"{key}: {old.get(key)!r} -> {about.get(key)!r}" for key in about if old.get(key) != about[key]]
        if changed:
            raise InputError(f"{folder} belongs to another run ({'; '.join(changed)}); delete it, or change --out")


def _place_and_reason(line: str) -> str:
    sample = json.loads(line)
    return f"{sample['where']}: {sample['reason']}"
