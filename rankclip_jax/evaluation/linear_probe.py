"""Linear probe: logistic regression on the frozen image tower's embeddings, by L-BFGS, as CLIP's paper does it.

The strength of the L2 penalty is swept on a validation split as in Radford et al. (2021, appendix A.3): seven strengths
from 1e-6 to 1e6, then the interval around the best is halved until there are 8 steps a decade. The last fit is on
training and validation images together. Features are the unit embeddings; the paper takes a ViT's features before
the projection, so its figures are somewhat higher.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

METRICS = ("top1", "mean_per_class")
MAX_ITERATIONS = 1000
_STEPS_A_DECADE, _LOW, _HIGH = 8, -6, 6
_VALIDATION_SHARE = 0.1


def fit(features_NxD: np.ndarray, labels_N: np.ndarray, classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, C) and bias (C,), float32, that minimise sum of cross-entropies + l2 / 2 |weights|^2.

    The same objective as scikit-learn's LogisticRegression with C = 1 / l2; the bias is free.
    """
    x_NxD, labels_N = jnp.asarray(features_NxD, jnp.float32), jnp.asarray(labels_N)
    shape = x_NxD.shape[1] + 1, classes  # the bias is the last row

    def value_and_grad(flat):
        value, grad = _objective(jnp.asarray(flat, jnp.float32).reshape(shape), x_NxD, labels_N, l2)
        return float(value), np.asarray(grad, np.float64).ravel()

    options = {"maxiter": MAX_ITERATIONS, "gtol": 1e-5}  # of the mean objective; scikit-learn stops at 1e-4
    found = scipy.optimize.minimize(
        value_and_grad, np.zeros(np.prod(shape)), jac=True, method="L-BFGS-B", options=options
    )
    params = found.x.reshape(shape).astype(np.float32)
    return params[:-1], params[-1]


@jax.jit
@jax.value_and_grad
def _objective(params_D1xC, x_NxD, labels_N, l2):
    weights, bias = params_D1xC[:-1], params_D1xC[-1]
    logits_NxC = jnp.dot(x_NxD, weights, precision="highest") + bias
    loss = optax.softmax_cross_entropy_with_integer_labels(logits_NxC, labels_N).sum()
    return (loss + l2 / 2 * jnp.vdot(weights, weights)) / len(x_NxD)


def sweep(score: Callable[[float], float]) -> tuple[float, list[tuple[float, float]]]:
    """The best L2 strength by `score`, and what was tried as (strength, score), in order of strength.

    The stronger penalty wins a tie.
    """
    scores: dict[int, float] = {}
    last = (_HIGH - _LOW) * _STEPS_A_DECADE
    strength = lambda i: 10.0 ** (_LOW + i / _STEPS_A_DECADE)  # noqa: E731
    grid, width = range(0, last + 1, 2 * _STEPS_A_DECADE), 2 * _STEPS_A_DECADE
    while True:
        for i in grid:
            if i not in scores:
                scores[i] = score(strength(i))
        best = max(scores, key=lambda i: (scores[i], i))
        if width == 1:
            return strength(best), [(strength(i), scores[i]) for i in sorted(scores)]
        width //= 2
        grid = [i for i in (best - width, best + width) if 0 <= i <= last]


def linear_probe(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    classes: int,
    metric: str = "top1",
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Accuracy of the probe on the test images.

    Args:
      train, test: (features float32 (N, D), labels int (N,)).
      classes: how many there are.
      metric: what the sweep maximises, one of METRICS.
      report: called with a line after each strength tried.

    Returns:
      top1, mean_per_class (over the classes that occur), l2 (the strength chosen), n (test images).

    Raises:
      ValueError: fewer than 10 training images, from which no validation split can be taken.
    """
    features_NxD, labels_N = train
    if len(labels_N) < 10:
        raise ValueError(f"a linear probe needs 10 training images at least, not {len(labels_N)}")
    order = np.random.default_rng(0).permutation(len(labels_N))
    held_out = max(1, int(_VALIDATION_SHARE * len(labels_N)))
    val, rest = order[:held_out], order[held_out:]
    on_device = jnp.asarray(features_NxD[rest], jnp.float32), jnp.asarray(labels_N[rest])  # moved there once

    def score(l2):
        value = _accuracy(fit(*on_device, classes, l2), features_NxD[val], labels_N[val])[metric]
        report(f"l2 {l2:.3g}: {metric} {100 * value:.2f} % on {held_out} validation images")
        return value

    l2, _ = sweep(score)
    return _accuracy(fit(features_NxD, labels_N, classes, l2), *test) | {"l2": l2, "n": len(test[1])}


def _accuracy(params, features_NxD, labels_N) -> dict[str, float]:
    weights, bias = params
    right_N = (features_NxD @ weights + bias).argmax(axis=1) == labels_N
    counts = np.bincount(labels_N)
    present = counts > 0
    per_class = np.bincount(labels_N, weights=right_N)[present] / counts[present]
    return {"top1": float(right_N.mean()), "mean_per_class": float(per_class.mean())}
