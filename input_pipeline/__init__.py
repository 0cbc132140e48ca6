"""From image-caption data of any kind to batches of uint8 images and int32 tokens. The only home of TensorFlow."""
