"""A line about work that lasts, on stderr, by tqdm: how far, how fast, how long it will take."""

import sys

from tqdm import tqdm


def progress(what: str, total: int | None, *, unit: str = "images", done: int = 0) -> tqdm:
    """A tqdm bar: `with progress("prepare", 1000) as bar: ...; bar.update(n)` for n more.

    Work that ends within two seconds prints nothing. A terminal's line changes twice a second, a log's every ten.

    Args:
      what: what is being done.
      total: how many `unit` there are in all; None: not known beforehand.
      done: how many of them an earlier run did; they do not count towards the rate.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(
        desc=what,
        total=total,
        initial=done,
        unit=f" {unit}",
        delay=2,
        disable=sys.stderr is None,  # closed, as a service may have it
        mininterval=0.5 if terminal else 10,
        ncols=None if terminal else 79,
        dynamic_ncols=terminal,
    )
