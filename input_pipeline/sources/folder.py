"""A folder of images, at any depth, each with a .txt of the same name next to it."""

import os

from ml_collections import ConfigDict

from input_pipeline.graph import from_python
from input_pipeline.sources.byte_ranges import Files
from input_pipeline.sources.captioned_files import captioned_files
from input_pipeline.sources.packed_strings import PackedStrings
from input_pipeline.sources.source import Lost, Reading, Source, all_ahead
from rankclip_jax.common import folders, storage, tables
from rankclip_jax.common.errors import InputError, located
from rankclip_jax.common.pictures import ENDINGS
from rankclip_jax.config.guess import SHARDS

_NOT_READ = (".avif", ".heic", ".heif", ".jxl", ".jp2", ".tif", ".tiff", ".tga", ".svg", ".psd")  # of pictures
_ABOUT = ("dataset_info.json", "state.json", "dataset_dict.json")  # of Hugging Face's data sets


def open_folder(spec: ConfigDict, path: str | os.PathLike) -> Source:
    """Opens a folder. Rows are in the order of the images' paths. A .txt without an image is reported as lost.

    `spec`: hint of config.data.

    Raises:
      InputError: no such folder, or no images.
    """
    root = os.fspath(path) if isinstance(path, str | os.PathLike) else repr(path)
    if not storage.is_folder(root):
        raise InputError(f"{located(root)} is not a folder" + (f"; {spec.hint}" if spec.get("hint") else ""))
    names = sorted(folders.files_below(root))
    images = [name for name in names if folders.is_picture(name)]
    if not images:
        raise InputError(f"{root} has no images ({', '.join(ENDINGS)}){_other_data(root, names)}")
    texts = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(".txt")}
    stems = [os.path.splitext(name)[0] for name in images]
    if texts.keys().isdisjoint(stems):
        raise InputError(f"{root}: no image has a caption, a .txt of its name beside it{_other_data(root, names)}")
    alone = texts.keys() - set(stems)
    others = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(_NOT_READ)}
    lost = tuple(
        Lost(
            os.path.join(root, texts[stem]),
            f"{os.path.basename(others[stem])} beside it is of a format that is not read"
            if stem in others
            else "a caption without an image",
            1,
        )
        for stem in sorted(alone)
    )
    size, images = len(images), PackedStrings([os.fsencode(name) for name in images])
    captions = PackedStrings([os.fsencode(texts.get(stem, "")) for stem in stems])

    folder, remote = os.fsencode(root.rstrip("/") + "/"), storage.is_remote(root)
    files = Files(remote, spec.get("max_file_mb"))
    path_of = lambda row: folder + images.at(row)  # noqa: E731

    def text_of(row, most=None):
        if not captions.at(row):
            raise InputError("no caption: there is no .txt of the image's name beside it")
        return files.read(folder + captions.at(row), most)

    read, together = captioned_files(lambda row, most=None: files.read(path_of(row), most), text_of)

    text_ahead = files.ahead(lambda row: folder + captions.at(row))
    return Source(
        size,
        read,
        lambda row: os.path.join(root, images[row]),
        captions=lambda: (),
        lost=lost,
        index=lambda: [*images.buffers(), *captions.buffers()],
        ahead=all_ahead([files.ahead(path_of), text_ahead]),
        text=Reading(lambda row: {"caption": from_python(text_of, row)}, text_ahead),
        together=None if remote else together,
    )


def _other_data(root: str, names: list[str]) -> str:
    """How to give the data of another kind that is in the folder, if there is some."""
    for name in names:
        if name.lower().endswith(".arrow"):
            return "; save its .arrow files as Parquet (in Python data.to_parquet('data.parquet')) and give that"
        if os.path.basename(name) in _ABOUT:
            continue
        if name.lower().endswith(tables.ENDINGS):
            return f"; give its table, {os.path.join(root, name)}"
        ending = name.rpartition(".")[2]
        if ending.lower() in SHARDS:
            return f"; give its shards, '{os.path.join(root, *['*'] * name.count('/'), f'*.{ending}')}'"
    return ""
