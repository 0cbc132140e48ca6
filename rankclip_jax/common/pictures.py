"""Any picture as 8-bit RGB: the one rule of training, evaluation, `prepare`, `load`, `embed` and study.

JPEG, PNG, WebP, GIF, BMP and TIFF of 1 to MAX_PIXELS pixels are opened, nothing else. Of these

- an animation, and a file of several pictures, gives its first;
- whole numbers of more than 8 bits keep the upper 8: of 16, of a TIFF's 12, of 32 where a value exceeds 65,535;
  below 0 is black;
- floats are multiplied by 255 where no finite value reaches 2 (0 to 1), otherwise they are grey levels already; they
  are rounded; NaN and below 0 is black, what is beyond 255, infinity too, is white;
- a TIFF whose 0 is white is inverted, whatever its depth;
- transparency (alpha, a transparent colour or palette entry) is composited on white;
- 1 bit, palettes, CMYK (a JPEG's inverted, as Adobe's are), YCbCr and HSV become RGB by Pillow's formulas, LAB by
  LittleCMS; other colour profiles are not applied;
- orientation in EXIF is not applied, as in CLIP's and open_clip's own training. Pillow turns TIFFs itself.

A small file can cost seconds and gigabytes. So a JPEG's scans times its pixels are limited (`too_many_scans`), and of
pictures of more than LARGE pixels a process decodes at a time no more than have MAX_PIXELS together (`room`).

The pipeline decodes what is most frequent in its graph (input_pipeline/decode.py), to the same pixels.
"""

import contextlib
import io
import os
import threading
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.regular_files import read_regular

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # lower case
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's names
# Larger ones are refused by their header: one of this size takes 256 MB. Pillow warns at the same number.
MAX_PIXELS = 89_478_485
WRONG_SIZE = f"an image must have 1 to {MAX_PIXELS:,} pixels"
# More scans x pixels of a JPEG are refused: 2e9 took 3 s on one core. A progressive JPEG has about 10 scans.
MAX_SCANNED = 2_000_000_000
MANY_SCANS = f"a JPEG of more than {MAX_SCANNED:,} scans x pixels"
SCAN, SCAN_BYTES = b"\xff\xda", 10  # how a scan begins, and the least that it has
MAX_FILE_MB = 100  # default of config.data.max_file_mb
LARGE = 1 << 24  # pixels
NO_IMAGE = "not an image (JPEG, PNG, WebP, GIF, BMP or TIFF)"

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _STRIPS, _TILES = 262, 258, 339, 273, 324  # tags of TIFF
_STRIP = 1024  # rows of a large picture that are converted at a time


class BadImageError(InputError):
    """An unusable picture. Attributes: reason, which pictures can share; detail of this one, "" without."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{detail}; {reason}" if detail else reason)
        self.reason, self.detail = reason, detail


def read(picture: bytes | np.ndarray) -> Image.Image:
    """Encoded bytes, or uint8 pixels (H, W, 3) -> RGB. Raises BadImageError as `opened` and `loaded` do."""
    with opened(picture) as image:
        return rgb(image)


def pixels(data: bytes) -> np.ndarray:
    """Encoded bytes -> uint8 (H, W, 3). Raises as `read`."""
    with opened(data) as image, room(image):
        picture = rgb(image)
        if image.width * image.height <= LARGE:
            return np.asarray(picture)
        found = np.empty((picture.height, picture.width, 3), np.uint8)
        for top in range(0, len(found), _STRIP):  # at once it would take twice the memory
            strip = picture.crop((0, top, picture.width, min(top + _STRIP, len(found))))
            found[top : top + _STRIP] = np.asarray(strip)
        return found


def read_file(path: str | os.PathLike, max_bytes: int = MAX_FILE_MB * 1_000_000) -> bytes:
    """The encoded bytes of a local picture.

    Raises:
      BadImageError: not a regular file, or more than `max_bytes`. An OSError passes through.
    """
    try:
        return read_regular(path, max_bytes)
    except InputError as error:
        detail, _, reason = str(error).rpartition("; ")
        raise BadImageError(reason, detail) from None


def opened(picture: bytes | np.ndarray) -> Image.Image:
    """Opens encoded bytes, or uint8 pixels (H, W, 3). Bytes are not decoded yet.

    Raises:
      BadImageError: empty, of no format that is read, not of 1 to MAX_PIXELS pixels, or with too many scans.
    """
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture)
    if not picture:
        raise BadImageError("empty image")
    try:
        image = Image.open(io.BytesIO(picture), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError(WRONG_SIZE, one_line(error)) from None
    except Exception:  # Pillow's readers raise any exception on bytes that resemble a picture
        page = b"<html" in picture[:1024].lower()
        raise BadImageError("an HTML page" if page else NO_IMAGE, f"begins with {picture[:16]!r}") from None
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise BadImageError(WRONG_SIZE, f"{image.width} x {image.height}")
    if too_many_scans(picture, image.width * image.height, _jpegs_in(image)):
        raise BadImageError(MANY_SCANS, f"{image.width} x {image.height}")
    if image.format in ("JPEG", "MPO"):  # for `room`, also once it is to be decoded at a smaller size
        image.held = held_by(picture, image.width * image.height)  # type: ignore[attr-defined]
    return image


def too_many_scans(jpeg: bytes, pixels: int, jpegs: float = 1) -> bool:
    """Whether a JPEG, or a file of several that make one picture of `pixels`, has scans that take seconds to decode.

    The scans are counted only where as many fit into the bytes.
    """
    limit = MAX_SCANNED * jpegs
    return len(jpeg) * pixels > SCAN_BYTES * limit and jpeg.count(SCAN) * pixels > limit


def _jpegs_in(image: Image.Image) -> float:
    """How many JPEGs make the picture: infinitely many where none do, as scans are then no matter."""
    if image.format == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg"):
        tags = image.tag_v2  # type: ignore[attr-defined]
        return len(tags.get(_TILES) or tags.get(_STRIPS) or [0])
    return 1 if image.format in ("JPEG", "MPO") else float("inf")


class _Room:
    """Pixels of large pictures that threads hold at a time, at most `size`; a thread enters once, and then at will."""

    def __init__(self, size: int):
        self._size = self._free = size
        self._change, self._own = threading.Condition(), threading.local()

    @contextlib.contextmanager
    def __call__(self, pixels: int) -> Iterator[None]:
        if pixels <= LARGE or getattr(self._own, "inside", False):
            yield
            return
        pixels = min(pixels, self._size)  # arrays that are given may have more
        with self._change:
            self._change.wait_for(lambda: pixels <= self._free)
            self._free -= pixels
        self._own.inside = True
        try:
            yield
        finally:
            self._own.inside = False
            with self._change:
                self._free += pixels
                self._change.notify_all()


room_for = _Room(MAX_PIXELS)  # room_for(pixels): as `room`


def room(image: Image.Image) -> contextlib.AbstractContextManager:
    """A context in which to decode an image and what is made of it. It waits until there is room for a large one."""
    return room_for(max(image.width * image.height, getattr(image, "held", 0)))


def held_by(jpeg: bytes, pixels: int) -> int:
    """Of a JPEG's `pixels`, those that its decoder holds whatever the size at which it decodes: all, or 0.

    It goes row by row through a JPEG that is not progressive and whose first scan has all components.
    """
    at, components = 2, 0
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        kind, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4])
        if kind == 0xFF:  # padding
            at += 1
            continue
        if kind in (0xC0, 0xC1):
            components = jpeg[at + 9] if at + 9 < len(jpeg) else 0
        elif kind == 0xDA:
            return 0 if at + 4 < len(jpeg) and jpeg[at + 4] == components else pixels
        elif 0xC2 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # other frames; tables
            return pixels
        at += 2 + length
    return pixels


def loaded(image: Image.Image) -> Image.Image:
    """The image itself, decoded.

    Raises:
      BadImageError: truncated or broken.
    """
    try:
        with room(image):
            _scale_transparent_colour(image)
            image.load()
    except Exception as error:  # as above: an OSError for a truncated file, anything for a broken one
        said = one_line(error)
        raise BadImageError("truncated image" if "truncated" in said else "broken image", said) from None
    return image


def rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes -> RGB, by the rule above. Raises BadImageError as `loaded`."""
    with room(image):
        return _rgb(image)


