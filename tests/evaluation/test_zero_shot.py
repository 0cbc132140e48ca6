"""Zero-shot classification against embeddings that are known."""

import numpy as np
import pytest

from rankclip_jax.evaluation.zero_shot import ZeroShot, class_embeddings


def table_of(classnames, templates, dim=5):
    rng = np.random.default_rng(0)
    table = {t.replace("{}", c): rng.normal(size=dim) for t in templates for c in classnames}
    return {prompt: (z / np.linalg.norm(z)).astype(np.float32) for prompt, z in table.items()}


def test_prompts_are_averaged_as_clip_does():
    table = table_of(("cat", "dog", "eel"), ("x {}", "y {}"))
    z = class_embeddings(lambda texts: np.stack([table[t] for t in texts]), ["cat", "dog", "eel"], ["x {}", "y {}"])
    for row, name in zip(z, ("cat", "dog", "eel"), strict=True):
        mean = (table[f"x {name}"] + table[f"y {name}"]) / 2
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-6)


def test_a_class_is_encoded_once_for_all_sets_that_share_its_prompts():
    table, asked, known = table_of(("cat", "dog", "eel"), ("x {}", "y {}")), [], {}

    def encode(texts):
        asked.extend(texts)
        return np.stack([table[t] for t in texts])

    first = class_embeddings(encode, ["cat", "dog", "cat"], ["x {}", "y {}"], known)
    again = class_embeddings(encode, ["dog", "eel"], ["x {}", "y {}"], known)
    assert sorted(asked) == sorted(table)
    np.testing.assert_array_equal(first[0], first[2])
    np.testing.assert_array_equal(first[1], again[0])
    class_embeddings(encode, ["cat"], ["x {}"], known)  # other prompts: another class embedding
    assert asked[-1] == "x cat"


def test_a_thousand_classes_of_eighty_prompts_are_encoded_in_bounded_pieces_once():
    asked = []

    def encode(texts):
        asked.append(len(texts))
        return np.full((len(texts), 2), 0.5, np.float32)

    z = class_embeddings(encode, [f"class {i}" for i in range(1000)], [f"prompt {i} {{}}" for i in range(80)])
    assert z.shape == (1000, 2) and sum(asked) == 80_000 and max(asked) <= 8192


def test_braces_and_format_codes_in_prompts_are_plain_text():
    asked = []
    class_embeddings(lambda texts: asked.extend(texts) or np.ones((len(texts), 2)), ["{0}"], ["{} {x.__class__}"])
    assert asked == ["{0} {x.__class__}"]


def test_results_of_known_embeddings():
    counter = ZeroShot(np.eye(4, dtype=np.float32))
    scores = np.array([[4, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1], [1, 2, 3, 4], [9, 0, 0, 0]], np.float32)
    counter.add(scores[:3], np.array([0, 1, 3]))
    counter.add(scores[3:], np.array([3, 0]))
    results = counter.results()
    # Ranks of the right class: 0, 1, 3, 0, 0.
    per_class = pytest.approx((1 + 0 + 1 / 2) / 3)
    assert results == {"top1": 3 / 5, "top3": 4 / 5, "mean_per_class": per_class, "n": 5, "classes": 4}
    np.testing.assert_array_equal(counter.confusion_CxC, [[2, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]])


def test_top_ten_of_twelve_classes_by_an_independent_sort():
    rng = np.random.default_rng(1)
    scores, labels = rng.normal(size=(200, 12)).astype(np.float32), rng.integers(12, size=200)
    counter = ZeroShot(np.eye(12, dtype=np.float32))
    counter.add(scores, labels)
    order = np.argsort(-scores.astype(np.float64), axis=1)
    for k in (1, 3, 5, 10):
        assert counter.results()[f"top{k}"] == np.mean([labels[i] in order[i, :k] for i in range(200)])


def test_no_k_above_the_number_of_classes_and_ties_go_to_the_lower_class():
    counter = ZeroShot(np.ones((2, 3), np.float32))
    counter.add(np.ones((4, 3), np.float32), np.array([0, 0, 1, 1]))
    assert counter.results() == {"top1": 0.5, "mean_per_class": 0.5, "n": 4, "classes": 2}


def test_embeddings_that_are_not_numbers_are_never_right():
    counter = ZeroShot(np.eye(3, dtype=np.float32))
    counter.add(np.full((2, 3), np.nan, np.float32), np.array([0, 1]))
    assert counter.results()["top1"] == 0


def test_nothing_to_count_is_an_error():
    with pytest.raises(ValueError, match="no readable image in this set"):
        ZeroShot(np.eye(3, dtype=np.float32)).results()
