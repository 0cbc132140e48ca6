"""A line about work that lasts: how far, how fast, how long still."""

import sys
import time

QUIET_SECONDS = 2.0  # work that ends sooner prints nothing


class Progress:
    """`with Progress("images", total) as progress: ...; progress.add(n)`, on stderr.

    On a terminal the line is rewritten twice a second, elsewhere a new one comes every ten.
    """

    def __init__(self, noun: str, total: int | None = None):
        """`total` None: not known beforehand, so no time left is printed."""
        self._noun, self._total, self._done = noun, total, 0
        self._start = self._printed = time.monotonic()
        self._terminal, self._shown = sys.stderr.isatty(), 0

    def __enter__(self) -> "Progress":
        return self

    def add(self, count: int) -> None:
        """Notes that `count` more are done."""
        self._done += count
        now = time.monotonic()
        if now - self._start >= QUIET_SECONDS and now - self._printed >= (0.5 if self._terminal else 10):
            self._printed = now
            self._print(end="\r" if self._terminal else "\n")

    def __exit__(self, *_) -> None:
        if self._shown and (self._terminal or self._shown != self._done):  # leave the last line complete
            self._print(end="\n")

    def _print(self, end: str) -> None:
        self._shown = self._done
        rate = self._done / (time.monotonic() - self._start)
        of = "" if self._total is None else f"/{self._total:,}"
        line = f"{self._done:,}{of} {self._noun}  {rate:,.1f} {self._noun}/s"
        if self._total is not None and rate:
            left = round((self._total - self._done) / rate)
            line += f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        print(f"{line:<79}", end=end, file=sys.stderr, flush=True)
