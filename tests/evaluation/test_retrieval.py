"""Recalls against a plain sort in float64, and what is easily counted wrong: several captions, ties, few candidates."""

import numpy as np
import pytest

from rankclip_jax.evaluation import retrieval


def unit(rng, n, d=16):
    z = rng.normal(size=(n, d))
    return (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("n, captions", [(7, 1), (40, 5), (1500, 2)])  # 1500: more than a chunk
def test_ranks_are_those_of_a_full_sort(n, captions):
    rng = np.random.default_rng(n)
    image_of_text = rng.permutation(np.repeat(np.arange(n), captions))
    z_img, z_txt = unit(rng, n), unit(rng, n * captions)
    img2txt, txt2img = retrieval.retrieval_ranks(z_img, z_txt, image_of_text)
    scores = z_img.astype(np.float64) @ z_txt.astype(np.float64).T
    for i in range(0, n, 37):
        order = np.argsort(-scores[i])
        assert img2txt[i] == next(place for place, t in enumerate(order) if image_of_text[t] == i)
    for t in range(0, n * captions, 53):
        assert txt2img[t] == list(np.argsort(-scores[:, t])).index(image_of_text[t])


def test_any_of_an_images_captions_counts_and_the_others_do_not_push_it_down():
    z_img = np.eye(2, 3, dtype=np.float32)
    z_txt = np.array([[0.6, 0, 0.8], [0.8, 0, 0.6], [1, 0, 0], [0, 1, 0]], np.float32)
    img2txt, txt2img = retrieval.retrieval_ranks(z_img, z_txt, np.array([0, 0, 1, 1]))
    # Image 0's nearest text is image 1's (cosine 1), then its own at 0.8; its own at 0.6 does not matter.
    assert img2txt.tolist() == [1, 0] and txt2img.tolist() == [0, 0, 1, 0]
    assert retrieval.recalls(img2txt, txt2img) == {
        "image_to_text_r1": 0.5, "text_to_image_r1": 0.75, "images": 2, "texts": 4,
    }  # fmt: skip


def test_among_equals_the_right_one_is_last():
    z = np.ones((12, 1), np.float32)
    img2txt, txt2img = retrieval.retrieval_ranks(z, z, np.arange(12))
    assert img2txt.tolist() == txt2img.tolist() == [11] * 12
    assert all(value == 0 for key, value in retrieval.recalls(img2txt, txt2img).items() if "_r" in key)


def test_repeated_captions_are_ties_even_where_the_matrix_product_rounds_them_apart():
    rng = np.random.default_rng(0)
    z = unit(rng, 301, 67)
    captions = np.concatenate([z, z])  # every image's caption is that of another one, too
    images = np.concatenate([z, z])
    img2txt, txt2img = retrieval.retrieval_ranks(images, captions, np.arange(602))
    assert set(img2txt) == set(txt2img) == {1}


def test_no_k_above_the_candidates_and_nan_is_never_a_hit():
    z = np.full((3, 4), np.nan, np.float32)
    results = retrieval.recalls(*retrieval.retrieval_ranks(z, z, np.arange(3)))
    assert results == {"image_to_text_r1": 0.0, "text_to_image_r1": 0.0, "images": 3, "texts": 3}


@pytest.mark.parametrize("image_of_text", [[0, 0, 1], [0, 1, 3], [0, 1]])
def test_an_image_without_a_text_is_refused(image_of_text):
    with pytest.raises(ValueError, match="must assign one of 3 images to each"):
        retrieval.retrieval_ranks(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.array(image_of_text))


def test_nearest_are_the_best_first():
    z = np.array([[0.0, 1], [1, 0], [0.5, 0], [1, 0]])
    assert retrieval.nearest(np.array([1.0, 0]), z, 3).tolist() == [1, 3, 2]
