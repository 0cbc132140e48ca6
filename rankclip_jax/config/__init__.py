"""The configuration: every key once (keys); file, argument and command line merged over the defaults (load)."""

from rankclip_jax.config.load import complete, differences, load, override, stored, to_json

__all__ = ["complete", "differences", "load", "override", "stored", "to_json"]
