"""What TensorStore and Orbax still say when one of their reads or writes has failed."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

_LATE = 0.5  # seconds; the other reads and writes call back within a fifth of that


@contextlib.contextmanager
def one_report() -> Iterator[None]:
    """Keeps off the console what the other reads or writes say, each with a stack, when the block has raised."""
    hook = sys.unraisablehook

    def without_late_callbacks(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_late_callbacks
    try:
        yield
    except Exception:
        time.sleep(_LATE)
        raise
    finally:
        sys.unraisablehook = hook


def quiet_tasks() -> None:
    """Keeps off the console what Orbax's tasks say when they are collected, at any time, and nobody took their errors.

    For a command, whose error has told it.
    """
    logging.getLogger("asyncio").addFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "never retrieved" not in record.msg or "orbax" not in record.getMessage()
