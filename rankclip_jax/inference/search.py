"""Searches a file of embeddings for the images nearest to a text; prints and draws them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from PIL import Image

from rankclip_jax import figures
from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole
from rankclip_jax.common.pictures import read, read_file, rgb
from rankclip_jax.figures.words import any_script, lines, printable
from rankclip_jax.inference.pictures import Pictures
from rankclip_jax.inference.store import Embeddings

_SIDE = 256  # pixels of a drawn picture, at most


def best(chunks: Iterable[Embeddings], z_txt_TxD: np.ndarray, top: int) -> tuple[Embeddings, np.ndarray, np.ndarray]:
    """The k = min(top, n) nearest images of each text, nearest first; ties in the order of the chunks.

    An image of several rows, as in a table with a row for each caption, counts once, with its first row. One chunk at
    a time is in memory.

    Returns:
      The matches; indices into them, and cosines, (T, k).
    """
    best_T: list[list[tuple[float, int, str]]] = [[] for _ in z_txt_TxD]
    for chunk in chunks:
        scores_TxN = z_txt_TxD @ chunk.z.T
        for text, order_N in enumerate(np.argsort(-scores_TxN, axis=1, kind="stable")):
            new = ((float(scores_TxN[text, i]), int(chunk.rows[i]), chunk.names[i]) for i in order_N)
            both = sorted([*best_T[text], *_first_of_each(new, top)], key=lambda match: -match[0])  # which is stable
            best_T[text] = _first_of_each(both, top)
    cosines_TxK = np.array([[cosine for cosine, _, _ in best] for best in best_T])
    matches = [match for best in best_T for match in best]
    found_TxK = np.arange(len(matches)).reshape(cosines_TxK.shape)
    rows, names = np.array([row for _, row, _ in matches], np.int64), [name for *_, name in matches]
    return Embeddings(np.zeros((len(matches), 0), np.float32), rows, names, {}), found_TxK, cosines_TxK


def _first_of_each(matches: Iterable[tuple[float, int, str]], top: int) -> list[tuple[float, int, str]]:
    """The first match of each name, of `top` names."""
    found: dict[str, tuple[float, int, str]] = {}
    for match in matches:
        found.setdefault(match[2], match)
        if len(found) == top:
            break
    return list(found.values())


def table(text: str, embeddings: Embeddings, found_K: np.ndarray, cosines_K: np.ndarray) -> str:
    """The matches of one text, one line each: rank, cosine, name."""
    lines = [f'"{printable(text)}"']
    for rank, (i, cosine) in enumerate(zip(found_K, cosines_K, strict=True), 1):
        lines.append(f"{rank:5}  {cosine:7.4f}  {printable(embeddings.names[i])}")
    return "\n".join(lines)


def draw(
    path: Path,
    texts: Sequence[str],
    embeddings: Embeddings,
    pictures: Pictures,
    found_TxK: np.ndarray,
    cosines_TxK: np.ndarray,
) -> None:
    """Draws a PNG, or what `path` ends in, with one row of images per query, nearest first, as they are in their files,
    with their captions.

    Raises:
      InputError: an image cannot be read any more, or there is no format of this name.
    """
    ending = path.suffix[1:].lower() or "png"
    if ending not in (known := FigureCanvasBase.get_supported_filetypes()):
        raise InputError(f"cannot draw {path}: its name must end in one of {', '.join(known)}")
    images, notes = [], []
    for found_K, cosines_K in zip(found_TxK, cosines_TxK, strict=True):
        images.append([_image(embeddings, pictures, found) for found in found_K])
        notes.append([
            _note(cosine, embeddings.names[found], pictures.caption(int(embeddings.rows[found])))
            for cosine, found in zip(cosines_K, found_K, strict=True)
        ])
    with whole(path) as part, any_script():
        figures.matches(texts, images, notes).savefig(part, format=ending)


def _note(cosine, name, caption):
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    return "\n".join([f"{cosine:.3f}", name[-24:], *lines(caption, 26, 3)])


def _image(embeddings, pictures, found):
    """The picture as uint8 (H, W, 3), of at most _SIDE pixels."""
    row, name = int(embeddings.rows[found]), embeddings.names[found]
    if row >= pictures.size or pictures.name(row) != name:
        raise InputError(f"cannot draw {name}: the collection has changed since it was embedded; embed it again")
    try:
        image = pictures.image(row)
        image = rgb(image) if isinstance(image, Image.Image) else read(read_file(image))
    except (InputError, OSError) as error:
        why = error if isinstance(error, InputError) else error.strerror
        raise InputError(f"cannot draw {name}: {why}") from None
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)
