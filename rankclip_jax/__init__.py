"""RankCLIP in JAX: contrastive image-text pretraining with ranking consistency."""

from typing import Any


def __getattr__(name: str) -> Any:
    # `rankclip_jax.load` without importing JAX and Flax for whoever only wants one of the rooms.
    if name == "load":
        from rankclip_jax.inference.model import load

        return load
    raise AttributeError(f"module 'rankclip_jax' has no attribute {name!r}")
