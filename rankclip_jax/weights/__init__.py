"""Weights as we and others keep them: layouts, checkpoints, and a model from any path (pretrained)."""
