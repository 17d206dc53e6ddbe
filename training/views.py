"""What a method wants to see of an image: declarative views. `training.augment` makes them.

The defaults are SimCLR's (Chen et al. 2020, appendix A) for photographs; `Augmentation.suited_to` keeps what
works on small images. A method turns one `Augmentation` into its views:

    views = (augmentation.view(size), augmentation.view(size, of="partner"))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embedserve.errors import InvalidField

__all__ = ["SMALL_IMAGE", "Augmentation", "View"]

SMALL_IMAGE = 64
"""Pixels of a side up to which the recipe for small images is used: no blur, and a small-image stem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How one view of an image is drawn. Every sample of a batch draws its own parameters.

    The operations run in this order: random resized crop, flip, colour jitter (its four parts in random
    order), grayscale, blur, solarise, normalise.
    """

    size: int
    """Pixels of a side of the view, which is square."""
    scale: tuple[float, float]
    """Least and largest share of the image's area that the crop covers."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Least and largest width ÷ height of the crop, drawn log-uniformly."""
    flip: float
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float, float]
    """Strength of brightness, contrast, saturation (factor in 1 ± strength) and hue (± turns)."""
    jitter_probability: float
    grayscale: float
    """Probability of losing all colour."""
    blur: float
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float]
    """Least and largest standard deviation of the blur, in pixels of a view of 224; scaled with the size."""
    solarize: float = 0.0
    """Probability of inverting all pixels of 0.5 and more."""
    of: Literal["image", "partner"] = "image"
    """'partner' is another image of the same group where there are groups, else the image itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """How strongly views differ, whatever the method. Raises InvalidField for numbers that make no sense."""

    crop_min: float = 0.2
    """Least share of the image's area in a full-size view (SimCLR's paper has 0.08 on ImageNet)."""
    flip: float = 0.5
    """Probability of a horizontal flip; 0 where left and right differ (text, signs, X-rays)."""
    brightness: float = 0.4
    """Brightness jitter: a factor of 1 ± this."""
    contrast: float = 0.4
    """Contrast jitter: a factor of 1 ± this."""
    saturation: float = 0.4
    """Saturation jitter: a factor of 1 ± this."""
    hue: float = 0.1
    """Hue jitter in turns of the colour circle, 0..0.5."""
    jitter: float = 0.8
    """Probability of the colour jitter."""
    grayscale: float = 0.2
    """Probability of losing all colour."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grayscale", "blur"):
            _within(name, getattr(self, name), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            _within(name, getattr(self, name), 0, 1)
        _within("hue", self.hue, 0, 0.5)
        _within("crop_min", self.crop_min, 1e-3, 1)

    @classmethod
    def suited_to(cls, size: int) -> Augmentation:
        """The defaults for views of `size` pixels: up to `SMALL_IMAGE` there is no blur."""
        return cls(blur=0.0) if size <= SMALL_IMAGE else cls()

    def view(
        self,
        size: int,
        *,
        scale: tuple[float, float] | None = None,
        blur: float | None = None,
        solarize: float = 0.0,
        of: Literal["image", "partner"] = "image",
        full_size: int | None = None,
    ) -> View:
        """A view of `size` pixels.

        Args:
            scale: Share of the area; from `crop_min` to 1 where it is not given.
            blur: Where a paper blurs its views unequally (BYOL 1 and .1): its probability. It is ignored when
                blur is switched off.
            solarize: As in `View`.
            of: As in `View`.
            full_size: For a small crop, pixels of the full-size views beside it: it is blurred by as many
                pixels as they are (SwAV and DINO).
        """
        wider = 1.0 if full_size is None else full_size / size
        return View(
            size=size,
            scale=(self.crop_min, 1.0) if scale is None else scale,
            flip=self.flip,
            jitter=(self.brightness, self.contrast, self.saturation, self.hue),
            jitter_probability=self.jitter,
            grayscale=self.grayscale,
            blur=blur if blur is not None and self.blur > 0 else self.blur,
            blur_sigma=(0.1 * wider, 2.0 * wider),
            solarize=solarize,
            of=of,
        )


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise InvalidField(f"{name}={value} is not within {least:g} to {most:g}.", param=name)
