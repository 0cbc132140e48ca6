"""One sample: encoded bytes to a square uint8 image, by TensorFlow ops on the host."""

import tensorflow as tf


def decode(image) -> tf.Tensor:
    """JPEG, PNG, GIF (first frame) or BMP bytes -> uint8 (H, W, 3). A uint8 image passes through."""
    if image.dtype == tf.uint8:
        return image
    return tf.io.decode_image(image, channels=3, expand_animations=False)


def random_resized_crop(image_HxWx3, side: int, scale: tuple[float, float], seed_2) -> tf.Tensor:
    """A random window of `scale` of the area and an aspect ratio of 3/4 to 4/3, resized to (side, side, 3)."""
    begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.shape(image_HxWx3),
        tf.zeros((1, 0, 4)),
        seed=seed_2,
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=scale,
        use_image_if_no_bounding_boxes=True,
    )
    return _resize(tf.slice(image_HxWx3, begin, size), side, side)


def resize_centre_crop(image_HxWx3, side: int) -> tf.Tensor:
    """CLIP's evaluation view: the shorter side to `side`, then the central square."""
    shape = tf.shape(image_HxWx3)
    height, width = shape[0], shape[1]
    short = tf.minimum(height, width)
    # As torchvision: the long side is truncated to whole pixels, the crop's corner rounded.
    new_h, new_w = height * side // short, width * side // short
    resized = _resize(image_HxWx3, new_h, new_w)
    top = tf.cast(tf.round((new_h - side) / 2), tf.int32)
    left = tf.cast(tf.round((new_w - side) / 2), tf.int32)
    return tf.ensure_shape(resized[top : top + side, left : left + side], (side, side, 3))


def _resize(image_HxWx3, height, width):
    # Antialiased bicubic is what PIL does, and so what every published CLIP was trained and evaluated with.
    resized = tf.image.resize(image_HxWx3, (height, width), "bicubic", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)
