"""The ranking loss side by side: ours, plain JAX, rax, and ListMLE in PyTorch as `allrank` publishes it.

    python -m benchmarks.ranking_loss [--batches 256 1024 4096] [--rounds 5] [--limit_gb 12]

Each contender computes the four lists of RankCLIP from embeddings (D = 512), forward and backward to the
embeddings. Times: every contender lives in its own process and takes its turn, round after round, so that
whatever else the machine does falls on all alike; medians are printed. Memory: how far the peak of that process
rises above its size before the call, the largest of all calls, compilation included. Error: against float64,
at three logit scales.
A contender that is not installed, or that would need more memory than --limit_gb, is named and left out.
"""

import argparse
import importlib.util
import multiprocessing
import os
import statistics
import sys
import time
import types

import numpy as np

D = 512
NAMES = ("ours", "ours top-64", "plain JAX", "rax", "PyTorch allrank")
# Peak bytes per element of B x B, for the guard only: measured at B = 2,048 and rounded up.
BYTES_PER_SCORE = {"plain JAX": 260, "rax": 400, "PyTorch allrank": 260}


def embeddings(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs as a trained model has them: the text is half its image, half its own."""
    rng = np.random.default_rng(0)
    img, noise = rng.normal(size=(2, batch, D))
    return tuple((z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32) for z in (img, img + noise))


def _jax_step(terms):
    import jax

    step = jax.jit(jax.value_and_grad(terms, (0, 1)))
    return lambda img, txt, scale: jax.block_until_ready(step(img, txt, scale))


def _four_lists(nll_sum):
    """The sum of both terms from a function (scores, reference) -> summed loss, in JAX or PyTorch."""

    def terms(img, txt, scale):
        ii, tt, it = scale * img @ img.T, scale * txt @ txt.T, scale * img @ txt.T
        pairs = ((ii, tt), (tt, ii), (it, it.T), (it.T, it))
        return sum(nll_sum(a, b) for a, b in pairs) / (2 * len(img) ** 2)

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


def _torch():
    import torch

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
    terms = _four_lists(lambda a, b: list_mle(a, b) * len(a))

    def step(img, txt, scale):
        img, txt = (torch.from_numpy(np.array(z)).requires_grad_() for z in (img, txt))
        loss = terms(img, txt, scale)
        loss.backward()
        return loss.detach().numpy(), (img.grad.numpy(), txt.grad.numpy())

    return step


CONTENDERS = {
    "ours": _ours,
    "ours top-64": lambda: _ours(top_k=64),
    "plain JAX": _plain_jax,
    "rax": _rax,
    "PyTorch allrank": _torch,
}


def _memory_mb(field):
    """VmRSS (now) or VmHWM (peak) of this process; Linux only, as is resetting the peak below."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def _contend(name, pipe):
    """A process of its own: answers each batch size with (seconds, MB grown, value, gradients)."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        step = CONTENDERS[name]()
        step(*embeddings(8), 1.0)
    except ImportError as error:
        pipe.send(f"not installed ({error})")
        return
    pipe.send("ready")
    while (request := pipe.recv()) is not None:
        batch, scale, want_gradients = request
        data = embeddings(batch)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")  # the peak starts again from here: making the data must not hide what the step takes
        before = _memory_mb("VmRSS")
        start = time.perf_counter()
        value, grads = step(*data, scale)
        seconds = time.perf_counter() - start
        grads = [np.asarray(g) for g in grads] if want_gradients else None
        pipe.send((seconds, _memory_mb("VmHWM") - before, float(value), grads))


class Contender:
    """A running process of one contender."""

    def __init__(self, name):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_contend, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.state = self.pipe.recv()

    def __call__(self, batch, scale=30.0, gradients=False):
        self.pipe.send((batch, scale, gradients))
        return self.pipe.recv()

    def close(self):
        if self.state == "ready":
            self.pipe.send(None)
        self.process.join()


def float64_terms(img, txt, scale):
    """Value and gradients of both terms in float64 NumPy, for the errors."""
    img, txt = (z.astype(np.float64) for z in (img, txt))
    z, d, value, norm = {"i": img, "t": txt}, {"i": 0.0, "t": 0.0}, 0.0, 2 * len(img) ** 2
    for (a, b), (c, e) in (("ii", "tt"), ("tt", "ii"), ("it", "ti"), ("ti", "it")):
        scores, reference = scale * z[a] @ z[b].T, z[c] @ z[e].T
        order = np.argsort(-reference, axis=1, kind="stable")
        s = np.take_along_axis(scores, order, 1)
        lse = np.logaddexp.accumulate(s[:, ::-1], axis=1)[:, ::-1]
        value += (lse - s).sum() / norm
        grad = np.empty_like(s)
        np.put_along_axis(grad, order, np.exp(s + np.logaddexp.accumulate(-lse, axis=1)) - 1, 1)
        d[a] = d[a] + scale / norm * grad @ z[b]
        d[b] = d[b] + scale / norm * grad.T @ z[a]
    return value, d["i"], d["t"]


def _fits(name, batch, limit_gb):
    return BYTES_PER_SCORE.get(name, 0) * batch**2 < limit_gb * 2**30


def accuracy(batch, scales, names):
    img, txt = embeddings(batch)
    print(f"\nRelative error against float64, B = {batch:,} (value / gradient)\n")
    print("| | " + " | ".join(f"scale {s:g}" for s in scales) + " |\n|---|" + "---|" * len(scales))
    truth = {scale: float64_terms(img, txt, scale) for scale in scales}
    for name in names:
        contender = Contender(name)
        cells = []
        for scale in scales if contender.state == "ready" else ():
            _, _, value, grads = contender(batch, scale, gradients=True)
            want, *want_grads = truth[scale]
            got, want_grad = np.stack(grads), np.stack(want_grads)
            error = np.linalg.norm(got - want_grad) / np.linalg.norm(want_grad)
            cells.append(f"{abs(value - want) / want:.0e} / {error:.0e}")
        print(f"| {name} | " + " | ".join(cells or [contender.state]) + " |", flush=True)
        contender.close()


def speed(batches, rounds, limit_gb, names):
    print(f"\nForward and backward, D = {D}: seconds (median of {rounds}, interleaved) and peak memory\n")
    print("| B | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for batch in batches:
        running = {name: Contender(name) for name in names if _fits(name, batch, limit_gb)}
        running_ready = {name: c for name, c in running.items() if c.state == "ready"}
        grown = {name: c(batch)[1] for name, c in running_ready.items()}  # compiles too
        seconds = {name: [] for name in running_ready}
        for _ in range(rounds):
            for name, contender in running_ready.items():
                elapsed, more, *_ = contender(batch)
                seconds[name].append(elapsed)
                grown[name] = max(grown[name], more)
        cells = []
        for name in names:
            if name in seconds:
                cells.append(f"{statistics.median(seconds[name]):.3g} s, {grown[name]:,.0f} MB")
            else:
                cells.append(running[name].state if name in running else f"over {limit_gb:g} GB")
        print(f"| {batch:,} | " + " | ".join(cells) + " |", flush=True)
        for contender in running.values():
            contender.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit_gb", type=float, default=12.0)
    parser.add_argument("--contenders", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--accuracy_batch", type=int, default=512)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores; Python {sys.version.split()[0]}")
    exact = [name for name in args.contenders if name != "ours top-64"]  # that one is another loss
    accuracy(args.accuracy_batch, (14.0, 30.0, 100.0), exact)
    speed(args.batches, args.rounds, args.limit_gb, args.contenders)


if __name__ == "__main__":
    main()
