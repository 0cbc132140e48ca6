"""Compiled programs are kept on the disk, so that a resumed run does not compile again."""

import os

import jax

from rankclip_jax.common.cache import user_cache


def enable(platform: str) -> None:
    """Turns JAX's persistent cache on, in ~/.cache/rankclip_jax/xla or JAX_COMPILATION_CACHE_DIR.

    For the whole process: a command's call, or a notebook's. `platform` is the mesh's: CPU programs stay out of it
    unless that variable is set. They hold what this machine's processor can, and a home folder may be shared by
    several; and those with a ranking loss sort in a callback, which cannot be stored.
    """
    if platform != "cpu" and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(user_cache() / "rankclip_jax" / "xla"))
