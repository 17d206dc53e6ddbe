"""How an image becomes numbers, read from the files that come with a model.

Each reader gives the same thing twice: as our `Preprocessing`, which serving follows, and as a literal
version of their steps with Pillow and NumPy, which the proof follows. The second uses nothing of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedserve.bundle import Preprocessing
from embedserve.errors import BundleError

__all__ = ["PixelRules", "from_huggingface", "from_open_clip"]

Interpolation = Literal["bilinear", "bicubic", "lanczos"]

_BY_NUMBER: Mapping[int, Interpolation] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
_FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelRules:
    """Resizing, and the arithmetic after it: (pixel · scale − mean) / std."""

    preprocessing: Preprocessing
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    literal: Callable[[Image.Image], Image.Image]
    """Their resizing and cropping of a whole RGB image."""

    def their_pixels(self, image: Image.Image) -> NDArray[np.uint8]:
        """uint8 [height, width, 3]."""
        return np.asarray(self.literal(image))

    def their_numbers(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """float32 [height, width, 3], normalised."""
        numbers: NDArray[np.float32] = pixels.astype(np.float32) * np.float32(self.scale)
        numbers -= np.asarray(self.mean, np.float32)
        numbers /= np.asarray(self.std, np.float32)
        return numbers


def from_huggingface(config: Mapping[str, Any], where: str) -> PixelRules:
    """The rules of a `preprocessor_config.json`, as transformers' image processors read it.

    Raises:
        BundleError: It asks for something that serving cannot do, or leaves the size open.
    """
    crop = _sides(config.get("crop_size")) if config.get("do_center_crop", "crop_size" in config) else None
    size = config.get("size")
    if not config.get("do_resize", True) or size is None:
        raise BundleError(
            f"'{where}' does not resize images to one size; only models with a fixed input size can be "
            f"pulled. It says size={size!r}, do_resize={config.get('do_resize')!r}."
        )
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else size if crop else None
    filter_name = _interpolation(config.get("resample", 3), where)
    if shortest is not None and crop is None:
        raise BundleError(
            f"'{where}' resizes the shortest side to {shortest} and crops nothing, so images keep different "
            "sizes; only models with a fixed input size can be pulled."
        )
    stretched = None if shortest is not None else _sides(size)
    height, width = crop or stretched or (0, 0)
    if (stretched is None and shortest is None) or not height:
        raise BundleError(
            f"'{where}' gives the size as {size!r}; known are shortest_edge with a crop_size, and height "
            "with width."
        )
    if stretched is not None and crop is not None and stretched[0] * crop[1] != stretched[1] * crop[0]:
        raise BundleError(
            f"'{where}' stretches images to {stretched} and crops them to {crop}, of another shape; that "
            "cannot be served."
        )
    normalises = config.get("do_normalize", True)
    return PixelRules(
        preprocessing=Preprocessing(
            height=height,
            width=width,
            resize="shortest" if stretched is None else "squash",
            resize_to=shortest if stretched is None else min(stretched),
            interpolation=filter_name,
            odd_crop="down",
        ),
        scale=float(config.get("rescale_factor", 1 / 255)) if config.get("do_rescale", True) else 1.0,
        mean=_three(config.get("image_mean", 0.5)) if normalises else (0.0, 0.0, 0.0),
        std=_three(config.get("image_std", 0.5)) if normalises else (1.0, 1.0, 1.0),
        literal=lambda image: _crop(
            image.resize((stretched[1], stretched[0]), _FILTERS[filter_name])
            if stretched is not None
            else _shortest_to(image, int(shortest or 0), filter_name),
            height,
            width,
            begin=math.floor,
        ),
    )


def from_open_clip(config: Mapping[str, Any], where: str) -> PixelRules:
    """The rules of a `preprocess_cfg.json`, as open_clip's `image_transform` reads it.

    Raises:
        BundleError: It asks for something that serving cannot do.
    """
    sides = _sides(config.get("size"))
    if sides is None:
        raise BundleError(f"'{where}' gives the size as {config.get('size')!r}; needed is a number or two.")
    height, width = sides
    mode = config.get("resize_mode") or "shortest"
    # open_clip itself knows two, and reads everything that is not 'bilinear' as bicubic
    filter_name: Interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"
    if mode not in {"shortest", "longest", "squash"} or (mode != "squash" and height != width):
        raise BundleError(
            f"'{where}' says resize_mode={mode!r} for {height} × {width}; known are shortest and longest for "
            "squares, and squash."
        )
    fill = int(config.get("fill_color") or 0)

    def literal(image: Image.Image) -> Image.Image:
        if mode == "squash":
            return image.resize((width, height), _FILTERS[filter_name])
        if mode == "shortest":
            return _crop(_shortest_to(image, height, filter_name), height, width, begin=round)
        longest = max(image.size)
        small = image.resize(
            (round(image.width * width / longest), round(image.height * height / longest)),
            _FILTERS[filter_name],
        )
        square = Image.new("RGB", (width, height), (fill, fill, fill))
        square.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
        return square

    return PixelRules(
        preprocessing=Preprocessing(
            height=height,
            width=width,
            resize=mode,
            resize_to=min(height, width),
            interpolation=filter_name,
            background=(fill, fill, fill) if mode == "longest" else (255, 255, 255),
        ),
        scale=1 / 255,
        mean=_three(config["mean"]),
        std=_three(config["std"]),
        literal=literal,
    )


def _shortest_to(image: Image.Image, target: int, filter_name: Interpolation) -> Image.Image:
    short, long = sorted(image.size)
    other = int(target * long / short)
    shape = (target, other) if image.width <= image.height else (other, target)
    return image.resize(shape, _FILTERS[filter_name])


def _crop(image: Image.Image, height: int, width: int, *, begin: Callable[[float], int]) -> Image.Image:
    left, top = begin((image.width - width) / 2), begin((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _sides(size: object) -> tuple[int, int] | None:
    """(height, width), where both are said."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return int(size["height"]), int(size["width"])
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _three(value: float | Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = (value,) * 3 if isinstance(value, int | float) else value
    return float(red), float(green), float(blue)


def _interpolation(number: int, where: str) -> Interpolation:
    if number not in _BY_NUMBER:
        known = ", ".join(f"{key} ({name})" for key, name in _BY_NUMBER.items())
        raise BundleError(f"'{where}' says resample={number}; known are {known}.")
    return _BY_NUMBER[number]
