"""Decodes pictures to uint8 RGB in the pipeline's graph, by the rule of rankclip_jax/common/pictures.py.

JPEG (grey and colour), PNG of 8 bits a channel without a palette, and WebP are decoded by TensorFlow, where that
gives Pillow's pixels; everything else, and large PNG and WebP, by the reader itself. Large pictures wait for their
room (pictures.py).
"""

import functools
from collections.abc import Callable

import numpy as np

from input_pipeline.graph import as_written, once
from input_pipeline.tensorflow_import import tf
from rankclip_jax.common import pictures
from rankclip_jax.common.pictures import LARGE, MANY_SCANS, MAX_PIXELS, MAX_SCANNED, SCAN, SCAN_BYTES, WRONG_SIZE


def is_jpeg(image: tf.Tensor) -> tf.Tensor:
    """Whether encoded bytes are a grey or colour JPEG, bool scalar. Raises InvalidArgumentError for a broken header.

    Pillow inverts every CMYK JPEG, TensorFlow only those marked as inverted.
    """
    channels = jpeg_shape(image)[2]
    return (channels > 0) & (channels != 4)


def jpeg_shape(image: tf.Tensor) -> tf.Tensor:
    """Height, width and channels, int32 (3,), from a JPEG's header; zeros of anything else. Raises as `is_jpeg`."""
    begins = tf.strings.substr(image, 0, 3) == b"\xff\xd8\xff"
    return tf.cond(begins, lambda: tf.io.extract_jpeg_shape(image), lambda: tf.zeros(3, tf.int32))


def has_few_scans(image: tf.Tensor, size_2: tf.Tensor) -> tf.Tensor:
    """Whether a JPEG's bytes are too few for too many scans (pictures.too_many_scans), bool scalar."""
    pixels = tf.reduce_prod(tf.cast(size_2, tf.int64))
    return tf.cast(tf.strings.length(image), tf.int64) * pixels <= SCAN_BYTES * MAX_SCANNED


def jpeg_size(image: tf.Tensor) -> tf.Tensor:
    """Height and width, int32 (2,), from a JPEG's header.

    Raises InvalidArgumentError above MAX_PIXELS, or for too many scans (pictures.py).
    """
    size = tf.io.extract_jpeg_shape(image)[:2]
    with tf.control_dependencies([_check_pixels(size[0], size[1]), _check_scans(image, size)]):
        return tf.identity(size)


def jpeg_at_once(image: tf.Tensor, ratio: int = 1, recover: bool = False) -> tf.Tensor:
    """A JPEG that is not large -> uint8 (H, W, 3), bit for bit as PIL decodes it.

    Args:
      image: encoded bytes.
      ratio: 1, 2, 4 or 8, by which the decoder scales the image down; sizes are rounded up.
      recover: decode the readable part of a truncated JPEG.
    """
    # TensorFlow's default transform is slightly faster, and up to 13 grey levels off.
    options = dict(dct_method="INTEGER_ACCURATE", try_recover_truncated=recover)
    return tf.io.decode_jpeg(image, channels=3, ratio=ratio, **options)


def jpeg(image: tf.Tensor, log2_ratio: tf.Tensor | None = None, recover: bool = False) -> tf.Tensor:
    """As `jpeg_at_once`, of any JPEG and the ratio 1 << log2_ratio, an int32 scalar: a large one waits for its room."""

    def at_once():
        if log2_ratio is None:
            return jpeg_at_once(image, 1, recover)
        ratios = [functools.partial(jpeg_at_once, image, ratio, recover) for ratio in (1, 2, 4, 8)]
        return tf.switch_case(log2_ratio, ratios)

    size_2 = tf.io.extract_jpeg_shape(image)[:2]
    given = [image, tf.reduce_prod(tf.cast(size_2, tf.int64)), 0 if log2_ratio is None else log2_ratio]
    waits = lambda: tf.numpy_function(functools.partial(_jpeg_in_its_room, recover=recover), given, tf.uint8)  # noqa: E731
    return tf.ensure_shape(tf.cond(_is_large(*tf.unstack(size_2)), waits, at_once), (None, None, 3))


@as_written
def _jpeg_in_its_room(data, pixels, log2_ratio, recover):
    data = np.asarray(data, object).item()
    with pictures.room_for(max(pictures.held_by(data, int(pixels)), int(pixels) >> 2 * int(log2_ratio))):
        try:
            return jpeg_at_once(data, 1 << int(log2_ratio), recover).numpy()
        except tf.errors.InvalidArgumentError:
            raise pictures.BadImageError("broken or truncated JPEG") from None


def decode(image: tf.Tensor, recover: bool = False) -> tf.Tensor:
    """Bytes of any picture -> uint8 (H, W, 3). A uint8 image is returned as it is.

    With `recover` the readable part of a truncated JPEG (grey or colour) is decoded.

    Raises at run time InvalidArgumentError (Pillow's part, run eagerly: BadImageError) with the reason.
    """
    return image if image.dtype == tf.uint8 else _any(image, recover)


