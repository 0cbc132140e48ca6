"""All drawings, by matplotlib, once: for curves.png, notebooks and the report."""

from rankclip_jax.figures.drawings import choices, confusion, curves, gallery, similarities

__all__ = ["choices", "confusion", "curves", "gallery", "similarities"]
