"""The configuration: every key once (keys); file, argument and command line merged over the defaults (load)."""

from rankclip_jax.config.load import (
    complete,
    completed,
    differences,
    eval_set,
    load,
    network,
    override,
    to_json,
    with_stored,
)

__all__ = ["complete", "completed", "differences", "eval_set", "load", "network", "override", "to_json", "with_stored"]
