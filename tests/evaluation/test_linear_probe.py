"""The probe against scikit-learn's LogisticRegression in float64."""

import numpy as np
import pytest

from rankclip_jax.evaluation import linear_probe

CLASSES = 5


def blobs(n, seed, spread=0.5):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(CLASSES, 16)) * spread
    labels = rng.integers(CLASSES, size=n)
    x = centres[labels] + rng.normal(size=(n, 16))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("l2", [1e-3, 10.0, 1e4])
def test_weights_are_scikit_learns(l2):
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(400, 0)
    weights, bias = linear_probe.fit(x, y, CLASSES, l2)
    oracle = sklearn.LogisticRegression(C=1 / l2, tol=1e-10, max_iter=5000).fit(x.astype(np.float64), y)
    scale = np.abs(oracle.coef_).max()
    np.testing.assert_allclose(weights, oracle.coef_.T, atol=5e-3 * scale)
    np.testing.assert_allclose(bias - bias.mean(), oracle.intercept_ - oracle.intercept_.mean(), atol=5e-3)


def test_the_sweep_finds_the_peak_to_an_eighth_of_a_decade_in_few_tries():
    peak = 10 ** (-6 + 37 / 8)
    best, tried = linear_probe.sweep(lambda l2: -abs(np.log10(l2) - np.log10(peak)))
    assert best == pytest.approx(peak) and len(tried) <= 7 + 2 * 4
    assert [l2 for l2, _ in tried] == sorted(l2 for l2, _ in tried)
    assert {10.0**e for e in (-6, -4, -2, 0, 2, 4, 6)} <= {l2 for l2, _ in tried}


def test_among_equal_scores_the_sweep_takes_the_stronger_penalty():
    assert linear_probe.sweep(lambda l2: 1.0 if l2 <= 1 else 0.0)[0] == pytest.approx(1.0)


@pytest.mark.slow
def test_accuracy_of_the_whole_probe_is_that_of_scikit_learn_at_the_strength_it_chose():
    sklearn = pytest.importorskip("sklearn.linear_model")
    train, test, lines = blobs(300, 1), blobs(200, 2), []
    results = linear_probe.linear_probe(train, test, classes=CLASSES, report=lines.append)
    oracle = sklearn.LogisticRegression(C=1 / results["l2"], tol=1e-8, max_iter=5000).fit(*train)
    right = oracle.predict(test[0]) == test[1]
    assert results["n"] == 200 and abs(results["top1"] - right.mean()) <= 1 / 200
    per_class = np.mean([right[test[1] == c].mean() for c in range(CLASSES)])
    assert results["mean_per_class"] == pytest.approx(per_class, abs=0.02)
    assert len(lines) >= 7 and "validation images" in lines[0]


def test_too_few_images_for_a_validation_split():
    x, y = blobs(9, 0)
    with pytest.raises(ValueError, match="needs 10 training images at least, not 9"):
        linear_probe.linear_probe((x, y), (x, y), classes=CLASSES)
