"""The command line: embed a collection of images, and search it by text.

python -m rankclip_jax.embed MODEL DATA --out photos.npz
python -m rankclip_jax.embed MODEL DATA --out gs://mine/photos --ray
python -m rankclip_jax.embed MODEL photos.npz --search "a dog on a beach" like_this.jpg --png matches.png
rankclip search MODEL DATA "a dog on a beach"
"""

import argparse
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import rankclip_jax
from rankclip_jax.common import commands, storage, tasks
from rankclip_jax.common.errors import InputError, located, one_line
from rankclip_jax.common.pictures import ENDINGS
from rankclip_jax.config.key import character, encoding
from rankclip_jax.inference import collection, search, store
from rankclip_jax.inference.model import Model
from rankclip_jax.inference.pictures import Pictures, open_pictures


def main() -> None:
    """Exit codes: common/commands.py."""
    parser = argparse.ArgumentParser(
        prog=commands.prog("rankclip_jax.embed"),
        description="Embeds a collection of images, or searches it. The same command resumes a stopped run.",
    )
    parser.add_argument("model", help="any path for rankclip_jax.load: a workdir, an export, a .pt, ...")
    parser.add_argument(
        "data", help="a folder of images, a table (.csv ...), shards (.tar, .tfrecord, .parquet); or a file of --out"
    )
    parser.add_argument("queries", nargs="*", metavar="QUERY", help="as --search")
    parser.add_argument("--out", help="the file to write: .npz or .parquet; or a folder of Parquet, also gs:// or s3://")
    parser.add_argument(
        "--search",
        action="extend",  # also where it is given again
        nargs="+",
        metavar="QUERY",
        default=[],
        help="print the best matches of each text or image file",
    )
    parser.add_argument("--top", type=int, default=10, help="number of matches (default 10)")
    parser.add_argument("--png", help="also draw the matches into this file")
    parser.add_argument("--image-key", help="column, feature or member of the image; default: the format's default")
    parser.add_argument("--caption-key", help="the same of the caption, whose cosine is written beside the embedding")
    parser.add_argument("--delimiter", default=",", help="separator of a csv (default ,; a tab is '\\t')")
    parser.add_argument("--encoding", help="of a table that is not UTF-8, for example latin-1")
    parser.add_argument("--image-folder", help="what a table's paths are relative to, itself relative to the table")
    parser.add_argument("--tokenizer", help="a tokenizer.json or hub id, if MODEL has none")
    parser.add_argument("--activation", choices=["quick_gelu", "gelu"], default="quick_gelu", help="as in convert")
    by = parser.add_mutually_exclusive_group()
    by.add_argument("--workers", type=int, default=1, help="processes that write a folder's shards (1)")
    by.add_argument("--ray", nargs="?", const="", metavar="ADDRESS", help=tasks.RAY_HELP)
    flags = parser.parse_intermixed_args()
    queries = [*flags.search, *flags.queries]
    if not (flags.out or queries):
        parser.error("give --out FILE to embed DATA, --search QUERY to search it, or both")
    if file := next((query for query in flags.queries if query.endswith(store.ENDINGS)), None):
        parser.error(f"{file} is read as a QUERY; to write that file give --out {file}")
    if (flags.workers != 1 or flags.ray is not None) and not (flags.out and store.is_folder(flags.out)):
        parser.error("--workers and --ray write shards: give --out FOLDER")
    if flags.workers < 1:
        parser.error(f"--workers {flags.workers}: expected at least 1")
    if flags.top < 1:
        parser.error(f"--top {flags.top}: expected at least 1")
    commands.usual_numbers()
    commands.keep_freed_memory()
    commands.quiet_tensorflow()  # for shards
    with commands.exit_codes("stopped; the same command resumes"):
        try:
            flags.out = flags.out and os.path.expanduser(flags.out)
            if flags.out and not store.is_folder(flags.out):
                storage.local(flags.out, "--out")
            flags.png = flags.png and storage.local(flags.png, "--png")
            flags.delimiter = character(",").check(flags.delimiter, "--delimiter")
            flags.encoding = encoding(None).check(flags.encoding, "--encoding")
            model = rankclip_jax.load(flags.model, tokenizer=flags.tokenizer, activation=flags.activation)
            if flags.out:
                _embed(model, flags)
            if queries and (flags.out or store.is_store(flags.data)):
                _search(model, *_stored(model, flags.out or flags.data), queries, flags.top, flags.png)
            elif queries:
                pictures = open_pictures(*_opening(flags))
                embeddings = collection.encode(model, pictures)
                _search(model, [embeddings], lambda: pictures, queries, flags.top, flags.png)
        except BrokenPipeError:
            raise
        except OSError as error:  # a folder that is not there, a full disk
            said = f"{error.filename}: {error.strerror}" if error.filename else one_line(error)
            raise InputError(said) from None


