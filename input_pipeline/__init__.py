"""Turns image-caption data into batches of uint8 images and int32 tokens. The only package that uses TensorFlow."""
