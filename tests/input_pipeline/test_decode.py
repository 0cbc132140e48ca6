"""Every kind of file against PIL's reading of it."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from input_pipeline import decode

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (23, 34, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (23, 34, 1), np.uint8)
ALPHA[:5], ALPHA[5:10] = 0, 255
GREY = RGB[..., 0]
RGBA = np.concatenate([RGB, ALPHA], axis=-1)


def encoded(image, kind, **options):
    data = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(data, kind, **options)
    return data.getvalue()


def on_white(rgba):
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


# As the pipeline runs it: in a graph, where the kind of file is not known beforehand.
_decode = tf.function(decode.decode, input_signature=[tf.TensorSpec((), tf.string)])


def in_graph(data):
    return _decode(tf.constant(data)).numpy()


def palette(transparency=None):
    image = Image.fromarray(RGB).quantize(16)
    return encoded(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


def first_of_two(kind, **options):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    data = io.BytesIO()
    frames[0].save(data, kind, save_all=True, append_images=frames[1:], **options)
    return data.getvalue()


EXACT = {
    "JPEG": encoded(RGB, "JPEG", quality=90),
    "JPEG, all chroma": encoded(RGB, "JPEG", quality=95, subsampling=0),
    "JPEG, progressive": encoded(RGB, "JPEG", progressive=True),
    "JPEG, grey": encoded(GREY, "JPEG"),
    "JPEG, CMYK": encoded(Image.fromarray(RGB).convert("CMYK"), "JPEG"),
    "PNG": encoded(RGB, "PNG"),
    "PNG, grey": encoded(GREY, "PNG"),
    "PNG, 1 bit": encoded(Image.fromarray(GREY > 99), "PNG"),
    "PNG, palette": palette(),
    "WebP, lossless": encoded(RGB, "WEBP", lossless=True),
    "WebP, lossy": encoded(RGB, "WEBP", quality=80),
    "WebP, animated": first_of_two("WEBP", lossless=True),
    "GIF, animated": first_of_two("GIF"),
    "BMP": encoded(RGB, "BMP"),
    "TIFF": encoded(RGB, "TIFF"),
}


@pytest.mark.parametrize("kind", EXACT)
def test_every_kind_is_what_pil_reads(kind):
    with Image.open(io.BytesIO(EXACT[kind])) as opened:
        expected = np.asarray(opened.convert("RGB"))
    result = in_graph(EXACT[kind])
    assert result.dtype == np.uint8
    # libwebp's upsampling of chroma is an option of the decoder's build; all the others agree to the bit.
    assert np.abs(result.astype(int) - expected).max() <= (2 if kind == "WebP, lossy" else 0)


@pytest.mark.parametrize(
    "data, pixels",
    [
        (encoded(RGBA, "PNG"), RGBA),
        (encoded(np.concatenate([RGBA[..., :1], ALPHA], -1), "PNG"), RGBA[..., [0, 0, 0, 3]]),
        (encoded(RGBA, "WEBP", lossless=True, exact=True), RGBA),
        (encoded(RGBA, "TIFF"), RGBA),
        (palette(transparency=3), np.asarray(Image.open(io.BytesIO(palette(transparency=3))).convert("RGBA"))),
    ],
    ids=["PNG", "PNG, grey", "WebP", "TIFF", "palette"],
)
def test_transparency_is_composited_on_white(data, pixels):
    np.testing.assert_allclose(in_graph(data), on_white(pixels), atol=1)
    clear = pixels[..., 3] == 0
    assert clear.any() and (in_graph(data)[clear] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_the_upper_8_are_kept(kind):
    deep = RNG.integers(0, 65536, (9, 11), np.uint16)
    np.testing.assert_array_equal(in_graph(encoded(deep, kind)), np.repeat((deep >> 8)[..., None], 3, -1))


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_header(width, height):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def patched(data, at, what):
    return data[:at] + what + data[at + len(what) :]


def jpeg_of(width, height):
    data = encoded(RGB, "JPEG")
    at = data.index(b"\xff\xc0")
    return patched(data, at + 5, struct.pack(">HH", height, width))


LOSSLESS, LOSSY, EXTENDED = EXACT["WebP, lossless"], EXACT["WebP, lossy"], encoded(RGBA, "WEBP")


@pytest.mark.parametrize(
    "data",
    [
        png_header(10_000, 10_000),
        png_header(100_000, 100_000),
        jpeg_of(12_000, 9_000),
        patched(LOSSLESS, 21, struct.pack("<I", 11_999 | 8_999 << 14)),
        patched(LOSSY, 26, struct.pack("<HH", 12_000, 9_000)),
        patched(EXTENDED, 24, struct.pack("<I", 11_999)[:3] + struct.pack("<I", 8_999)[:3]),
        patched(EXACT["GIF, animated"], 6, struct.pack("<HH", 12_000, 9_000)),
    ],
    ids=["PNG", "PNG beyond 32 bits", "JPEG", "WebP lossless", "WebP lossy", "WebP extended", "GIF"],
)
def test_pictures_beyond_the_limit_are_refused_by_their_header(data):
    """None of these holds the pixels that it promises, so only the header can have been refused."""
    with pytest.raises((ValueError, tf.errors.OpError), match=r"\d+ x \d+; an image must have 1 to 89,478,485 pixels"):
        in_graph(data)
    with pytest.raises((ValueError, tf.errors.OpError), match="89,478,485 pixels"):
        decode.decode(tf.constant(data))


BROKEN = {
    "nothing": b"",
    "JPEG's first bytes": b"\xff\xd8\xff",
    "WebP's first bytes": b"RIFF....WEBP",
    "PNG's first bytes": b"\x89PNG\r\n\x1a\n",
    "HTML": b"<html>404</html>" * 100,
    "zeros": b"\0" * 40,
    "half a JPEG": EXACT["JPEG"][: len(EXACT["JPEG"]) // 2],
    "a JPEG without its end": EXACT["JPEG"][:-30],
    "half a PNG": EXACT["PNG"][: len(EXACT["PNG"]) // 2],
    "half a WebP": LOSSLESS[: len(LOSSLESS) // 2],
    "half a GIF": EXACT["GIF, animated"][:400],
    "half a BMP": EXACT["BMP"][: len(EXACT["BMP"]) // 2],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_picture_or_breaks_off_is_an_error(kind):
    data = BROKEN[kind]
    with pytest.raises(tf.errors.OpError):
        in_graph(data)
    with pytest.raises((tf.errors.OpError, ValueError, OSError)):
        decode.decode(tf.constant(data))


def test_the_decoder_scales_and_names_its_size():
    data = encoded(RNG.integers(0, 256, (67, 130, 3), np.uint8), "JPEG")
    assert decode.jpeg_size(data).numpy().tolist() == [67, 130]
    for log2_ratio in range(4):
        ratio = 2**log2_ratio
        assert decode.jpeg(data, tf.constant(log2_ratio)).shape == (-(-67 // ratio), -(-130 // ratio), 3)
