import numpy as np
import pytest

from rankclip_jax.evaluation.zero_shot import ZeroShot, class_embeddings, zero_shot


def test_prompts_are_averaged_as_clip_does():
    rng = np.random.default_rng(0)
    table = {f"{t} {c}": rng.normal(size=5) for t in ("x", "y") for c in ("cat", "dog", "eel")}
    table = {prompt: (z / np.linalg.norm(z)).astype(np.float32) for prompt, z in table.items()}
    z = class_embeddings(lambda texts: np.stack([table[t] for t in texts]), ["cat", "dog", "eel"], ["x {}", "y {}"])
    for row, name in zip(z, ("cat", "dog", "eel"), strict=True):
        mean = (table[f"x {name}"] + table[f"y {name}"]) / 2
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), rtol=1e-6)


def test_results_of_known_embeddings():
    counter = ZeroShot(np.eye(4, dtype=np.float32))
    scores = np.array([[4, 3, 2, 1], [4, 3, 2, 1], [4, 3, 2, 1], [1, 2, 3, 4], [9, 0, 0, 0]], np.float32)
    counter.add(scores[:3], np.array([0, 1, 3]))
    counter.add(scores[3:], np.array([3, 0]))
    results = counter.results()
    # Ranks of the right class: 0, 1, 3, 0, 0.
    assert results == {"top1": 3 / 5, "top3": 4 / 5, "mean_per_class": pytest.approx((1 + 0 + 1 / 2) / 3), "n": 5}


def test_no_k_above_the_number_of_classes_and_ties_go_to_the_lower_class():
    counter = ZeroShot(np.ones((2, 3), np.float32))
    counter.add(np.ones((4, 3), np.float32), np.array([0, 0, 1, 1]))
    assert counter.results() == {"top1": 0.5, "mean_per_class": 0.5, "n": 4}


def test_masked_samples_do_not_count():
    batches = [
        {"image": np.eye(2, dtype=np.float32), "label": np.array([0, -1]), "mask": np.array([True, False])},
        {"image": np.eye(2, dtype=np.float32), "label": np.array([1, 1]), "mask": np.array([True, True])},
    ]
    results = zero_shot(lambda z: z, lambda texts: np.eye(2, dtype=np.float32), batches, ["a", "b"], ["{}"])
    assert results == {"top1": 2 / 3, "mean_per_class": pytest.approx((1 + 1 / 2) / 2), "n": 3}
