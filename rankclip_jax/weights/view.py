"""Image preprocessing for evaluation, on the host with PIL, as transformers' `CLIPImageProcessor` and SigLIP's."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from rankclip_jax.common import pictures
from rankclip_jax.common.errors import InputError, one_line
from rankclip_jax.common.foreign_files import read_json
from rankclip_jax.models import ResNetConfig, VitConfig
from rankclip_jax.models.images import MEAN, STD

HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and deviation


@dataclasses.dataclass(frozen=True)
class View:
    """Short side to `resize` pixels (bicubic), the central `crop` square, then (x / 255 - mean) / std per channel.

    squash "bicubic" (SigLIP's) or "bilinear" (SigLIP 2's): the whole image to a square of `crop` pixels, whatever its
    ratio.
    """

    resize: int
    crop: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    squash: str = "no"

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An image -> uint8 (crop, crop, 3); mean and std are applied on the device.

        image: PIL, uint8 (H, W, 3), or the path of a file; of any kind, by the rule of common/pictures.py. Raises
        InputError with the reason.
        """
        if isinstance(image, Image.Image):
            with pictures.room(image):
                return self._resized(pictures.rgb(image))
        if isinstance(image, str | os.PathLike):
            try:
                return self(pictures.opened(pictures.read_file(os.path.expanduser(image))))
            except pictures.BadImageError as error:
                raise InputError(f"{image}: {error}") from None
            except (OSError, ValueError) as error:
                reason = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
                raise InputError(f"{image}: {reason}") from None
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            raise InputError(
                f"an image must be a PIL image, a path, or a uint8 array (height, width, 3); got "
                f"{array.dtype} {array.shape}"
            )
        return self._resized(Image.fromarray(array))

    def _resized(self, image: Image.Image) -> np.ndarray:
        if self.squash != "no":
            return pictures.squashed(image, self.crop, self.squash)
        return pictures.centre(image, self.resize, self.crop)


def usual(vision: VitConfig | ResNetConfig) -> View:
    """The view of CLIP's or SigLIP's own models."""
    side = vision.image_size
    if isinstance(vision, VitConfig) and vision.pool == "map":
        return View(side, side, HALF, HALF, "bicubic")
    return View(side, side)


def of_folder(folder: Path, vision: VitConfig | ResNetConfig) -> View:
    """The view of a Hugging Face or open_clip folder's config files; `usual` without them.

    Raises ValueError naming an unsupported field.
    """
    try:
        view = _of_folder(folder, vision)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: its preprocessing is damaged ({one_line(error)}); download it again") from None
    for name, values, low in (("mean", view.mean, -math.inf), ("std", view.std, 0)):
        if len(values) != 3 or not all(isinstance(each, int | float) and low < each < math.inf for each in values):
            expected = "3 numbers" + (" above 0" if low == 0 else "")
            raise ValueError(f"{folder}: the preprocessing's {name} is {values!r}; expected {expected}")
    return view


def _of_folder(folder: Path, vision: VitConfig | ResNetConfig) -> View:
    described = _read(folder / "preprocessor_config.json")
    described = described or _read(folder / "processor_config.json").get("image_processor", {})
    if described:
        siglip = str(described.get("image_processor_type", "")).startswith("Siglip")
        return (_of_siglip if siglip else _of_hugging_face)(described, vision.image_size)
    described = _read(folder / "open_clip_config.json").get("preprocess_cfg") or {}
    squash = described.get("resize_mode") == "squash"
    known = {"resize_mode": ("shortest", "squash"), "mode": ("RGB",)}
    known["interpolation"] = ("bicubic", "bilinear") if squash else ("bicubic",)
    for key, ours in known.items():
        if described.get(key, ours[0]) not in ours:
            expected = " or ".join(map(repr, ours))
            raise ValueError(f"open_clip_config.json: unsupported {key} = {described[key]!r}; expected {expected}")
    own = usual(vision)
    if squash:
        own = dataclasses.replace(own, squash=described.get("interpolation", "bicubic"))
    mean, std = (tuple(described.get(key) or getattr(own, key)) for key in ("mean", "std"))
    return dataclasses.replace(own, mean=mean, std=std)


def to_hugging_face(view: View) -> dict:
    """The contents of `preprocessor_config.json`."""
    square = {"height": view.crop, "width": view.crop}
    if view.squash == "no":
        kind, how = "CLIPImageProcessor", Image.Resampling.BICUBIC
        cut = {"size": {"shortest_edge": view.resize}, "do_center_crop": True, "crop_size": square}
    else:
        kind, how, cut = "SiglipImageProcessor", Image.Resampling[view.squash.upper()], {"size": square}
    return {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        **cut,
        "resample": int(how),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(view.mean),
        "image_std": list(view.std),
    }


def _of_siglip(described: Mapping, side: int) -> View:
    how = "bilinear" if described.get("resample") == Image.Resampling.BILINEAR else "bicubic"
    square = {"height": side, "width": side}
    found = _given(described, to_hugging_face(View(side, side, HALF, HALF, how)))
    if found["size"] not in (square, side):
        raise ValueError(f"preprocessor_config.json: size {found['size']!r}; expected the model's, {square!r}")
    return View(side, side, tuple(found["image_mean"]), tuple(found["image_std"]), how)


def _given(described: Mapping, defaults: dict) -> dict:
    """The defaults with what a file gives in their place. Raises ValueError for a field that must have its default."""
    found = defaults | {k: v for k, v in described.items() if k in defaults and v is not None}
    for key in ("do_resize", "resample", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize"):
        if key in defaults and abs(found[key] - defaults[key]) > 1e-6:
            raise ValueError(
                f"preprocessor_config.json: unsupported {key} = {found[key]!r}; expected {defaults[key]!r}"
            )
    return found


def _of_hugging_face(described: Mapping, image_size: int) -> View:
    found = _given(described, to_hugging_face(View(224, 224)))
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
