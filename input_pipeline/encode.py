"""Prepares an image for a shard with Pillow: decodes it as a check, and if needed shrinks it and converts it to RGB."""

import dataclasses
import hashlib
import io

import numpy as np
from PIL import Image

from rankclip_jax.common import pictures

# Formats that the pipeline decodes in its graph: Pillow's name -> img2dataset's key.
_KEPT = dict(JPEG="jpg", MPO="jpg", PNG="png", WEBP="webp")


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


def encode(image: bytes | np.ndarray, *, short_side: int | None = None, quality: int = 95) -> Encoded:
    """Encodes an image for a shard. Grey or RGB JPEG, PNG and WebP that are not too large keep their exact bytes.

    An image whose shorter side is above `short_side` is shrunk to it (bicubic, antialiased) and becomes a JPEG. Images
    are never enlarged. All others become 8-bit RGB by the rule of common/pictures.py: a JPEG if the original is lossy,
    else a PNG.

    Args:
      image: encoded bytes, or uint8 pixels (H, W, 3).
      short_side: pixels; None: keep every size.
      quality: of written JPEGs, 1 to 100.

    Raises:
      BadImageError: unusable, with the reason.
    """
    opened = pictures.opened(image)
    kind, width, height = opened.format, opened.width, opened.height
    scale = min(1.0, short_side / min(width, height)) if short_side else 1.0
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    ordinary = opened.mode in ("L", "RGB") and not opened.has_transparency_data
    kept = _KEPT.get(kind or "") if scale == 1.0 and ordinary else None
    if kept and kind != "MPO" and getattr(opened, "is_animated", False):  # MPO: a JPEG followed by more JPEGs
        kept = None
    # A JPEG may be decoded at a smaller size, which is cheaper: at twice the size, the bicubic filter does the rest.
    opened.draft(None, (1, 1) if kept else (2 * size[0], 2 * size[1]))
    with pictures.room(opened):
        pictures.loaded(opened)
        if kept and isinstance(image, bytes):
            return Encoded(image, kept, width, height, width, height)
        picture = pictures.rgb(opened)
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
    lossy = scale < 1.0 or kind in ("JPEG", "MPO") or (kind == "WEBP" and b"VP8L" not in image)  # L: lossless
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality) if lossy else picture.save(out, "PNG")
    return Encoded(out.getvalue(), "jpg" if lossy else "png", *size, width, height)
