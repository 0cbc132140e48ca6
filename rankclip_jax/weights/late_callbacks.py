"""What TensorStore still says when one of its reads or writes has failed."""

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

_LATE = 0.5  # seconds; the other reads and writes call back within a fifth of that


@contextlib.contextmanager
def one_report() -> Iterator[None]:
    """Keeps off the console what the other reads or writes say, each with a stack, when the block has raised."""
    hook, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def not_orbax(record: logging.LogRecord) -> bool:  # a task whose error nobody took says so when it is collected
        return "never retrieved" not in record.msg or "orbax" not in record.getMessage()

    def without_late_callbacks(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = without_late_callbacks
    logger.addFilter(not_orbax)
    try:
        yield
    except Exception:
        time.sleep(_LATE)
        gc.collect()
        raise
    finally:
        logger.removeFilter(not_orbax)
        sys.unraisablehook = hook
