"""The user's own folder for what can be made again: indices, compiled programs, img2dataset's environment."""

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """XDG_CACHE_HOME or ~/.cache; of a user without a home, as in a job that runs under a foreign number, a folder of
    their own among the temporary ones."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        own = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
        strange = os.path.lexists(own) and own.lstat().st_uid != os.getuid()  # programs are run from there
        return own.with_name(f"{own.name}-{os.getpid()}") if strange else own
