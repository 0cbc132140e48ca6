"""Windows of images for training and evaluation, and the two ways to resize them to the model's size.

On the device (images.py): the image, or the part that its windows need, is placed at the top left of a canvas of one
size for all, and is sent with its size and windows. On the host: the window is resized here.

A window is (top, left, height, width) in pixels, float32, as for PIL's `resize(box=...)`: pixels just outside
contribute at its border, except beyond the image.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from PIL import Image

from input_pipeline.decode import (
    decode,
    has_few_scans,
    is_jpeg,
    is_large,
    jpeg,
    jpeg_at_once,
    jpeg_shape,
    jpeg_size,
)
from input_pipeline.graph import apart, as_written, once
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import pictures

_LOG_ASPECT = math.log(4 / 3)
_TRIES = 10
_REGISTER = 16  # float32 numbers, of the widest


def window_numbers(seed_2: tf.Tensor, count: int = 1) -> tf.Tensor:
    """What the windows of one image are made of: float32 (4, count, 11) in [0, 1), of a seed, int64."""
    # The numbers of tf.random.stateless_uniform(alg="philox"), by one operation instead of twenty.
    return tf.raw_ops.StatelessRandomUniform(shape=(4, count, _TRIES + 1), seed=seed_2)


@once
def windows(numbers_Bx4xVxT: tf.Tensor, size_Bx2: tf.Tensor, scale: tuple[float, float]) -> tf.Tensor:
    """Windows (B, V, 4) for random resized crops of B images: whole pixels inside the image, uniformly placed.

    As torchvision's RandomResizedCrop: the share of the area is uniform in `scale`, the aspect ratio log-uniform in 3/4
    to 4/3. If ten draws do not fit, the largest central window of an allowed ratio is used.

    Args:
      numbers_Bx4xVxT: `window_numbers` of each.
      size_Bx2: int32, height and width of each.
    """
    # TensorFlow's exp rounds the last few numbers of a tensor differently than those that fill a vector register.
    uniform = tf.pad(numbers_Bx4xVxT, [[0, 0], [0, 0], [0, 0], [0, -(_TRIES + 1) % _REGISTER]])
    limit = tf.cast(size_Bx2, tf.float32)[:, :, None, None]
    side = tf.sqrt((scale[0] + (scale[1] - scale[0]) * uniform[:, 0]) * tf.reduce_prod(limit, axis=1))
    stretch = tf.exp(_LOG_ASPECT * (uniform[:, 1] - 0.5))  # the root of width / height
    drawn = tf.stack([side / stretch, side * stretch], axis=1)
    central = tf.minimum(limit, limit[:, ::-1] * 4 / 3)  # always fits, and comes last
    places = tf.range(uniform.shape[-1])
    sizes = tf.maximum(tf.round(tf.where(places < _TRIES, drawn, central)), 1)
    first = tf.argmax(tf.reduce_all(sizes <= limit, axis=1), axis=-1, output_type=tf.int32)[:, None]
    size = tf.reduce_sum(tf.where(places == first[..., None], sizes, 0), axis=-1)
    room = limit[..., 0] - size
    corner = tf.floor(tf.where(first < _TRIES, uniform[:, 2:, :, 0] * (room + 1), room / 2))
    return tf.transpose(tf.concat([corner, size], axis=1), (0, 2, 1))


def centre_window(size_2: tf.Tensor, side: int) -> tf.Tensor:
    """The window (1, 4) of CLIP's evaluation view: the shorter side resized to `side`, then the central square.

    As `pictures.centre`.
    """
    size_2 = tf.cast(size_2, tf.int64)
    resized = size_2 * side // tf.reduce_min(size_2)
    corner = (resized - side) // 2
    step = tf.cast(size_2, tf.float32) / tf.cast(resized, tf.float32)
    return tf.concat([tf.cast(corner, tf.float32) * step, side * step], axis=0)[None]


def whole_window(size_2: tf.Tensor) -> tf.Tensor:
    """The window (1, 4) of SigLIP's evaluation view: the image, whatever its ratio. As `pictures.squashed`."""
    return tf.concat([[0.0, 0.0], tf.cast(size_2, tf.float32)], axis=0)[None]


