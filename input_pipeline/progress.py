"""One line about a long loop: how far it is, how fast it goes, and how long it still takes."""

import sys
import time


class Progress:
    """Writes to stderr: in place on a terminal, elsewhere a new line every ten seconds.

    Use it as a context manager, so that the last line is the final count, also after an error.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, unit: str = "samples"):
        """`done`: how many of `total` an earlier run did; they count as progress but not towards the rate."""
        self._what, self._total, self._unit = what, total, unit
        self._first, self._done, self._note = done, done, ""
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._show("\n")

    def update(self, done: int, note: str = "") -> None:
        """`done` of the total are through; `note` is shown after the numbers."""
        self._done, self._note = done, note
        if time.monotonic() - self._shown > (0.5 if self._terminal else 10):
            self._show("" if self._terminal else "\n")

    def _show(self, end):
        self._shown = time.monotonic()
        new, seconds = self._done - self._first, self._shown - self._start
        text = line(self._what, self._done, self._total, self._unit, new, seconds)
        text += f" · {self._note}" if self._note else ""
        # \x1b[K clears what is left of a longer line before.
        print(f"\r{text}\x1b[K" if self._terminal else text, end=end, file=sys.stderr, flush=True)


def line(what: str, done: int, total: int, unit: str, new: int, seconds: float) -> str:
    """The text of a progress line; `new` is what was done in `seconds`."""
    text = f"{what}: {done:,} of {total:,} {unit}"
    if new and seconds > 0:
        rate = new / seconds
        text += f" · {rate:,.0f}/s" if rate >= 10 else f" · {rate:.2g}/s"
        text += f" · {duration((total - done) / rate)} left" if done < total else f" · {duration(seconds)}"
    return text


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 5 h 04 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600:,} h {seconds % 3600 // 60:02d} min"
