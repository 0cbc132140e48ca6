"""Image-text retrieval: recall at k in both directions.

An image may have several captions. As is usual for MSCOCO and Flickr30k, image-to-text counts a hit if any of them is
among the k nearest texts, and in text-to-image every caption is a separate query.
"""

import numpy as np

TOP_K = (1, 5, 10)
# Rounding of float32 matrix products depends on the position, so scores this close count as equal. Among equals the
# right item ranks last: a model that cannot distinguish items gets no credit for their order in the file.
TIE = 1e-6
_CHUNK = 1024  # rows of scores at a time; all 25,000 x 5,000 scores of MSCOCO would be half a gigabyte


def retrieval_ranks(
    z_img_NxD: np.ndarray, z_txt_MxD: np.ndarray, image_of_text_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, from 0, of the right answers: of each image's best caption (N,) and of each text's image (M,), int64.

    Args:
      z_img_NxD, z_txt_MxD: float32 of unit norm.
      image_of_text_M: int, the image of each text. Every image needs at least one text.

    Raises:
      ValueError: an image without a text, or a number outside 0 to N - 1.
    """
    n, m = len(z_img_NxD), len(z_txt_MxD)
    if image_of_text_M.shape != (m,) or not np.array_equal(np.unique(image_of_text_M), np.arange(n)):
        raise ValueError(f"image_of_text must assign one of {n} images to each of {m} texts and use every image")
    img2txt_N, txt2img_M = np.empty(n, np.int64), np.empty(m, np.int64)
    for start in range(0, m, _CHUNK):
        scores_CxN = z_txt_MxD[start : start + _CHUNK] @ z_img_NxD.T
        own_C = image_of_text_M[start : start + _CHUNK]
        right_Cx1 = np.take_along_axis(scores_CxN, own_C[:, None], axis=1)
        txt2img_M[start : start + _CHUNK] = _not_behind(scores_CxN, right_Cx1).sum(axis=1) - 1  # less itself
    for start in range(0, n, _CHUNK):
        scores_CxM = z_img_NxD[start : start + _CHUNK] @ z_txt_MxD.T
        own_CxM = image_of_text_M[None, :] == np.arange(start, min(start + _CHUNK, n))[:, None]
        right_Cx1 = np.where(own_CxM, scores_CxM, -np.inf).max(axis=1, keepdims=True)
        img2txt_N[start : start + _CHUNK] = (_not_behind(scores_CxM, right_Cx1) & ~own_CxM).sum(axis=1)
    return img2txt_N, txt2img_M


def _not_behind(scores, right_Cx1):
    return ~(scores < right_Cx1 - TIE)  # not >=: a NaN score must count against the model


def recalls(img2txt_N: np.ndarray, txt2img_M: np.ndarray) -> dict[str, float]:
    """image_to_text_r1, r5, r10 and text_to_image_r1 ... (no k above the number of candidates), images, texts."""
    n, m = len(img2txt_N), len(txt2img_M)
    result = {f"image_to_text_r{k}": float((img2txt_N < k).mean()) for k in TOP_K if k <= m}
    result |= {f"text_to_image_r{k}": float((txt2img_M < k).mean()) for k in TOP_K if k <= n}
    return result | {"images": n, "texts": m}


def nearest(z_query_D: np.ndarray, z_MxD: np.ndarray, k: int = 5) -> np.ndarray:
    """Indices of the k nearest rows, best first, int64 (k,); ties in order of the index."""
    return np.argsort(-(z_MxD @ z_query_D), kind="stable")[:k]