def training_view(
    image: tf.Tensor,
    numbers_4xVxT: tf.Tensor,
    scale: tuple[float, float],
    *,
    side: int,
    canvas: int | None,
    recover: bool = False,
) -> dict[str, tf.Tensor]:
    """As `view`, with random windows.

    Where a JPEG fits the canvas, its "windows" are zeros, for `windows` of the batch: each operation takes some
    microseconds, for one image as for a batch.

    Args:
      numbers_4xVxT: `window_numbers` of the image.
      scale: as of `windows`.
    """

    def drawn(size_2):
        return windows(numbers_4xVxT[None], tf.convert_to_tensor(size_2)[None], scale)[0]

    def any_picture():
        return view(image, drawn, side=side, canvas=canvas, exact=False, recover=recover)

    if canvas is None or image.dtype == tf.uint8:
        return any_picture()
    shape_3 = jpeg_shape(image)
    fits = tf.reduce_all((shape_3 > 0) & (shape_3 <= [canvas, canvas, 3])) & has_few_scans(image, shape_3[:2])

    def whole():
        pixels = tf.ensure_shape(jpeg_at_once(image, recover=recover), (None, None, 3))  # a canvas is never large
        return {"image": pixels, "size": shape_3[:2], "windows": tf.zeros((numbers_4xVxT.shape[1], 4))}

    return tf.cond(fits, whole, apart(any_picture))


def view(
    image: tf.Tensor,
    windows_of: Callable,
    *,
    side: int,
    canvas: int | None,
    exact: bool,
    recover: bool = False,
    squash: str = "no",
) -> dict[str, tf.Tensor]:
    """The model's input for one sample, or the canvas from which the device makes it.

    Args:
      image: encoded bytes, or uint8 (H, W, 3).
      windows_of: int32 (2,) height and width of an image -> its windows, float32 (V, 4).
      side: pixels of the model's input.
      canvas: side C of the canvas, at least `side`; None: resize here.
      exact: evaluation's view (windows_of is `centre_window`, or `whole_window` for a `squash`). Where it does not fit
        the canvas, it is made here from full resolution, which is slow. Otherwise the JPEG decoder scales it, to at
        least `side` per window, and what is still too large is shrunk by area averaging, which is fast and approximate.
      recover: decode the readable part of a truncated JPEG.
      squash: config.data.squash, of evaluation's view. "bilinear" is always made here.

    Returns:
      With a canvas: "image" uint8 (h, w, 3), h and w at most C; "size" int32 (2,) = (h, w); "windows" float32
      (V, 4), in its pixels. Without: "image" uint8 (side, side, 3), or (V, side, side, 3) if there are more.
    """

    def usual():
        return _view(image, windows_of, side, canvas, exact, recover, squash)

    def in_its_room():
        made = tf.numpy_function(functools.partial(_exact_of, side=side, squash=squash), [image], tf.uint8)
        found = {"image": tf.ensure_shape(made, (side, side, 3))}
        return found | ({"size": tf.fill((2,), side), "windows": _of_all(side)} if canvas else {})

    if not exact or image.dtype == tf.uint8:
        return usual()
    return tf.cond(is_large(image), in_its_room, usual)


def _of_all(side):
    return tf.constant([[0.0, 0.0, side, side]])


def _view(image, windows_of, side, canvas, exact, recover, squash):
    pixels, windows = _decoded(image, windows_of, side, None if exact else canvas, recover)
    if canvas is None:
        exactly = exact and [_exact(pixels, side, squash)]
        resized = exactly or [resize(pixels, window, side) for window in tf.unstack(windows)]
        return {"image": tf.stack(resized) if len(resized) > 1 else resized[0]}

    def here():
        return _exact(pixels, side, squash), _of_all(side)

    def whole():
        return pixels, windows

    def part():
        # Pixels farther outside than two pixels of the model's input have no weight.
        margin = tf.math.ceil(2 * tf.maximum(windows[:, 2:] / side, 1))
        begin = tf.reduce_min(tf.maximum(windows[:, :2] - margin, 0), axis=0)
        end = tf.reduce_max(tf.minimum(windows[:, :2] + windows[:, 2:] + margin, tf.cast(size_2, tf.float32)), axis=0)
        begin, end = tf.math.floor(begin), tf.math.ceil(end)
        area = tf.concat([begin, end - begin], axis=0)
        moved = windows - tf.concat([begin, [0.0, 0.0]], axis=0)

        def cut():
            (top, left), (height, width) = tf.unstack(tf.cast(begin, tf.int32)), tf.unstack(tf.cast(area[2:], tf.int32))
            return pixels[top : top + height, left : left + width], moved

        def shrunk():
            region, _ = cut()
            smaller = tf.minimum(tf.shape(region)[:2], canvas)
            factor = tf.cast(smaller, tf.float32) / area[2:]
            averaged = tf.image.resize(region, smaller, "area")
            return tf.cast(tf.round(averaged), tf.uint8), moved * tf.concat([factor, factor], axis=0)

        return tf.cond(tf.reduce_all(area[2:] <= canvas), cut, here if exact else shrunk)

    def placed():
        return tf.cond(tf.reduce_all(size_2 <= canvas), whole, part)

    size_2 = tf.shape(pixels)[:2]
    if exact and squash == "bilinear":  # the device resizes bicubically
        image, windows = here()
    else:
        image, windows = tf.cond(_height_first(size_2, side, squash), here, placed) if exact else placed()
    image = tf.ensure_shape(image, (None, None, 3))
    return {"image": image, "size": tf.shape(image)[:2], "windows": windows}


