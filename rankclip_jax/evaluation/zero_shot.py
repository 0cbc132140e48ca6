"""Zero-shot classification as in CLIP: the predicted class has the prompts nearest to the image."""

from collections.abc import Callable

import numpy as np

from rankclip_jax.common.progress import progress

TOP_K = (1, 3, 5, 10)
DEFAULT_TEMPLATES = ("a photo of a {}.",)  # of whoever gives none
_PROMPTS_AT_ONCE = 8192  # embeddings held before they are averaged


def class_embeddings(
    encode_texts: Callable[[list[str]], np.ndarray],
    classnames: list[str],
    templates: list[str],
    known: dict | None = None,
) -> np.ndarray:
    """(C, D) float32 of unit norm: a class is the normalised mean of its prompts' unit embeddings.

    Args:
      encode_texts: texts -> (n, D) of unit norm.
      classnames, templates: every name replaces the {} of every template.
      known: a cache between calls, filled here, so that ImageNet and its shifted sets are encoded once.
    """
    known = {} if known is None else known
    new = [name for name in dict.fromkeys(classnames) if (name, *templates) not in known]
    block = max(1, _PROMPTS_AT_ONCE // len(templates))
    with progress("encode prompts", len(new) * len(templates), unit="prompts") as bar:
        for start in range(0, len(new), block):
            names = new[start : start + block]
            # Not str.format: it would let a file's template access attributes of objects, and fail on a stray brace.
            z_PxD = encode_texts([template.replace("{}", name) for name in names for template in templates])
            z_CxD = np.asarray(z_PxD, np.float32).reshape(len(names), len(templates), -1).mean(axis=1)
            z_CxD /= np.linalg.norm(z_CxD, axis=-1, keepdims=True)
            known.update({(name, *templates): z for name, z in zip(names, z_CxD, strict=True)})
            bar.update(len(names) * len(templates))
    return np.stack([known[(name, *templates)] for name in classnames])


class ZeroShot:
    """Counts predictions over batches of image embeddings.

    Attributes:
      confusion_CxC: int64 (C, C), number of images by [label, predicted class].
    """

    def __init__(self, z_classes_CxD: np.ndarray):
        classes = len(z_classes_CxD)
        self._z_classes_CxD = z_classes_CxD
        self._rank_counts_CxC = np.zeros((classes, classes), np.int64)  # [label, rank of the right class]
        self.confusion_CxC = np.zeros((classes, classes), np.int64)

    def add(self, z_img_NxD: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
        """Adds images (N, D) with their labels (N,). Ties go to the lower class number.

        Returns:
          the predicted classes, int64 (N,).
        """
        scores_NxC = z_img_NxD @ self._z_classes_CxD.T
        own_N = np.take_along_axis(scores_NxC, labels_N[:, None], axis=1)
        earlier_NxC = np.arange(scores_NxC.shape[1]) < labels_N[:, None]
        # ~(<=) rather than >: a NaN score puts the right class last.
        rank_N = (~(scores_NxC <= own_N) | ((scores_NxC == own_N) & earlier_NxC)).sum(axis=1)
        rank_N = np.minimum(rank_N, scores_NxC.shape[1] - 1)
        np.add.at(self._rank_counts_CxC, (labels_N, rank_N), 1)
        predicted_N = scores_NxC.argmax(axis=1)
        np.add.at(self.confusion_CxC, (labels_N, predicted_N), 1)
        return predicted_N

    def results(self) -> dict[str, float]:
        """top1, top3, top5, top10 (no k above the number of classes), mean_per_class (over classes that occur); n, the
        images, and classes, as counts.

        Raises:
          ValueError: no image was added.
        """
        counts = self._rank_counts_CxC
        total, per_class = counts.sum(), counts.sum(axis=1)
        if not total:
            raise ValueError("no readable image in this set")
        present = per_class > 0
        result = {f"top{k}": float(counts[:, :k].sum() / total) for k in TOP_K if k <= len(counts)}
        result["mean_per_class"] = float((counts[present, 0] / per_class[present]).mean())
        return result | {"n": int(total), "classes": len(counts)}
