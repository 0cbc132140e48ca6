"""Models on the Hugging Face hub: which of a repository's files a model needs."""

import os
import re
from collections.abc import Collection
from pathlib import Path

from rankclip_jax.common import hub
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.tokenizer import SENTENCEPIECE, files_of_tokenizer
from rankclip_jax.weights import formats, orbax_folder, view

_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")


def locate(path: str | Path) -> Path:
    """`path` if it exists or cannot be a hub id; otherwise the folder of that model in the hub's cache.

    Fetches only what is needed, and no weights of a model that is not a CLIP. Raises InputError as `hub.fetch` does.
    """
    found = Path(os.path.expanduser(path))
    if found.exists() or not hub.is_id(str(path)):
        return found
    return hub.fetch(str(path), needed, _check)


def needed(names: Collection[str]) -> list[str]:
    """Those of a repository's files that a model needs: its weights, once, their config, preprocessing and tokenizer.

    Raises InputError if it has no weights of a layout that `formats.read` knows.
    """
    few = [name for name in _PREPROCESSING if name in names]
    few += files_of_tokenizer(names) or [name for name in names if name == SENTENCEPIECE]
    if orbax_folder.CONFIG in names:
        return [orbax_folder.CONFIG, *few, *(name for name in names if name.startswith(f"{orbax_folder.ARRAYS}/"))]
    weights = next((name for name in formats.WEIGHTS if name in names), None)
    if weights is None:
        raise InputError(f"no weights found. Expected one of {', '.join(formats.WEIGHTS)}")
    config = "open_clip_config.json" if weights.startswith("open_clip") else "config.json"
    parts = weights.removesuffix(".index.json").replace(".", r"-\d+-of-\d+\.")
    shards = [name for name in names if weights.endswith(".index.json") and re.fullmatch(parts, name)]
    return [name for name in (config,) if name in names] + few + [weights, *shards]


def _check(folder: Path) -> None:
    """Whether the texts in `folder` describe a CLIP. Raises InputError where they do not."""
    try:
        hugging_face = not (folder / "open_clip_config.json").exists()
        if config := formats.config_in(folder, hugging_face):
            view.of_folder(folder, config.vision)
    except ValueError as error:
        raise InputError(str(error)) from None
