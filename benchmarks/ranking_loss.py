"""The ranking loss side by side: ours, plain JAX, rax, plain PyTorch, and PyTorch's ListMLE as `allrank` publishes it.

    python -m benchmarks.ranking_loss [--batches 256 1024 4096] [--rounds 5] [--limit_gb 12]

Each contender computes the four lists of RankCLIP from embeddings (D = 512), forward and backward to the
embeddings. Times: every contender lives in its own process and takes its turn, round after round, so that
whatever else the machine does slows all of them; medians are printed, from embeddings that are on the device to
gradients that are. Memory: how far the peak of that process rises above its size before the call, the largest of all
calls, compilation included; on a GPU, the peak of what its allocator holds there. Error: against float64, at three
logit scales. A contender that is not installed, or that would need more memory than --limit_gb, is named and left out.
It runs on the CPU where JAX_PLATFORMS does not say otherwise; benchmarks/gpu.py measures GPUs with the same parts.
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.ranking_contenders import CONTENDERS, D, embeddings
from rankclip_jax.common.errors import one_line

# Peak bytes per element of B x B, for the guard only: measured on a CPU at B = 2,048 and rounded up.
BYTES_PER_SCORE = {"plain JAX": 260, "rax": 400, "plain PyTorch": 160, "PyTorch allrank": 260}


def _memory_mb(field):
    """VmRSS (now) or VmHWM (peak) of this process; Linux only, as is resetting the peak below."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024


def _contend(name, pipe):
    """A process of its own: answers each request with (seconds, MB grown, value, gradients), or a line that says why
    not."""
    try:
        place, step, fetch, peak = CONTENDERS[name]()
        on_cpu = peak() is None
        if on_cpu:  # what libraries take at their first call is not the loss's
            step(*map(place, embeddings(8)), 1.0)
    except Exception as error:
        pipe.send(f"not installed ({error})" if isinstance(error, ImportError) else one_line(error, kind=True))
        return
    pipe.send("ready")
    while True:
        batch, scale, want_gradients, turn = pipe.recv()
        try:
            data = [place(z) for z in embeddings(batch)]
            if on_cpu:  # the peak starts again from here: making the data must not hide what the step takes
                Path("/proc/self/clear_refs").write_text("5")
                before = _memory_mb("VmRSS")
            calls, start = 0, time.perf_counter()
            while not calls or time.perf_counter() - start < turn:
                value, grads = step(*data, scale)
                calls += 1
            seconds = (time.perf_counter() - start) / calls
            grown = _memory_mb("VmHWM") - before if on_cpu else peak() / 2**20
            pipe.send((seconds, grown, float(value), [fetch(g) for g in grads] if want_gradients else None))
        except Exception as error:  # a GPU without enough memory, for one: the others still run
            pipe.send(one_line(error, kind=True))


class Contender:
    """A running process of one contender, killed where it does not answer by `end` (of time.monotonic())."""

    def __init__(self, name, end=float("inf")):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_contend, args=(name, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.end = end

    @functools.cached_property
    def state(self) -> str:
        """What it says first: that it is "ready", or why it is not."""
        return self._answer()

    def __call__(self, batch, scale=30.0, gradients=False, turn=0.0):
        """One call, or as many as fill `turn` seconds, whose mean time is given: what `_contend` answers."""
        with contextlib.suppress(BrokenPipeError):  # it died, which the answer says
            self.pipe.send((batch, scale, gradients, turn))
        return self._answer()

    def _answer(self):
        left = self.end - time.monotonic()
        try:
            if self.pipe.poll(None if left == float("inf") else max(0, left)):
                return self.pipe.recv()
        except (EOFError, ConnectionError):
            return "its process died"
        return "out of time"

    def close(self):
        self.process.kill()
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


def measure(batch, names, rounds, turn=0.0, end=float("inf")) -> dict:
    """{name: {"seconds": one of each round, "mb": peak}, or the line that says why not}, the contenders in turns."""
    running = {name: Contender(name, end) for name in names}
    found = {}
    for name, contender in running.items():
        first = contender(batch) if contender.state == "ready" else contender.state  # compiles too
        found[name] = first if isinstance(first, str) else {"seconds": [], "mb": first[1]}
    left = [name for name in names if not isinstance(found[name], str)]
    for _ in range(rounds):
        for name in list(left):
            got = running[name](batch, turn=turn)
            if isinstance(got, str):  # the rounds that it has stand
                left.remove(name)
                found[name] = found[name] if found[name]["seconds"] else got
                continue
            found[name]["seconds"].append(got[0])
            found[name]["mb"] = max(found[name]["mb"], got[1])
    for contender in running.values():
        contender.close()
    return found


def cell(found: dict | str) -> str:
    """Median and memory of what `measure` found of one contender."""
    return found if isinstance(found, str) else f"{statistics.median(found['seconds']):.3g} s, {found['mb']:,.0f} MB"


def speed(batches, rounds, limit_gb, names):
    print(f"\nForward and backward, D = {D}: seconds (median of {rounds}, interleaved) and peak memory\n")
    print("| B | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for batch in batches:
        found = measure(batch, [name for name in names if _fits(name, batch, limit_gb)], rounds)
        cells = [cell(found.get(name, f"over {limit_gb:g} GB")) for name in names]
        print(f"| {batch:,} | " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit_gb", type=float, default=12.0)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--accuracy_batch", type=int, default=512)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    print(f"{os.cpu_count()} cores; Python {sys.version.split()[0]}")
    exact = [name for name in args.contenders if name != "ours top-64"]  # that one is another loss
    accuracy(args.accuracy_batch, (14.0, 30.0, 100.0), exact)
    speed(args.batches, args.rounds, args.limit_gb, args.contenders)


if __name__ == "__main__":
    main()
