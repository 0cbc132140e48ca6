"""The user's own folder for what can be made again: indices, compiled programs, img2dataset's environment."""

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """XDG_CACHE_HOME or ~/.cache; where a user has no home, as in a container under a foreign number, the system's
    folder for temporary files."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path(tempfile.gettempdir())
