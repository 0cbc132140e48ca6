"""Image-text retrieval: how often the right one is among the k nearest, both ways.

An image may have several captions: image-to-text counts a hit when any of its captions is among the k nearest texts,
as is usual for MSCOCO and Flickr30k; every caption is a query of its own in text-to-image.
"""

import numpy as np

TOP_K = (1, 5, 10)
# Float32 matrix products round differently by position, so scores this near count as equal. Among equals the right one
# is placed last: a model that cannot tell items apart is never credited for their order in the file.
TIE = 1e-6
_CHUNK = 1024  # rows of scores at a time: 25,000 of them would be half a gigabyte against 5,000 images


def retrieval_ranks(
    z_img_NxD: np.ndarray, z_txt_MxD: np.ndarray, image_of_text_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Places from 0 of the right answers: of each image's best caption (N,), and of each text's image (M,), int64.

    Args:
      z_img_NxD, z_txt_MxD: float32 of unit norm.
      image_of_text_M: int, the image that each text describes. Every image needs one text at least.

    Raises:
      ValueError: an image without a text, or a number that is no image's.
    """
    n, m = len(z_img_NxD), len(z_txt_MxD)
    if image_of_text_M.shape != (m,) or not np.array_equal(np.unique(image_of_text_M), np.arange(n)):
        raise ValueError(f"image_of_text must name each of {n} images for {m} texts")
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
    return ~(scores < right_Cx1 - TIE)  # written so that a score that is not a number counts against the model


def recalls(img2txt_N: np.ndarray, txt2img_M: np.ndarray) -> dict[str, float]:
    """image_to_text_r1, r5, r10 and text_to_image_r1 ... (no k above the number of candidates), images, texts."""
    n, m = len(img2txt_N), len(txt2img_M)
    result = {f"image_to_text_r{k}": float((img2txt_N < k).mean()) for k in TOP_K if k <= m}
    result |= {f"text_to_image_r{k}": float((txt2img_M < k).mean()) for k in TOP_K if k <= n}
    return result | {"images": n, "texts": m}


def nearest(z_query_D: np.ndarray, z_MxD: np.ndarray, k: int = 5) -> np.ndarray:
    """Numbers of the k nearest rows, best first, int64 (k,); the lower number first among equals."""
    return np.argsort(-(z_MxD @ z_query_D), kind="stable")[:k]
