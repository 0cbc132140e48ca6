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

The pipeline decodes what is most frequent in its graph (input_pipeline/decode.py), to the same pixels.
"""

import io

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from rankclip_jax.common.errors import InputError, one_line

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # lower case
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's names
# Larger ones are refused by their header: one of this size takes 256 MB. Pillow warns at the same number.
MAX_PIXELS = 89_478_485
WRONG_SIZE = f"an image must have 1 to {MAX_PIXELS:,} pixels"
NO_IMAGE = "not an image (JPEG, PNG, WebP, GIF, BMP or TIFF)"

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of TIFF


class BadImageError(InputError):
    """An unusable picture. Attributes: reason, which pictures can share; detail of this one, "" without."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{detail}; {reason}" if detail else reason)
        self.reason, self.detail = reason, detail


def read(picture: bytes | np.ndarray) -> Image.Image:
    """Encoded bytes, or uint8 pixels (H, W, 3) -> RGB. Raises BadImageError as `opened` and `loaded` do."""
    with opened(picture) as image:
        return rgb(image)


def opened(picture: bytes | np.ndarray) -> Image.Image:
    """Opens encoded bytes, or uint8 pixels (H, W, 3). Bytes are not decoded yet.

    Raises:
      BadImageError: empty, of no format that is read, or not of 1 to MAX_PIXELS pixels.
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
    return image


def loaded(image: Image.Image) -> Image.Image:
    """The image itself, decoded.

    Raises:
      BadImageError: truncated or broken.
    """
    try:
        _scale_transparent_colour(image)
        image.load()
    except Exception as error:  # as above: an OSError for a truncated file, anything for a broken one
        said = one_line(error)
        raise BadImageError("truncated image" if "truncated" in said else "broken image", said) from None
    return image


def rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes -> RGB, by the rule above. Raises BadImageError as `loaded`."""
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
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


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
