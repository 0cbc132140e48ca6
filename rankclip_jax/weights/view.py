"""CLIP's image preprocessing for evaluation, on the host with PIL, as transformers' `CLIPImageProcessor`."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.foreign_files import read_json
from rankclip_jax.models.images import MEAN, STD


@dataclasses.dataclass(frozen=True)
class View:
    """Short side to `resize` pixels (bicubic), the central `crop` square, then (x / 255 - mean) / std per channel."""

    resize: int
    crop: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An image -> uint8 (crop, crop, 3); mean and std are applied on the device.

        image: PIL, uint8 (H, W, 3), or the path of a file. Transparency is composited on white and EXIF rotation is
        ignored, as `CLIPImageProcessor` does with a PIL image. Raises InputError with the reason.
        """
        if isinstance(image, str | os.PathLike):
            try:
                with Image.open(image) as opened:
                    return self._of_pil(opened)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                reason = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
                raise InputError(f"{image}: {reason}") from None
        if isinstance(image, Image.Image):
            return self._of_pil(image)
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            raise InputError(
                f"an image must be a PIL image, a path, or a uint8 array (height, width, 3); got "
                f"{array.dtype} {array.shape}"
            )
        return self._of_pil(Image.fromarray(array))

    def _of_pil(self, image: Image.Image) -> np.ndarray:
        if image.mode != "RGB":
            if "A" in image.getbands() or image.info.get("transparency") is not None:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
        width, height = image.size
        short = min(width, height)
        size = (width * self.resize // short, height * self.resize // short)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        return np.asarray(image.crop((left, top, left + self.crop, top + self.crop)))


def of_folder(folder: Path, image_size: int) -> View:
    """The view of a Hugging Face or open_clip folder's config files; CLIP's own without them.

    Raises ValueError naming an unsupported field.
    """
    described = _read(folder / "preprocessor_config.json")
    described = described or _read(folder / "processor_config.json").get("image_processor", {})
    if described:
        return _of_hugging_face(described, image_size)
    described = _read(folder / "open_clip_config.json").get("preprocess_cfg") or {}
    for key, usual in (("interpolation", "bicubic"), ("resize_mode", "shortest"), ("mode", "RGB")):
        if described.get(key, usual) != usual:
            raise ValueError(f"open_clip_config.json: unsupported {key} = {described[key]!r}; expected {usual!r}")
    return View(
        image_size, image_size, tuple(described.get("mean") or MEAN), tuple(described.get("std") or STD)
    )


def to_hugging_face(view: View) -> dict:
    """The contents of `preprocessor_config.json`."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": view.resize},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": view.crop, "width": view.crop},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }


def _of_hugging_face(described: Mapping, image_size: int) -> View:
    defaults = to_hugging_face(View(224, 224))
    found = defaults | {k: v for k, v in described.items() if k in defaults and v is not None}
    for key in ("do_resize", "resample", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize"):
        if abs(found[key] - defaults[key]) > 1e-6:
            raise ValueError(
                f"preprocessor_config.json: unsupported {key} = {found[key]!r}; expected {defaults[key]!r}"
            )
    size, crop = found["size"], found["crop_size"]
    resize = size.get("shortest_edge") if isinstance(size, Mapping) else size
    side = crop.get("height") if isinstance(crop, Mapping) else crop
    if not isinstance(resize, int) or side != image_size or resize < side:
        raise ValueError(
            f"preprocessor_config.json: size {size!r} and crop_size {crop!r} do not resize the short side and crop to "
            f"the model's {image_size} pixels"
        )
    return View(resize, side, tuple(found["image_mean"]), tuple(found["image_std"]))


def _read(path: Path) -> dict:
    return read_json(path) if path.exists() else {}