def _embed(model: Model, flags: argparse.Namespace) -> None:
    about = {
        "data": flags.data if storage.is_remote(flags.data) else os.path.realpath(os.path.expanduser(flags.data)),
        "image_key": flags.image_key,
        "caption_key": flags.caption_key,
        "delimiter": flags.delimiter,
        "encoding": flags.encoding,
    } | model.identity()
    if flags.image_folder:
        about["image_folder"] = flags.image_folder
    opening = _opening(flags)
    pictures = open_pictures(*opening)
    about |= {"size": pictures.size, "names": pictures.fingerprint()}
    if collection.is_scored(model, pictures):
        about["cosines"] = True
        if pictures.captions_at_hand:
            about["captions"] = pictures.fingerprint_of_captions()
    if not store.is_folder(flags.out):
        collection.embed(model, pictures, Path(flags.out), about)
        return
    with storage.output(flags.out, "embed") as out:
        loading = (flags.model, flags.tokenizer, flags.activation)
        worker, run = collection.Worker(loading, opening, about, storage.shown(out)), None
        if flags.ray is not None:
            run = functools.partial(tasks.run_by_ray, worker, address=flags.ray, gpu=True)
        elif flags.workers > 1:
            threads = max(1, tasks.cores() // flags.workers)
            run = functools.partial(tasks.run, worker, workers=flags.workers, threads=threads)
        collection.embed_to_folder(model, pictures, out, about, run)


def _opening(flags: argparse.Namespace) -> tuple:
    return flags.data, flags.image_key, flags.delimiter, flags.encoding, flags.caption_key, flags.image_folder


def _stored(model: Model, path: str) -> tuple[Iterable[store.Embeddings], Callable[[], Pictures]]:
    about = store.about_of(path)
    if any(about.get(key, value) != value for key, value in model.identity().items()):  # older ones have fewer keys
        raise InputError(f"{path} was embedded with another model than {model.source.path}; embed the collection again")
    keys = about["image_key"], about["delimiter"], *map(about.get, ("encoding", "caption_key", "image_folder"))
    return store.chunks(path), lambda: open_pictures(about["data"], *keys)


def _search(
    model: Model,
    embeddings: Iterable[store.Embeddings],
    pictures: Callable[[], Pictures],
    queries: list[str],
    top: int,
    png: Path | None,
) -> None:
    z_QxD = np.concatenate([_encoded(model, one) for one in queries])
    matches, found_QxK, cosines_QxK = search.best(embeddings, z_QxD, top)
    for query, found, cosines in zip(queries, found_QxK, cosines_QxK, strict=True):
        print(search.table(query, matches, found, cosines))
    if png:
        search.draw(png, queries, matches, pictures(), found_QxK, cosines_QxK)
        print(f"drawn: {png}")


def _encoded(model: Model, query: str) -> np.ndarray:
    """(1, D), of a picture's file or of a text. Raises InputError for one word that is a picture's name and no file."""
    path = Path(os.path.expanduser(query))
    if path.suffix.lower() not in ENDINGS or not (path.is_file() or len(query.split()) == 1):
        return model.encode_text(query)
    if not path.is_file():
        raise InputError(f"no such picture: {located(query)}")
    return model.encode_image(path)


if __name__ == "__main__":
    main()
