"""Inference: encoding images and texts (model), embedding and searching collections of images."""
