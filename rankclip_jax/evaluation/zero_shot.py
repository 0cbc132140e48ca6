"""Zero-shot classification as CLIP does it: an image's class is the one whose prompts lie nearest."""

from collections.abc import Callable, Iterable

import numpy as np

TOP_K = (1, 3, 5)
DEFAULT_TEMPLATES = ("a photo of a {}.",)


def class_embeddings(
    encode_texts: Callable[[list[str]], np.ndarray], classnames: list[str], templates: list[str]
) -> np.ndarray:
    """(C, D) float32 of unit norm: a class is the normalised mean of its prompts' unit embeddings.

    Args:
      encode_texts: texts -> (n, D) of unit norm.
      classnames, templates: every template, which holds one {}, is filled with every name.
    """
    prompts = [template.format(name) for name in classnames for template in templates]
    z_PxD = np.asarray(encode_texts(prompts), np.float32)
    z_CxD = z_PxD.reshape(len(classnames), len(templates), -1).mean(axis=1)
    return z_CxD / np.linalg.norm(z_CxD, axis=-1, keepdims=True)


class ZeroShot:
    """Adds up hits over batches of image embeddings."""

    def __init__(self, z_classes_CxD: np.ndarray):
        classes = len(z_classes_CxD)
        self._z_classes_CxD = z_classes_CxD
        self._rank_counts_CxC = np.zeros((classes, classes), np.int64)  # [label, rank of the right class]

    def add(self, z_img_NxD: np.ndarray, labels_N: np.ndarray) -> None:
        """Counts images with their labels. Among equal scores the lower class number comes first."""
        scores_NxC = z_img_NxD @ self._z_classes_CxD.T
        own_N = np.take_along_axis(scores_NxC, labels_N[:, None], axis=1)
        earlier_NxC = np.arange(scores_NxC.shape[1]) < labels_N[:, None]
        rank_N = ((scores_NxC > own_N) | ((scores_NxC == own_N) & earlier_NxC)).sum(axis=1)
        np.add.at(self._rank_counts_CxC, (labels_N, rank_N), 1)

    def results(self) -> dict[str, float]:
        """top1, top3, top5 (no k above the number of classes), mean_per_class over the classes that occur, n."""
        counts = self._rank_counts_CxC
        total, per_class = counts.sum(), counts.sum(axis=1)
        present = per_class > 0
        result = {f"top{k}": float(counts[:, :k].sum() / total) for k in TOP_K if k <= len(counts)}
        result["mean_per_class"] = float((counts[present, 0] / per_class[present]).mean())
        return result | {"n": int(total)}


def zero_shot(
    encode_images: Callable[[np.ndarray], np.ndarray],
    encode_texts: Callable[[list[str]], np.ndarray],
    batches: Iterable[dict],
    classnames: list[str],
    templates: list[str],
) -> dict[str, float]:
    """Results of a labelled set; `batches` as input_pipeline's eval_batches yields them."""
    counter = ZeroShot(class_embeddings(encode_texts, classnames, templates))
    for batch in batches:
        mask = batch["mask"]
        counter.add(encode_images(batch["image"])[mask], batch["label"][mask])
    return counter.results()
