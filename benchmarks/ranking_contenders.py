"""The contenders of benchmarks/ranking_loss.py: each computes the four lists of RankCLIP and their gradients."""

import functools
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

D = 512


@functools.lru_cache(1)
def embeddings(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs as a trained model has them: the text is half its image, half its own."""
    rng = np.random.default_rng(0)
    img, noise = rng.normal(size=(2, batch, D))
    return tuple((z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32) for z in (img, img + noise))


class Step(NamedTuple):
    """A contender. place(numpy array): onto the device. step(img, txt, scale) -> (value, two gradients), when they are
    done. fetch(gradient) -> numpy array. peak() -> bytes that a GPU's allocator held at most; None on a CPU."""

    place: Callable
    step: Callable
    fetch: Callable
    peak: Callable


def _jax_step(terms):
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")  # by default GPUs take TF32, PyTorch float32
    step = jax.jit(jax.value_and_grad(terms, (0, 1)))
    stats = jax.devices()[0].memory_stats
    return Step(
        jax.device_put,
        lambda *args: jax.block_until_ready(step(*args)),
        np.asarray,
        lambda: (stats() or {}).get("peak_bytes_in_use"),
    )


def _four_lists(nll_sum):
    """The sum of both terms from a function (scores, reference) -> summed loss, in JAX or PyTorch."""

    def terms(img, txt, scale):
        ii, tt, it = scale * img @ img.T, scale * txt @ txt.T, scale * img @ txt.T
        pairs = ((ii, tt), (tt, ii), (it, it.T), (it.T, it))
        return sum(nll_sum(a, b) for a, b in pairs) / (2.0 * len(img) ** 2)

    return terms


def _ours(**options):
    from rankclip_jax.losses import rank_consistency

    return _jax_step(lambda img, txt, scale: sum(rank_consistency(img, txt, scale, **options)))


def _plain_jax():
    import jax.numpy as jnp
    from jax import lax

    def nll(scores, reference):
        order = jnp.argsort(lax.stop_gradient(reference), axis=1, descending=True)
        scores = jnp.take_along_axis(scores, order, axis=1)
        return jnp.sum(lax.cumlogsumexp(scores, axis=1, reverse=True) - scores)

    return _jax_step(_four_lists(nll))


def _rax():
    import jax.numpy as jnp
    import rax
    from jax import lax

    return _jax_step(_four_lists(lambda a, b: rax.listmle_loss(a, lax.stop_gradient(b), reduce_fn=jnp.sum)))


def _torch_step(terms):
    import torch

    on_gpu = os.environ.get("JAX_PLATFORMS") != "cpu" and torch.cuda.is_available()

    def place(array):
        return torch.tensor(array, device="cuda" if on_gpu else "cpu", requires_grad=True)

    def step(img, txt, scale):
        img.grad = txt.grad = None
        loss = terms(img, txt, scale)
        loss.backward()
        return loss.item(), (img.grad, txt.grad)  # item() waits for the device

    def peak():
        return torch.cuda.max_memory_allocated() if on_gpu else None

    return Step(place, step, lambda grad: grad.cpu().numpy(), peak)


def _plain_torch():
    def nll(scores, reference):
        scores = scores.gather(1, reference.detach().argsort(dim=1, descending=True))
        return (scores.flip(1).logcumsumexp(1).flip(1) - scores).sum()

    return _torch_step(_four_lists(nll))


def _allrank():
    # allrank's package imports its data loaders, and with them torchvision, scikit-learn and more, none of
    # which ListMLE uses: empty modules stand in for those that are missing.
    class Nothing(types.ModuleType):
        __path__ = ()

        def __getattr__(self, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Nothing(name)

        def __call__(self, *_, **__):
            return self

    if importlib.util.find_spec("allrank") is None:
        raise ImportError("pip install --no-deps allrank")
    for name in (
        "pkg_resources",
        "torchvision",
        "torchvision.transforms",
        "sklearn",
        "sklearn.datasets",
        "gcsfs",
    ):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = Nothing(name)
    list_mle = importlib.import_module("allrank.models.losses.listMLE").listMLE
    return _torch_step(_four_lists(lambda a, b: list_mle(a, b) * len(a)))


CONTENDERS = {
    "ours": _ours,
    "ours top-64": lambda: _ours(top_k=64),
    "plain JAX": _plain_jax,
    "rax": _rax,
    "plain PyTorch": _plain_torch,
    "PyTorch allrank": _allrank,
}
