"""Linear probe: logistic regression on the frozen image tower's embeddings, by L-BFGS, as in CLIP's paper.

Values and gradients are float64: with a strong penalty the improvements are below float32's resolution of the loss.

The L2 strength is swept on a validation split as in Radford et al. (2021, appendix A.3): seven strengths from 1e-6 to
1e6, then the interval around the best is halved until there are 8 steps a decade. The final fit uses training and
validation images together. Features are the unit embeddings; the paper uses a ViT's features before the projection,
so its figures are somewhat higher.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rankclip_jax.common.devices import host_device
from rankclip_jax.common.errors import InputError

METRICS = ("top1", "mean_per_class")
MAX_ITERATIONS = 1000
_STEPS_A_DECADE, _LOW, _HIGH = 8, -6, 6
_VALIDATION_SHARE = 0.1
_BLOCK = 2**20  # values of a block of rows in float64, 8 MiB


def fit(
    features_NxD: np.ndarray, labels_N: np.ndarray, classes: int, l2: float, device: jax.Device | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (D, C) and bias (C,), float32, that minimise sum of cross-entropies + l2 / 2 |weights|^2.

    This is the objective of scikit-learn's LogisticRegression with C = 1 / l2, also in float64. The bias is not
    penalised. `device`: where it runs, JAX's default if None; for a TPU, which has no float64 units, this host.
    """
    return _Rows(features_NxD, labels_N, classes, device).fit(l2)


class _Rows:
    """Training rows in blocks on the device, and their moments, shared by the fits at all strengths."""

    def __init__(self, features_NxD: np.ndarray, labels_N: np.ndarray, classes: int, device: jax.Device | None):
        (self._n, dim), self._classes = features_NxD.shape, classes
        size = max(1, _BLOCK // max(dim, classes))
        device = device or jax.local_devices()[0]
        self._device = host_device() if device.platform == "tpu" else device
        if self._device is None:
            why = "a linear probe needs float64, which a TPU has not, and JAX_PLATFORMS leaves out the CPU"
            raise InputError(f"{why}; set JAX_PLATFORMS=tpu,cpu")
        rows = np.asarray(features_NxD, np.float32), np.asarray(labels_N, np.int32)
        self._blocks = [
            jax.device_put([each[start : start + size] for each in rows], self._device)
            for start in range(0, self._n, size)
        ]
        with _float64_on(self._device):
            sum_D, squares_DxD = self._sum(_moments, (jnp.zeros(dim), jnp.zeros((dim, dim))))
            self._mean_D = sum_D / self._n
            self._covariance_DxD = squares_DxD / self._n - jnp.outer(self._mean_D, self._mean_D)

    def _sum(self, function, total, *arguments):
        for block in self._blocks:
            total = _add(function, total, *arguments, *block)
        return total

    def fit(self, l2: float) -> tuple[np.ndarray, np.ndarray]:
        """See the function `fit`.

        L-BFGS optimises V on centred features, with weights = P V and P P^T = (covariance / C + l2 / N)^-1, which is
        about the inverse of the initial Hessian. In V the Hessian is near 1, so tens of steps suffice instead of
        hundreds.
        """
        import scipy.optimize  # here: it takes a third of a second, and few runs have a probe

        with _float64_on(self._device):
            dim = len(self._mean_D)
            ridge = l2 / self._n + 1e-12 * jnp.trace(self._covariance_DxD)  # for features that do not vary
            hessian_DxD = self._covariance_DxD / self._classes + ridge * jnp.eye(dim)
            p_DxD = jnp.linalg.inv(jnp.linalg.cholesky(hessian_DxD)).T
            params = functools.partial(_params, p_DxD, self._mean_D)

            def value_and_grad(flat):
                params_D1xC, back = jax.vjp(params, flat.reshape(dim + 1, -1))
                value, grad_D1xC = self._sum(_cross_entropy, _penalty(params_D1xC, l2), params_D1xC)
                return float(value) / self._n, np.asarray(*back(grad_D1xC)).ravel() / self._n

            options = {"maxiter": MAX_ITERATIONS, "gtol": 3e-6, "ftol": 64 * np.finfo(np.float64).eps}
            start = np.zeros((dim + 1) * self._classes)
            found = scipy.optimize.minimize(value_and_grad, start, jac=True, method="L-BFGS-B", options=options)
            params_D1xC = np.asarray(params(found.x.reshape(dim + 1, -1)), np.float32)
        return params_D1xC[:-1], params_D1xC[-1]


@contextlib.contextmanager
def _float64_on(device):
    with jax.enable_x64(True), jax.default_device(device):
        yield


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(function, total, *arguments):
    return jax.tree.map(jnp.add, total, function(*arguments))


def _moments(x_RxD, labels_R):
    x_RxD = x_RxD.astype(jnp.float64)
    return x_RxD.sum(0), x_RxD.T @ x_RxD


@jax.jit
def _params(p_DxD, mean_D, v_D1xC):
    weights = p_DxD @ v_D1xC[:-1]
    return jnp.vstack([weights, v_D1xC.shape[1] ** 0.5 * v_D1xC[-1] - mean_D @ weights])  # the bias is the last row


@jax.jit
@jax.value_and_grad
def _penalty(params_D1xC, l2):
    return l2 / 2 * jnp.vdot(params_D1xC[:-1], params_D1xC[:-1])


@jax.value_and_grad
def _cross_entropy(params_D1xC, x_RxD, labels_R):
    logits_RxC = x_RxD.astype(jnp.float64) @ params_D1xC[:-1] + params_D1xC[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits_RxC, labels_R).sum()


def sweep(score: Callable[[float], float]) -> tuple[float, list[tuple[float, float]]]:
    """The best L2 strength by `score`, and every (strength, score) tried, in order of strength.

    Ties go to the stronger penalty.
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
    device: jax.Device | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Accuracy of the probe on the test images.

    Args:
      train, test: (features float32 (N, D), labels int (N,)).
      classes: number of classes.
      metric: maximised by the sweep, one of METRICS.
      device: as in `fit`.
      report: called with one line after each strength.

    Returns:
      top1, mean_per_class (over the classes that occur), l2 (the strength chosen), n (test images).

    Raises:
      ValueError: fewer than 10 training images, too few for a validation split.
    """
    features_NxD, labels_N = train
    if len(labels_N) < 10:
        raise ValueError(f"a linear probe needs at least 10 training images; got {len(labels_N)}")
    order = np.random.default_rng(0).permutation(len(labels_N))
    held_out = max(1, int(_VALIDATION_SHARE * len(labels_N)))
    val, rest = order[:held_out], order[held_out:]
    rows = _Rows(features_NxD[rest], labels_N[rest], classes, device)

    def score(l2):
        value = _accuracy(rows.fit(l2), features_NxD[val], labels_N[val])[metric]
        report(f"l2 {l2:.3g}: {metric} {100 * value:.2f} % on {held_out} validation images")
        return value

    l2, _ = sweep(score)
    return _accuracy(fit(features_NxD, labels_N, classes, l2, device), *test) | {"l2": l2, "n": len(test[1])}


def _accuracy(params: Any, features_NxD: np.ndarray, labels_N: np.ndarray) -> dict[str, float]:
    weights, bias = params
    right_N = (features_NxD @ weights + bias).argmax(axis=1) == labels_N
    counts = np.bincount(labels_N)
    present = counts > 0
    per_class = np.bincount(labels_N, weights=right_N)[present] / counts[present]
    return {"top1": float(right_N.mean()), "mean_per_class": float(per_class.mean())}
