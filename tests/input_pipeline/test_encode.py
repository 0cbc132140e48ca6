import functools
import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from input_pipeline.encode import encode
from rankclip_jax.common.pictures import NO_IMAGE, WRONG_SIZE, BadImageError

RNG = np.random.default_rng(0)
# Low frequencies with some noise, as photographs have them.
_COARSE = Image.fromarray(RNG.integers(0, 256, (12, 18, 3), np.uint8)).resize((600, 400), Image.Resampling.BICUBIC)
PHOTO = Image.fromarray(np.clip(np.asarray(_COARSE) + RNG.normal(0, 4, (400, 600, 3)), 0, 255).astype(np.uint8))


def file(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded.data)).convert("RGB")).astype(int)


@pytest.mark.parametrize("kind, key", [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_ordinary_image_keeps_its_very_bytes(kind, key, mode):
    data = file(PHOTO.convert(mode), kind)
    for short_side in (None, 400, 1000):  # none is made larger
        got = encode(data, short_side=short_side)
        assert got.data == data and got.key == key
        assert (got.width, got.height, got.original_width, got.original_height) == (600, 400, 600, 400)
        assert got.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("size", [(600, 400), (400, 600)])
def test_the_shorter_side_is_brought_down_as_pillow_does(kind, size):
    data = file(PHOTO.resize(size), kind)
    got = encode(data, short_side=150, quality=95)
    target = (225, 150) if size == (600, 400) else (150, 225)
    assert got.key == "jpg" and (got.width, got.height) == target == Image.open(io.BytesIO(got.data)).size
    assert (got.original_width, got.original_height) == size
    whole = Image.open(io.BytesIO(data)).convert("RGB").resize(target, Image.Resampling.BICUBIC)
    expected = np.asarray(Image.open(io.BytesIO(file(whole, "JPEG", quality=95)))).astype(int)
    # Only a JPEG was scaled down by its decoder first, to twice the size: another filter, hardly another picture.
    assert np.abs(pixels(got) - expected).mean() < (1.0 if kind == "JPEG" else 1e-9)


def test_a_very_long_image_keeps_at_least_a_pixel_of_its_shorter_side():
    got = encode(file(Image.new("RGB", (3, 5000)), "PNG"), short_side=1)
    assert (got.width, got.height) == (1, round(5000 / 3))


def test_quality_is_that_of_the_jpeg():
    data = file(PHOTO, "PNG")
    sizes = [len(encode(data, short_side=300, quality=quality).data) for quality in (30, 75, 95)]
    assert sizes == sorted(set(sizes))


def test_transparency_is_composited_on_white():
    rgba_HxWx4 = RNG.integers(0, 256, (20, 30, 4), np.uint8)
    got = encode(file(Image.fromarray(rgba_HxWx4, "RGBA"), "PNG"))
    colour, alpha = rgba_HxWx4[..., :3].astype(float), rgba_HxWx4[..., 3:] / 255
    assert got.key == "png" and np.abs(pixels(got) - (colour * alpha + 255 * (1 - alpha))).max() <= 1


def test_a_transparent_colour_of_a_palette_becomes_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 10, 10])
    image.putpixel((0, 0), 0)
    got = pixels(encode(file(image, "GIF", transparency=0)))
    assert got[0, 0].tolist() == [255, 255, 255] and got[1, 1].tolist() == [200, 10, 10]


def test_sixteen_bits_keep_their_upper_eight():
    levels_HxW = np.arange(0, 65536, 16, np.uint16).reshape(64, 64)
    got = encode(file(Image.fromarray(levels_HxW), "PNG"))
    assert np.abs(pixels(got)[..., 0] - levels_HxW / 257).max() <= 1


def test_cmyk_becomes_rgb_and_stays_a_jpeg():
    got = encode(file(PHOTO.convert("CMYK"), "JPEG", quality=95))
    assert got.key == "jpg" and Image.open(io.BytesIO(got.data)).mode == "RGB"
    assert np.abs(pixels(got) - np.asarray(PHOTO)).mean() < 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "lime", "blue")]
    data = file(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    got = encode(data)
    assert getattr(Image.open(io.BytesIO(got.data)), "n_frames", 1) == 1
    assert np.abs(pixels(got) - [255, 0, 0]).max() <= 5


def test_pixels_become_a_lossless_file():
    image_HxWx3 = RNG.integers(0, 256, (7, 9, 3), np.uint8)
    got = encode(image_HxWx3)
    assert got.key == "png" and np.array_equal(pixels(got), image_HxWx3)


@functools.cache
def photo(kind):
    return file(PHOTO, kind)


def half(kind):
    return photo(kind)[: len(photo(kind)) // 2]


@pytest.mark.parametrize(
    "made, reason",
    [
        (lambda: b"", "empty image"),
        (lambda: b"hello", NO_IMAGE),
        (lambda: b"\0" * 1000, NO_IMAGE),
        (lambda: b"<!DOCTYPE html>\n<HTML><body>404", "an HTML page"),
        (lambda: half("JPEG"), "truncated image"),
        (lambda: half("PNG"), "truncated image"),
        (lambda: photo("GIF")[:5000], "truncated image"),
        (lambda: photo("JPEG")[:20], NO_IMAGE),
        (lambda: photo("PNG")[:50], "truncated image"),
        (lambda: photo("PNG")[:2000] + bytes(500) + photo("PNG")[2500:], "broken image"),
        (lambda: file(Image.new("L", (10_001, 10_000)), "PNG"), WRONG_SIZE),
        (lambda: file(Image.new("1", (20_000, 20_000)), "PNG"), WRONG_SIZE),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_say_why(made, reason):
    data = made()
    for short_side in (None, 100):
        with pytest.raises(BadImageError) as error:
            encode(data, short_side=short_side)
        assert error.value.reason == reason


def test_no_mangled_file_does_anything_but_work_or_say_why():
    for data in map(photo, ("JPEG", "PNG", "WEBP", "GIF", "TIFF")):
        for seed in range(15):
            rng = np.random.default_rng(seed)
            mangled = bytearray(data)
            for place in rng.integers(0, min(len(data), 2000), 8):
                mangled[place] = rng.integers(256)
            try:
                assert encode(bytes(mangled), short_side=64).data
            except BadImageError as error:
                assert error.reason