def _decoded(image, windows_of, side, canvas, recover):
    """Pixels and windows. If a window exceeds the canvas, a JPEG is decoded at 1/2, 1/4 or 1/8, none below `side`."""

    def full():
        pixels = decode(image, recover)
        return pixels, windows_of(tf.shape(pixels)[:2])

    def scaled():
        windows = windows_of(jpeg_size(image))
        times = tf.where(tf.reduce_max(windows[:, 2:]) > canvas, tf.reduce_min(windows[:, 2:]) / side, 1.0)
        log2_ratio = tf.reduce_sum(tf.cast(times >= [2.0, 4.0, 8.0], tf.int32))
        return jpeg(image, log2_ratio, recover), windows / tf.cast(2**log2_ratio, tf.float32)

    if image.dtype == tf.uint8 or canvas is None:
        return full()
    return tf.cond(is_jpeg(image), scaled, full)


def _height_first(size_2, side, squash):
    """Whether Pillow resizes a picture's height first, where the device begins with the width: Pillow does where the
    height loses more than twice as many pixels."""
    size_2 = tf.cast(size_2, tf.int64)
    lost = size_2 - (size_2 * side // tf.reduce_min(size_2) if squash == "no" else side)
    return (lost[0] > 0) & (lost[0] > 2 * lost[1])


def _exact(pixels_HxWx3, side, squash):
    made = tf.numpy_function(functools.partial(_exact_by_pil, side=side, squash=squash), [pixels_HxWx3], tf.uint8)
    return tf.ensure_shape(made, (side, side, 3))


@as_written
def _exact_by_pil(pixels, side, squash):
    return _exact_view(Image.fromarray(pixels), side, squash)


@as_written
def _exact_of(data, side, squash):
    """All of a large picture's way, so that no thread holds its pixels while it waits for another's."""
    with pictures.opened(np.asarray(data, object).item()) as image, pictures.room(image):
        return _exact_view(pictures.rgb(image), side, squash)


def _exact_view(image, side, squash):
    return pictures.centre(image, side, side) if squash == "no" else pictures.squashed(image, side, squash)


def resize(pixels_HxWx3: tf.Tensor, window_4: tf.Tensor, side: int) -> tf.Tensor:
    """A window -> uint8 (side, side, 3) by PIL: bicubic with antialiasing, width first.

    Pillow itself resizes the height first where it loses more than twice as many pixels as the width, since version 13.
    """
    resized = tf.numpy_function(functools.partial(_resize_by_pil, side=side), [pixels_HxWx3, window_4], tf.uint8)
    return tf.ensure_shape(resized, (side, side, 3))


@as_written
def _resize_by_pil(pixels, window, side):
    top, left, height, width = (float(x) for x in window)
    margin = 2 * max(height / side, 1)  # rows farther from the window have no weight
    first, last = max(0, int(top - margin)), min(len(pixels), int(top + height + margin) + 1)
    rows = Image.fromarray(pixels[first:last])
    right, bottom = min(left + width, rows.width), min(top + height, len(pixels)) - first
    narrow = rows.resize((side, rows.height), Image.Resampling.BICUBIC, box=(left, 0, right, rows.height))
    return np.asarray(narrow.resize((side, side), Image.Resampling.BICUBIC, box=(0, top - first, side, bottom)))
