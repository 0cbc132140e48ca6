"""Weights in and out: OpenAI and RankCLIP `.pt`, open_clip, Hugging Face. No PyTorch needed."""

from rankclip_jax.interop.orbax_folder import write_orbax
from rankclip_jax.interop.weights import read, write_hf, write_openai

__all__ = ["read", "write_hf", "write_openai", "write_orbax"]
