"""The pictures nearest to a text: found in a file of embeddings, printed, drawn."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.files import whole
from rankclip_jax.inference.pictures import Pictures
from rankclip_jax.inference.store import Embeddings


def best(embeddings: Embeddings, z_txt_TxD: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices and cosines, (T, k), of the k = min(top, n) nearest rows, nearest first; ties in the file's order."""
    scores_TxN = z_txt_TxD @ embeddings.z.T
    found_TxK = np.argsort(-scores_TxN, axis=1, kind="stable")[:, :top]
    return found_TxK, np.take_along_axis(scores_TxN, found_TxK, axis=1)


def table(text: str, embeddings: Embeddings, found_K: np.ndarray, cosines_K: np.ndarray) -> str:
    """The matches of one text, a line each: rank, cosine, name."""
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
    """A PNG with a row of pictures for each text, nearest first, as the model sees them.

    Raises:
      InputError: a picture is no longer there.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows, columns = found_TxK.shape
    figure, axes_RxC = plt.subplots(
        rows, columns, figsize=(1.7 * columns, 2.3 * rows), squeeze=False, layout="constrained"
    )
    for row, text in enumerate(texts):
        for column, axes in enumerate(axes_RxC[row]):
            found = found_TxK[row, column]
            try:
                axes.imshow(view(pictures.image(int(embeddings.rows[found]))))
            except InputError as error:
                raise InputError(f"cannot draw {embeddings.names[found]}: {error}") from None
            name = embeddings.names[found].replace("\\", "/").rsplit("/", 1)[-1]
            axes.set_xlabel(f"{cosines_TxK[row, column]:.3f}\n{name[-24:]}", fontsize=8)
            axes.set(xticks=[], yticks=[])
        axes_RxC[row, 0].set_title(text, loc="left", fontsize=10)
    with whole(path) as part:
        figure.savefig(part, dpi=110, format=path.suffix[1:] or "png")
    plt.close(figure)
