"""What a state can do, as numbers: zero-shot, retrieval, linear probe, rank agreement, geometry, gradients of terms."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
import scipy.stats

from rankclip_jax import losses, models
from rankclip_jax.common.tokenizer import Tokenizer
from rankclip_jax.evaluation.geometry import geometry
from rankclip_jax.evaluation.linear_probe import fit
from rankclip_jax.evaluation.retrieval import recalls, retrieval_ranks
from rankclip_jax.evaluation.zero_shot import ZeroShot, class_embeddings
from rankclip_jax.study.data import Labelled
from rankclip_jax.train import step as steps

_BATCH = 256
_term_gradients = jax.jit(losses.term_gradients)


class Embedder:
    """A state's towers over any number of pictures or texts, by two programs that serve all objectives."""

    def __init__(
        self,
        model: models.CLIP,
        tokenizer: Tokenizer,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """`model`: without a logit bias, which no tower needs. `mean`, `std`: config.data's, as it was trained."""
        self._embed, self._tokenizer = steps.make_embed_step(model, mean, std), tokenizer
        self._length = model.config.text.context_length

    def of(self, state: steps.TrainState) -> "Embedded":
        """The state's encoders."""
        towers = {key: value for key, value in state.params.items() if key != "logit_bias"}
        slim = steps.TrainState(state.step, towers, state.batch_stats, ())

        def encode(name, rows):
            parts = []
            for start in range(0, len(rows), _BATCH):
                some = rows[start : start + _BATCH]
                padded = np.concatenate([some, np.zeros((_BATCH - len(some), *some.shape[1:]), some.dtype)])
                parts.append(np.asarray(self._embed(slim, {name: padded}))[: len(some)])
            return np.concatenate(parts)

        return Embedded(
            images=lambda images: encode("image", images),
            texts=lambda texts: encode("tokens", self._tokenizer(texts, self._length)),
            scale=float(np.exp(state.params["logit_scale"])),
        )


class Embedded:
    """Encoders of one state: images(uint8 (N, S, S, 3)) and texts(N strings) -> float32 (N, D); scale of the logits."""

    def __init__(self, images: Callable, texts: Callable, scale: float):
        self.images, self.texts, self.scale = images, texts, scale


def zero_shot(model: Embedded, sets: dict[str, Labelled]) -> dict[str, float]:
    """{"zero_shot/NAME": top-1}."""
    known = {}
    return {
        f"zero_shot/{name}": _zero_shot(model, labelled, model.images(labelled.images), known)
        for name, labelled in sets.items()
    }


def labelled(model: Embedded, first: dict[str, Labelled], rest: dict[str, Labelled], l2: float) -> dict[str, float]:
    """On the rest of each labelled set: "zero_shot/NAME", and "linear_probe/NAME", learned from its first part.

    The probe is a logistic regression on image embeddings with one fixed penalty, the same for all.
    """
    known, result = {}, {}
    for name in rest:
        z_img_NxD = model.images(rest[name].images)
        result[f"zero_shot/{name}"] = _zero_shot(model, rest[name], z_img_NxD, known)
        weights, bias = fit(model.images(first[name].images), first[name].labels, len(first[name].names), l2)
        right_N = (z_img_NxD @ weights + bias).argmax(axis=1) == rest[name].labels
        result[f"linear_probe/{name}"] = float(right_N.mean())
    return result


def graded(model: Embedded, images_NxSxSx3: np.ndarray, captions: list[str], truth_NxN: np.ndarray) -> dict[str, float]:
    """Whether what is more alike lies nearer, where `truth_NxN`, how alike two pairs are, is known.

    truth/...: Spearman's correlation of a pair's similarities with the truth, over all others; the mean over the pairs.
    retrieval/ndcg10_...: also among the others, so finding its own caption is no merit; the gain is 2^n - 1, where
    n = 6 truth is the number of shared attributes.
    """
    z_img_NxD, z_txt_NxD = model.images(images_NxSxSx3), model.texts(captions)
    others = ~np.eye(len(captions), dtype=bool)
    truth = truth_NxN[others].reshape(len(captions), -1)
    found = {}
    for name, a, b in (
        ("image_image", z_img_NxD, z_img_NxD),
        ("text_text", z_txt_NxD, z_txt_NxD),
        ("image_text", z_img_NxD, z_txt_NxD),
        ("text_image", z_txt_NxD, z_img_NxD),
    ):
        scores = (a @ b.T)[others].reshape(truth.shape)
        found[f"truth/{name}"] = float(np.mean(_spearman(scores, truth)))
        if a is not b:
            direction = name.replace("_", "_to_")
            found[f"retrieval/ndcg10_{direction}"] = float(np.mean(_ndcg(scores, 2 ** (6 * truth) - 1, 10)))
    return found


def _spearman(a_NxM, b_NxM):
    """Of each row, ties by their mean rank."""
    a, b = (scipy.stats.rankdata(x, axis=1) for x in (a_NxM, b_NxM))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def _ndcg(scores_NxM, gains_NxM, k):
    """Sum of gain / log2(1 + position) over the first k, over the best possible."""
    k = min(k, gains_NxM.shape[1])
    discount = 1 / np.log2(np.arange(2, k + 2))
    best = np.take_along_axis(gains_NxM, np.argsort(-scores_NxM, axis=1, kind="stable")[:, :k], axis=1)
    ideal = -np.sort(-gains_NxM, axis=1)[:, :k]
    return best @ discount / (ideal @ discount)


def _zero_shot(model, labelled, z_img_NxD, known):
    counter = ZeroShot(class_embeddings(model.texts, labelled.names, labelled.templates, known))
    counter.add(z_img_NxD, labelled.labels)
    return counter.results()["top1"]


def pairs(model: Embedded, images_NxSxSx3: np.ndarray, captions: list[str]) -> dict[str, float]:
    """Of validation pairs: retrieval/..., geometry/... (losses.embedding_diagnostics) and gradient/...

    Equal captions are one text: an image is asked for its text among the different ones, and a text for any of the
    images that it describes.
    """
    z_img_NxD = model.images(images_NxSxSx3)
    texts, text_of_image_N = np.unique(captions, return_inverse=True)
    z_texts_UxD = model.texts(list(texts))
    z_txt_NxD = z_texts_UxD[text_of_image_N]
    # The roles are turned round: many images may have one text here.
    text_to_image_U, image_to_text_N = retrieval_ranks(z_texts_UxD, z_img_NxD, text_of_image_N)
    found = recalls(image_to_text_N, text_to_image_U)
    result = {f"retrieval/{key}": value for key, value in found.items() if key.endswith(("r1", "r5", "r10"))}
    result |= {f"geometry/{key}": value for key, value in geometry(z_img_NxD, z_txt_NxD).items() if key != "n"}
    gradients = _term_gradients(z_img_NxD, z_txt_NxD, model.scale)
    return result | {f"gradient/{key}": float(value) for key, value in gradients.items()}