def _rgb(image: Image.Image) -> Image.Image:
    loaded(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return _of_deep_grey(image)
    if image.mode == "LAB":
        lab, srgb = (ImageCms.createProfile(space) for space in ("LAB", "sRGB"))
        made = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
        assert made is not None  # as it is in place
        return made
    if image.mode == "La":
        image = image.convert("LA")
    if not image.has_transparency_data:
        return image.convert("RGB")
    on_white = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP):
        strip = image.crop((0, top, image.width, min(top + _STRIP, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        on_white.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return on_white


def _of_deep_grey(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(image)
    if image.mode == "F":
        finite = values[np.isfinite(values)]
        scale = 255 if finite.max(initial=0) < 2 else 1
        levels = np.rint(np.clip(np.nan_to_num(values, nan=0, posinf=255, neginf=0) * scale, 0, 255))
    else:
        if tags.get(_BITS) == (32,) and tags.get(_SAMPLE_FORMAT, (1,)) == (1,):
            values = values.view(np.uint32)  # which Pillow takes for int32
        bits = 12 if tags.get(_BITS) == (12,) else 16 if values.max(initial=0) < 2**16 else 32
        levels = np.maximum(values, 0) >> bits - 8
    if tags.get(_PHOTOMETRIC) == 0:
        levels = 255 - levels
    if "transparency" in image.info:  # of a PNG
        levels = np.where(values == image.info["transparency"], 255, levels)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _scale_transparent_colour(image: Image.Image) -> None:
    """Brings a PNG's transparent colour to 8 bits, as its pixels will be: Pillow compares them as they are."""
    colour = image.info.get("transparency")
    if (
        colour is None or not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile
    ):  # no tile: loaded already
        return
    stored = image.tile[0].args
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def squashed(image: Image.Image, side: int, how: str) -> np.ndarray:
    """SigLIP's evaluation view: the whole image as a square, whatever its ratio, "bicubic" or (SigLIP 2's) "bilinear".

    Returns:
      uint8 (side, side, 3) of an RGB image.
    """
    return np.asarray(image.resize((side, side), Image.Resampling[how.upper()]))


def centre(image: Image.Image, short_side: int, crop: int) -> np.ndarray:
    """CLIP's evaluation view: the shorter side to `short_side` (bicubic), then the central square.

    As CLIPImageProcessor of transformers, which truncates the longer side and the square's position to whole pixels.

    Returns:
      uint8 (crop, crop, 3) of an RGB image.
    """
    width, height = image.size
    size = (width * short_side // min(image.size), height * short_side // min(image.size))
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    if size[0] * size[1] > MAX_PIXELS:  # a sliver, enlarged: the square alone
        x, y = width / size[0], height / size[1]
        box = (left * x, top * y, (left + crop) * x, (top + crop) * y)
        return np.asarray(image.resize((crop, crop), Image.Resampling.BICUBIC, box))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + crop, top + crop)))
