"""Prepares an image for a shard with Pillow: decodes it as a check, and if needed shrinks it and converts it to RGB."""

import dataclasses
import hashlib
import io

import numpy as np
from PIL import Image

from rankclip_jax.common.errors import one_line

MAX_PIXELS = 89_478_485  # as in training; Pillow also warns at this number
# Formats that the pipeline decodes in its graph: Pillow's name -> img2dataset's key.
_KEPT = dict(JPEG="jpg", MPO="jpg", PNG="png", WEBP="webp")


class BadImageError(Exception):
    """An unusable image: a reason that images can share, and the detail of this one."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Attributes: data: encoded bytes; key: jpg | png | webp; width, height and those of the original, in pixels."""

    data: bytes
    key: str
    width: int
    height: int
    original_width: int
    original_height: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def open_image(image: bytes | np.ndarray) -> Image.Image:
    """Opens encoded bytes, or uint8 pixels (H, W, 3). Bytes are not decoded yet.

    Raises:
      BadImageError: empty, not an image, or more than MAX_PIXELS.
    """
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    if not image:
        raise BadImageError("empty image")
    try:
        opened = Image.open(io.BytesIO(image))
    except Image.DecompressionBombError:
        raise BadImageError(f"more than {MAX_PIXELS:,} pixels") from None
    except Exception:  # Pillow's readers raise any exception on bytes that resemble an image
        reason = "an HTML page" if b"<html" in image[:1024].lower() else "not an image"
        raise BadImageError(reason, f"begins with {image[:16]!r}") from None
    if opened.width * opened.height > MAX_PIXELS:
        raise BadImageError(f"more than {MAX_PIXELS:,} pixels", f"{opened.width} x {opened.height}")
    return opened


def load(opened: Image.Image, at_least: tuple[int, int]) -> None:
    """Decodes all of an image. A JPEG may be decoded at a smaller size, width and height `at_least`, which is cheaper.

    Raises:
      BadImageError: truncated or broken.
    """
    opened.draft(None, at_least)
    try:
        opened.load()
    except Exception as error:  # as above: an OSError for a truncated file, anything for a broken one
        said = one_line(error)
        raise BadImageError("truncated image" if "truncated" in said else "broken image", said) from None


def encode(image: bytes | np.ndarray, *, short_side: int | None = None, quality: int = 95) -> Encoded:
    """Encodes an image for a shard. Grey or RGB JPEG, PNG and WebP that are not too large keep their exact bytes.

    An image whose shorter side is above `short_side` is shrunk to it (bicubic, antialiased) and becomes a JPEG. Images
    are never enlarged. Animations (first frame), transparency (on white), CMYK, palettes of other formats and 16 bit
    become 8-bit RGB: a JPEG if the original format is lossy, else a PNG. EXIF rotation is not applied, as in
    img2dataset and CLIP's own loader.

    Args:
      image: encoded bytes, or uint8 pixels (H, W, 3).
      short_side: pixels; None: keep every size.
      quality: of written JPEGs, 1 to 100.

    Raises:
      BadImageError: unusable, with the reason.
    """
    opened = open_image(image)
    kind, width, height = opened.format, opened.width, opened.height
    scale = min(1.0, short_side / min(width, height)) if short_side else 1.0
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    ordinary = opened.mode in ("L", "RGB") and not opened.has_transparency_data
    moving = kind != "MPO" and getattr(opened, "is_animated", False)  # MPO: a JPEG followed by more JPEGs
    kept = _KEPT.get(kind or "") if scale == 1.0 and ordinary and not moving else None
    load(opened, (1, 1) if kept else (2 * size[0], 2 * size[1]))  # twice the size: the bicubic filter does the rest
    if kept and isinstance(image, bytes):
        return Encoded(image, kept, width, height, width, height)
    picture = plain(opened)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    lossy = scale < 1.0 or kind in ("JPEG", "MPO", "WEBP")
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality) if lossy else picture.save(out, "PNG")
    return Encoded(out.getvalue(), "jpg" if lossy else "png", *size, width, height)


def plain(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB: transparency on white, the upper 8 of 16 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        levels = np.asarray(image).astype(np.float64)
        # Pillow opens 16-bit grey as I;16 or I. Float images have values of 0 to 1 or 0 to 255.
        scale = 1 / 257 if image.mode != "F" else 255 if levels.max(initial=0) <= 1 else 1
        image = Image.fromarray(np.clip(np.rint(levels * scale), 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
