"""Searches a file of embeddings for the images nearest to a text; prints and draws them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase

from rankclip_jax import figures
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole
from rankclip_jax.figures.words import any_script
from rankclip_jax.inference.pictures import Pictures
from rankclip_jax.inference.store import Embeddings


def best(embeddings: Embeddings, z_txt_TxD: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and cosines, (T, k), of the k = min(top, n) nearest rows, nearest first; ties in file order."""
    scores_TxN = z_txt_TxD @ embeddings.z.T
    found_TxK = np.argsort(-scores_TxN, axis=1, kind="stable")[:, :top]
    return found_TxK, np.take_along_axis(scores_TxN, found_TxK, axis=1)


def table(text: str, embeddings: Embeddings, found_K: np.ndarray, cosines_K: np.ndarray) -> str:
    """The matches of one text, one line each: rank, cosine, name."""
    lines = [f'"{text}"']
    for rank, (i, cosine) in enumerate(zip(found_K, cosines_K, strict=True), 1):
        lines.append(f"{rank:5}  {cosine:7.4f}  {embeddings.names[i]}")
    return "\n".join(lines)


def draw(
    path: Path,
    texts: Sequence[str],
    embeddings: Embeddings,
    pictures: Pictures,
    found_TxK: np.ndarray,
    cosines_TxK: np.ndarray,
    view: Callable,
) -> None:
    """Draws a PNG, or what `path` ends in, with one row of images per text, nearest first, after the model's
    preprocessing.

    Raises:
      InputError: an image cannot be read any more, or there is no format of this name.
    """
    ending = path.suffix[1:].lower() or "png"
    if ending not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise InputError(f"cannot draw {path}: its name must end in one of {', '.join(known)}")
    images, notes = [], []
    for found_K, cosines_K in zip(found_TxK, cosines_TxK, strict=True):
        images.append([_image(embeddings, pictures, found, view) for found in found_K])
        names = (embeddings.names[found].replace("\\", "/").rsplit("/", 1)[-1] for found in found_K)
        notes.append([f"{cosine:.3f}\n{name[-24:]}" for cosine, name in zip(cosines_K, names, strict=True)])
    with whole(path) as part, any_script():
        figures.matches(texts, images, notes).savefig(part, format=ending)


def _image(embeddings, pictures, found, view):
    try:
        return view(pictures.image(int(embeddings.rows[found])))
    except InputError as error:
        raise InputError(f"cannot draw {embeddings.names[found]}: {error}") from None
