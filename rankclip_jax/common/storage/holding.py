"""Ranges of files that are read before they are needed and kept while they are in use, local or not."""

import bisect
import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple

from rankclip_jax.common.errors import InputError
from rankclip_jax.common.storage.reading import MissingError, ReadAhead, read

_THREADS = 32  # requests at once: of blocks, whose bytes take longer than the latency
Range = tuple[str, int, int]  # path, begin, end


class _Kept(NamedTuple):
    future: Future
    users: set[Hashable]


class Held:
    """What `make` gives for ranges of files, made in the order of `hold`, by threads that end when all is made."""

    def __init__(self, make: Callable[[str, int, int], Any] = read):
        """`make`: (path, begin, end) -> a value; it may raise InputError."""
        self._make, self._kept = make, dict[Range, _Kept]()
        self._sorted = dict[str, list[tuple[int, int]]]()  # path -> (begin, end) of what is kept
        self._waiting, self._threads, self._lock = deque[tuple[Range, Future]](), 0, threading.Lock()

    def hold(self, wanted: Range, user: Hashable) -> None:
        """Starts to make a range, unless it is there, and keeps it until all its users have dropped it."""
        with self._lock:
            if wanted in self._kept:
                self._kept[wanted].users.add(user)
                return
            self._kept[wanted] = _Kept(Future(), {user})
            bisect.insort(self._sorted.setdefault(wanted[0], []), wanted[1:])
            self._waiting.append((wanted, self._kept[wanted].future))
            if self._threads < _THREADS:
                self._threads += 1
                threading.Thread(target=self._work, daemon=True).start()

    def drop(self, dropped: Range, user: Hashable) -> None:
        """Ends a use of a range, if there is one."""
        with self._lock:
            kept = self._kept.get(dropped)
            if kept:
                kept.users.discard(user)
                if not kept.users:
                    kept.future.cancel()
                    del self._kept[dropped]
                    self._sorted[dropped[0]].remove(dropped[1:])

    def around(self, path: str, begin: int, end: int) -> tuple[Any, int] | None:
        """(the value of a kept range that contains [begin:end], its own begin); waits for it. None: there is none.

        Raises InputError where `make` did.
        """
        with self._lock:
            ranges = self._sorted.get(path, [])
            at = bisect.bisect_right(ranges, (begin, float("inf"))) - 1
            if at < 0 or ranges[at][1] < end:
                return None
            first, future = ranges[at][0], self._kept[path, *ranges[at]].future
        try:
            return future.result(), first
        except CancelledError:  # dropped in the meantime
            return None

    def _work(self):
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                wanted, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._make(*wanted))
                except BaseException as error:
                    future.set_exception(error)


class HeldReads(ReadAhead):
    """Reads that are slices of held ranges, where these contain them.

    Attributes:
      held: the ranges.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = Held()

    def take(self, path: str, begin: int = 0, end: int | None = None) -> bytes:
        """As of ReadAhead."""
        self.check()
        try:
            found = end and self.held.around(path, begin, end)
        except MissingError:  # the file is shorter than it was: some of its rows may still be there
            found = None
        except InputError as error:
            self.failed = error
            raise
        if end and found:
            data, first = found
            return data[begin - first : end - first]
        return super().take(path, begin, end)
