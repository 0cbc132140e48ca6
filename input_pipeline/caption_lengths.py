"""How long captions are: a histogram for a terminal, and what packing them in rows of the text tower would save."""

from collections.abc import Mapping

import numpy as np

from rankclip_jax.common import packing

_BARS, _WIDTH, _CAPTIONS = 16, 40, 64


def histogram(counts: Mapping[int, int], unit: str) -> list[str]:
    """Lines of a histogram. counts: length -> captions; unit: "tokens" or "words"."""
    total, longest = sum(counts.values()), max(counts, default=0)
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, longest + 1) if longest // step < _BARS)
    bars = [0] * (longest // step + 1)
    for length, count in counts.items():
        bars[length // step] += count
    mean = sum(length * count for length, count in counts.items()) / max(total, 1)
    lines = [f"caption lengths in {unit}, {mean:.3g} on average"]
    for number in range(min(counts, default=0) // step, len(bars)):
        count = bars[number]
        first, last = number * step, number * step + step - 1
        span = f"{first}" if step == 1 else f"{first} to {last}"
        lines.append(f"{span:>14}  {count / total:>6.1%}  {'#' * round(_WIDTH * count / max(bars))}".rstrip())
    return lines


def packed(counts: Mapping[int, int], context_length: int) -> str:
    """One line: the rows that captions of so many tokens need, packed (config.model.pack_rows)."""
    lengths = np.repeat(*np.array(sorted(counts.items())).T)
    some = np.random.default_rng(0).choice(lengths, min(len(lengths), 4096), replace=False)
    rows = packing.rows_for(some, _CAPTIONS, 1, context_length)
    return (
        f"packed in rows of {context_length} tokens, {_CAPTIONS} captions take about {rows} rows: "
        f"config.model.pack_rows=({rows}, {_CAPTIONS})"
    )
