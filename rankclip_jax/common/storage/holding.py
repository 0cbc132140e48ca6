"""What is made of bytes before it is needed, and kept while it is in use."""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import CancelledError, Future
from typing import Any, NamedTuple

_THREADS = 32  # requests at once: of blocks, whose bytes take longer than the latency


class _Kept(NamedTuple):
    future: Future
    users: set[Hashable]


class Held:
    """Values by number, made in the order of `hold`, by threads that end when all is made."""

    def __init__(self, make: Callable[[int], Any]):
        """`make`: number -> its value."""
        self._make, self._kept = make, dict[int, _Kept]()
        self._waiting, self._threads, self._lock = deque[tuple[int, Future]](), 0, threading.Lock()

    def hold(self, number: int, user: Hashable) -> None:
        """Starts to make a value, unless it is there, and keeps it until all its users have dropped it."""
        with self._lock:
            if number in self._kept:
                self._kept[number].users.add(user)
                return
            self._kept[number] = _Kept(Future(), {user})
            self._waiting.append((number, self._kept[number].future))
            if self._threads < _THREADS:
                self._threads += 1
                threading.Thread(target=self._work, daemon=True).start()

    def drop(self, number: int, user: Hashable) -> None:
        """Ends a use of a value, if there is one."""
        with self._lock:
            kept = self._kept.get(number)
            if kept:
                kept.users.discard(user)
                if not kept.users:
                    kept.future.cancel()
                    del self._kept[number]

    def get(self, number: int) -> Any:
        """The value, once it is made; None: nobody holds it. Raises what `make` raised."""
        with self._lock:
            kept = self._kept.get(number)
        try:
            return kept and kept.future.result()
        except CancelledError:  # dropped in the meantime
            return None

    def _work(self):
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                number, future = self._waiting.popleft()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._make(number))
                except BaseException as error:
                    future.set_exception(error)
