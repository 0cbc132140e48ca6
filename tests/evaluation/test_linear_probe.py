"""The probe against scikit-learn's LogisticRegression in float64."""

import jax
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


def cone(n, seed):
    """Unit features around one direction, as CLIP's are, with variances over four decades: more of them than rows."""
    centres = np.random.default_rng(9).normal(size=(CLASSES, 64))
    labels = np.random.default_rng(seed).integers(CLASSES, size=n)
    x = 3 + (centres[labels] + 2 * np.random.default_rng(seed).normal(size=(n, 64))) * np.logspace(0, -2, 64)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), labels


@pytest.mark.parametrize("l2", [1e-6, 1e-3, 1.0, 10.0, 100.0, 1e4, 1e6])
def test_weights_are_scikit_learns(l2):
    check_against_scikit_learn(*blobs(400, 0), l2)


@pytest.mark.parametrize(
    ("n", "l2"), [(50, 1e-2), (50, 1e2), pytest.param(1000, 1e-3, marks=pytest.mark.slow), (1000, 1.0), (1000, 1e4)]
)
def test_weights_are_scikit_learns_where_features_vary_little_or_outnumber_the_rows(n, l2, monkeypatch):
    monkeypatch.setattr(linear_probe, "_BLOCK", 64 * 300)  # blocks of 300 rows, the last one shorter
    check_against_scikit_learn(*cone(n, 0), l2)


def check_against_scikit_learn(x, y, l2):
    sklearn = pytest.importorskip("sklearn.linear_model")
    weights, bias = linear_probe.fit(x, y, CLASSES, l2)
    mean = x.mean(0, dtype=np.float64)  # centred, the weights are the same and its L-BFGS gets there
    oracle = sklearn.LogisticRegression(C=1 / l2, tol=1e-12, max_iter=50_000).fit(x - mean, y)
    np.testing.assert_allclose(weights, oracle.coef_.T, atol=1e-4 * np.abs(oracle.coef_).max())
    intercept = bias + mean @ weights
    np.testing.assert_allclose(intercept - intercept.mean(), oracle.intercept_ - oracle.intercept_.mean(), atol=1e-3)
    assert weights.dtype == bias.dtype == np.float32 and not jax.config.jax_enable_x64


def test_it_runs_on_the_device_it_is_given():
    rows = linear_probe._Rows(*blobs(40, 0), CLASSES, jax.devices()[3])
    assert {block.device for pair in rows._blocks for block in pair} == {jax.devices()[3]}
    assert rows._covariance_DxD.device == jax.devices()[3]


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
    oracle = sklearn.LogisticRegression(C=1 / results["l2"], tol=1e-8, max_iter=5000)
    oracle.fit(train[0].astype(np.float64), train[1])
    right = oracle.predict(test[0]) == test[1]
    assert results["n"] == 200 and results["top1"] == pytest.approx(right.mean())
    per_class = np.mean([right[test[1] == c].mean() for c in range(CLASSES)])
    assert results["mean_per_class"] == pytest.approx(per_class)
    assert len(lines) >= 7 and "validation images" in lines[0]


def test_too_few_images_for_a_validation_split():
    x, y = blobs(9, 0)
    with pytest.raises(ValueError, match="needs at least 10 training images; got 9"):
        linear_probe.linear_probe((x, y), (x, y), classes=CLASSES)
