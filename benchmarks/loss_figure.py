"""Draws docs/ranking_loss.png: the float32 form of the published loss and ours, against float64.

python -m benchmarks.loss_figure
"""

import pathlib

import jax
import numpy as np
from matplotlib.figure import Figure

from benchmarks.ranking_contenders import embeddings
from benchmarks.ranking_loss import float64_terms
from rankclip_jax.losses import rank_consistency

BATCH = 256


def published_form(img, txt, scale):
    """log(cumsum(exp(s - max)) + 1e-10) in float32, with autodiff: the formula that ListMLE code uses."""
    import jax.numpy as jnp

    def nll(scores, reference):
        order = jnp.argsort(jax.lax.stop_gradient(reference), axis=1, descending=True)
        s = jnp.take_along_axis(scores, order, axis=1)
        s = s - jnp.max(s, axis=1, keepdims=True)
        return jnp.sum(jnp.log(jnp.cumsum(jnp.exp(s)[:, ::-1], axis=1)[:, ::-1] + 1e-10) - s)

    ii, tt, it = scale * img @ img.T, scale * txt @ txt.T, scale * img @ txt.T
    return sum(nll(a, b) for a, b in ((ii, tt), (tt, ii), (it, it.T), (it.T, it))) / (2 * len(img) ** 2)


def main():
    img, txt = embeddings(BATCH)
    scales = np.geomspace(1, 100, 15)
    forms = {
        "published float32 form": jax.jit(jax.value_and_grad(published_form, (0, 1))),
        "this project, float32": jax.jit(jax.value_and_grad(lambda *a: sum(rank_consistency(*a)), (0, 1))),
    }
    figure = Figure(figsize=(8, 3), layout="tight")
    left, right = figure.subplots(1, 2)
    truth = [float64_terms(img, txt, scale) for scale in scales]
    for label, form in forms.items():
        errors, cosines = [], []
        for scale, (want, *want_grad) in zip(scales, truth, strict=True):
            value, grad = form(img, txt, np.float32(scale))
            got, true = np.stack(grad).astype(np.float64).ravel(), np.stack(want_grad).ravel()
            errors.append(abs(float(value) - want) / want)
            cosines.append(got @ true / np.linalg.norm(got) / np.linalg.norm(true))
            print(f"{label:24s} scale {scale:6.1f}  value error {errors[-1]:.1e}  gradient cosine {cosines[-1]:+.4f}")
        left.loglog(scales, np.maximum(errors, 1e-9), marker=".", label=label)
        right.semilogx(scales, cosines, marker=".", label=label)
    left.set(xlabel="logit scale", ylabel="relative error of the value")
    right.set(xlabel="logit scale", ylabel="cosine with the true gradient", ylim=(-1.05, 1.05))
    left.legend(fontsize=7)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(pathlib.Path(__file__).parent.parent / "docs" / "ranking_loss.png", dpi=90)


if __name__ == "__main__":
    main()