@once
def _any(image, recover):
    head = _head(image)
    # TensorFlow returns a wrong alpha for palettes and for depths other than 8 bits.
    png = _is_png(head) & (head[24] == 8) & (head[25] != 3) & ~_is_large(*_png_size(head))
    animated = (head[15] == ord("X")) & (head[20] // 2 % 2 == 1)
    webp = _is_webp(head) & ~animated & ~_is_large(*_webp_size(head))
    kind = tf.where(is_jpeg(image), 0, tf.where(png, 1, tf.where(webp, 2, 3)))
    branches = [
        lambda: _jpeg(image, recover),
        lambda: _png(image, head),
        lambda: _webp(image, head),
        lambda: _by_pillow(image),
    ]
    return tf.ensure_shape(tf.switch_case(kind, branches), (None, None, 3))


def decoded_to(made: Callable, image: tf.Tensor, recover: bool = False) -> tf.Tensor:
    """made(uint8 (H, W, 3)) -> uint8 (h, w, 3), a function of arrays, of a picture that is decoded as above."""
    function = as_written(made)
    return tf.ensure_shape(tf.numpy_function(function, [decode(image, recover)], tf.uint8), (None, None, 3))


def _jpeg(image, recover):
    with tf.control_dependencies([jpeg_size(image)]):
        return jpeg(image, recover=recover)


@once
def is_large(image: tf.Tensor) -> tf.Tensor:
    """Whether encoded bytes are a JPEG (grey or colour), PNG or WebP that waits for its room, by the header."""

    def other():
        head = _head(image)
        return (_is_png(head) & _is_large(*_png_size(head))) | (_is_webp(head) & _is_large(*_webp_size(head)))

    return tf.cond(is_jpeg(image), lambda: _is_large(*tf.unstack(tf.io.extract_jpeg_shape(image)[:2])), other)


def _is_png(head):
    return tf.reduce_all(head[:8] == list(b"\x89PNG\r\n\x1a\n"))


def _is_webp(head):
    return tf.reduce_all(tf.gather(head, (0, 1, 2, 3, 8, 9, 10, 11)) == list(b"RIFFWEBP"))


def _png_size(head):
    """Width and height, int64."""
    bytes_8 = tf.cast(head[16:24], tf.int64)
    return [tf.reduce_sum(bytes_8[at : at + 4] * [1 << 24, 1 << 16, 1 << 8, 1]) for at in (0, 4)]  # big-endian


def _png(image, head):
    width, height = _png_size(head)
    # Colour types 4 and 6 have an alpha channel; the others may name a transparent colour, before the pixels begin.
    begin = tf.strings.substr(image, 0, 8192)
    found = [tf.strings.regex_full_match(begin, rf"(?s)\C*{chunk}\C*") for chunk in ("IDAT", "tRNS")]
    opaque = (head[25] != 4) & (head[25] != 6) & found[0] & ~found[1]
    with tf.control_dependencies([_check_pixels(height, width)]):
        return tf.cond(
            opaque,
            lambda: tf.io.decode_png(image, channels=3),
            lambda: _on_white(tf.io.decode_png(image, channels=4)),
        )


def _webp_size(head):
    """Width and height, int32."""
    # Little-endian sides. Lossy: 14 bits. Lossless: 14 bits, minus one. Extended: 24 bits, minus one.
    bits = tf.reduce_sum(tf.cast(head[21:25], tf.int64) * [1, 1 << 8, 1 << 16, 1 << 24])
    lossless = tf.cast(tf.stack([bits % 2**14, bits // 2**14 % 2**14]), tf.int32) + 1
    lossy = tf.reduce_sum(tf.reshape(head[26:30], (2, 2)) * [1, 1 << 8], axis=1) % 2**14
    extended = tf.reduce_sum(tf.reshape(head[24:30], (2, 3)) * [1, 1 << 8, 1 << 16], axis=1) + 1
    size = tf.where(head[15] == ord("L"), lossless, tf.where(head[15] == ord("X"), extended, lossy))
    return tf.unstack(size)


def _webp(image, head):
    width, height = _webp_size(head)
    with tf.control_dependencies([_check_pixels(height, width)]):
        pixels = tf.io.decode_webp(image, channels=0)[0]
    return tf.cond(tf.shape(pixels)[2] == 4, lambda: _on_white(pixels), lambda: pixels)


def _on_white(pixels_HxWx4):
    colour, alpha = tf.cast(pixels_HxWx4[..., :3], tf.uint16), tf.cast(pixels_HxWx4[..., 3:], tf.uint16)
    return tf.cast((colour * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)  # at most 255 * 255 + 127


def _by_pillow(image):
    return tf.numpy_function(_read, [image], tf.uint8)


@as_written
def _read(data):
    return pictures.pixels(np.asarray(data, object).item())


def _check_pixels(height, width):
    pixels = tf.cast(height, tf.int64) * tf.cast(width, tf.int64)

    def refuse():
        # In a separate branch: formatting the text costs more than reading the header and is rarely needed.
        return tf.debugging.Assert(False, [tf.strings.format("{} x {}; " + WRONG_SIZE, (width, height))])

    return tf.cond((pixels > 0) & (pixels <= MAX_PIXELS), tf.no_op, refuse)


def _is_large(width, height):
    pixels = tf.cast(width, tf.int64) * tf.cast(height, tf.int64)
    return (pixels > LARGE) & (pixels <= MAX_PIXELS)


def _check_scans(image, size_2):
    """As pictures.too_many_scans."""

    def count():
        pixels = tf.reduce_prod(tf.cast(size_2, tf.int64))
        scans = tf.strings.split(image, SCAN)
        few = (tf.size(scans, tf.int64) - 1) * pixels <= MAX_SCANNED
        return tf.debugging.Assert(few, [tf.strings.format("{} x {}; " + MANY_SCANS, (size_2[1], size_2[0]))])

    return tf.cond(has_few_scans(image, size_2), tf.no_op, count)


def _head(image):
    """The first 32 bytes as int32 (32,), zeros where there are fewer."""
    padded = tf.strings.substr(tf.strings.join([tf.strings.substr(image, 0, 32), b"\0" * 32]), 0, 32)
    return tf.ensure_shape(tf.cast(tf.io.decode_raw(padded, tf.uint8), tf.int32), (32,))
