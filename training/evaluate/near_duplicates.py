"""Near-duplicates: whether an image is recognised after what happens to images on their way."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps
from torch import Tensor

from embedserve.errors import InvalidField
from training.data import Source
from training.data.ahead import in_order
from training.evaluate.drawing import Tile, bars, chart, grid, stack
from training.evaluate.embedding import READERS, EvaluationEncoder
from training.evaluate.report import PICTURE_ONLY, Progress, silent
from training.precision import full_precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "TRANSFORMATIONS",
    "DuplicatesResult",
    "DuplicatesSettings",
    "Recognition",
    "area_under_curve",
    "compare",
    "evaluate_near_duplicates",
]

Rows = NDArray[np.int64]
Chance = np.random.Generator
WHITE = (255, 255, 255)
LONGEST = 1024
"""Pixels of the longer side of a copy, at most: what the web shows, and quick to make."""
TOGETHER = 64
"""Images whose copies are made and embedded at a time; they are kept in memory meanwhile."""
EXAMPLES = 3
EQUAL = 1e-6
"""Cosines this close are equal: rounding must not decide between two equal images."""


# ------------------------------------------------------------------------------------- transformations


def _jpeg(image: Image.Image, chance: Chance) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=25)
    return Image.open(file).convert("RGB")


def _crop(share: float) -> Callable[[Image.Image, Chance], Image.Image]:
    """Loses that share of the area, from a random place."""

    def crop(image: Image.Image, chance: Chance) -> Image.Image:
        width = max(1, round(image.width * math.sqrt(1 - share)))
        height = max(1, round(image.height * math.sqrt(1 - share)))
        left = int(chance.integers(image.width - width + 1))
        top = int(chance.integers(image.height - height + 1))
        return image.crop((left, top, left + width, top + height))

    return crop


def _resize(image: Image.Image, chance: Chance) -> Image.Image:
    small = max(1, image.width // 3), max(1, image.height // 3)
    return image.resize(small, Image.Resampling.BILINEAR)


def _stretch(image: Image.Image, chance: Chance) -> Image.Image:
    wide = bool(chance.integers(2))
    width, height = (image.width * (1.2 if wide else 1), image.height * (1 if wide else 1.2))
    return image.resize((round(width), round(height)), Image.Resampling.BILINEAR)


def _rotate(image: Image.Image, chance: Chance) -> Image.Image:
    angle = 10 if chance.integers(2) else -10
    return image.rotate(angle, Image.Resampling.BICUBIC, expand=True, fillcolor=WHITE)


def _blur(image: Image.Image, chance: Chance) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(0.5, 0.02 * min(image.size))))


def _colour(image: Image.Image, chance: Chance) -> Image.Image:
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = change(image).enhance(float(chance.choice([0.7, 1.3])))
    return image


def _gray(image: Image.Image, chance: Chance) -> Image.Image:
    return image.convert("L").convert("RGB")


def _mirror(image: Image.Image, chance: Chance) -> Image.Image:
    return ImageOps.mirror(image)


def _caption(image: Image.Image, chance: Chance) -> Image.Image:
    bar = max(1, round(0.18 * image.height))
    canvas = Image.new("RGB", (image.width, image.height + bar), "black")
    canvas.paste(image, (0, 0))
    font = ImageFont.load_default(max(4, round(0.6 * bar)))
    ImageDraw.Draw(canvas).text((bar // 4, image.height + bar // 6), "When you see it", WHITE, font)
    return canvas


TRANSFORMATIONS: dict[str, Callable[[Image.Image, Chance], Image.Image]] = {
    "JPEG, quality 25": _jpeg,
    "crop, 10% lost": _crop(0.1),
    "crop, 30% lost": _crop(0.3),
    "resized to a third": _resize,
    "stretched by 20%": _stretch,
    "turned by 10°": _rotate,
    "blurred": _blur,
    "colours ± 30%": _colour,
    "gray": _gray,
    "mirrored": _mirror,
    "caption bar": _caption,
}
"""Name → what makes the copy: an RGB image and random numbers in, an RGB image out."""


def _copy(image: Image.Image, name: str, seed: int, row: int) -> Image.Image:
    """A copy of the image that was drawn as number `row`; the same one every time."""
    place = list(TRANSFORMATIONS).index(name)
    return TRANSFORMATIONS[name](image, np.random.default_rng((seed, place, row)))


def _shrunk(source: Source, row: int) -> Image.Image:
    image = source.read(row, shrink_to=LONGEST)
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.BICUBIC)
    return image


@dataclass(frozen=True, slots=True)
class _Copies:
    """Fetches the copies of some images: all of the first image, then all of the second, and so on."""

    images: Sequence[Image.Image]
    first: int
    """Number of the first image among all that were drawn."""
    seed: int

    def __call__(self, row: int) -> NDArray[np.uint8]:
        image, place = divmod(row, len(TRANSFORMATIONS))
        name = list(TRANSFORMATIONS)[place]
        return np.asarray(_copy(self.images[image], name, self.seed, self.first + image))


def _embed_copies(encoder: EvaluationEncoder, originals: Source, seed: int, progress: Progress) -> Tensor:
    """[images, transformations, dim]. Every image is decoded once."""
    parts = []
    for first in range(0, len(originals), TOGETHER):
        rows = np.arange(first, min(first + TOGETHER, len(originals)))
        read = partial(_shrunk, originals)
        images = list(in_order(read, rows.tolist(), threads=READERS, ahead=2 * READERS))
        many = originals.select(rows.repeat(len(TRANSFORMATIONS)))
        copies = encoder.embed(replace(many, fetch=_Copies(images, first, seed)), cached=False)
        if len(copies.source) < len(many):
            lost = copies.skipped[-1]
            raise InvalidField(f"A copy of '{lost.key}' cannot be embedded: {lost.reason}", param="data")
        parts.append(copies.vectors.view(len(rows), len(TRANSFORMATIONS), -1))
        progress(first + len(rows), len(originals))
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------- figures


@full_precision
@torch.no_grad()
def compare(copies: Tensor, gallery: Tensor, originals: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines of copies to their originals, and to the most similar other image.

    Args:
        copies: [m, dim], of any length.
        gallery: [n, dim], two images at least.
        originals: int64 [m]: which row of the gallery each copy was made of.

    Returns:
        float32 [m] twice.
    """
    copies, gallery = F.normalize(copies.float(), dim=1), F.normalize(gallery.float(), dim=1)
    own, other = [], []
    step = max(1, 2**25 // len(gallery))
    for start in range(0, len(copies), step):
        cosines = copies[start : start + step] @ gallery.T
        places = originals[start : start + step, None]
        own.append(cosines.gather(1, places)[:, 0])
        other.append(cosines.scatter(1, places, -torch.inf).amax(1))
    return torch.cat(own), torch.cat(other)


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Area under the ROC curve: the share of pairs in which the positive scores higher; equals count half."""
    positive, negative = positive.contiguous(), negative.sort().values
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().mean() / 2 / len(negative))


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicatesSettings:
    """Settings of `near_duplicates`."""

    images: int = 500
    """Images that copies are made of, drawn from all. All images can be found."""
    seed: int = 0
    """Of which images, and of what is random about the copies."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise InvalidField(f"images={self.images}: copies need 1 image or more.", param="images")


@dataclass(frozen=True, slots=True)
class Recognition:
    """How well copies of one kind are recognised."""

    recall_at_1: float
    """Share of copies that no other image is closer to than their original."""
    auc: float
    """Copy to original against copy to the closest other image: how well one threshold on the cosine tells
    duplicates from all else. 0.5 is chance, 1 is perfect."""
    cosine: float
    """Median cosine of copy and original."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DuplicatesResult:
    """Figures by transformation, and over all copies together."""

    recall_at_1: float
    """Mean over the transformations."""
    auc: float
    """Of all copies, with one threshold for all transformations."""
    threshold: float
    """The cosine that best parts copies from others: at or above it a pair is a duplicate."""
    transformations: dict[str, Recognition]
    images: int
    """Images that copies were made of."""
    gallery: int
    """Images that can be found."""
    skipped: int = 0
    """Images that could not be read."""
    examples: list[list[Tile]] = field(metadata=PICTURE_ONLY)

    def summary(self) -> str:
        """One or two lines for people."""
        name, worst = min(self.transformations.items(), key=lambda item: item[1].recall_at_1)
        return (
            f"near-duplicates recall@1 {self.recall_at_1:.1%}, AUC {self.auc:.4f}: copies of {self.images:,} "
            f"images in {len(self.transformations)} ways among {self.gallery:,}\n"
            f"hardest: {name}, recall@1 {worst.recall_at_1:.1%}; best threshold: cosine {self.threshold:.3f}"
        )

    def picture(self) -> Image.Image:
        """Bars for each transformation, and what the copies look like."""
        names, found = list(self.transformations), list(self.transformations.values())

        def draw(left: Axes, right: Axes) -> None:
            bars(left, names, [one.recall_at_1 for one in found], "recall@1")
            bars(right, names, [one.auc for one in found], "AUC")

        return stack([chart(draw, panels=2, size=(6, 4)), grid(self.examples, columns=("original", *names))])


def evaluate_near_duplicates(
    encoder: EvaluationEncoder,
    source: Source,
    settings: DuplicatesSettings,
    progress: Progress = silent,
) -> DuplicatesResult:
    """Embeds transformed copies and looks for their originals among all images. No labels are needed.

    Raises:
        InvalidField: There is only one image.
    """
    embedded = encoder.embed(source, progress=progress)
    source, gallery = embedded.source, embedded.vectors
    if len(source) < 2:
        raise InvalidField(
            f"'{source.name}' has a single image; finding copies takes two images at least.", param="data"
        )
    drawn = np.random.default_rng(settings.seed).permutation(len(source))[: settings.images]
    rows = np.sort(drawn).astype(np.int64)
    originals = source.select(rows)
    places = torch.from_numpy(rows).to(gallery.device)
    copies = _embed_copies(encoder, originals, settings.seed, progress)
    found = {name: compare(copies[:, place], gallery, places) for place, name in enumerate(TRANSFORMATIONS)}
    recognised = {
        name: Recognition(
            recall_at_1=float((own + EQUAL >= other).double().mean()),
            auc=area_under_curve(own, other),
            cosine=float(own.median()),
        )
        for name, (own, other) in found.items()
    }
    own, other = (torch.cat([pair[one] for pair in found.values()]) for one in (0, 1))
    return DuplicatesResult(
        recall_at_1=sum(one.recall_at_1 for one in recognised.values()) / len(recognised),
        auc=area_under_curve(own, other),
        threshold=_threshold(own, other),
        transformations=recognised,
        images=len(rows),
        gallery=len(source),
        skipped=len(embedded.skipped),
        examples=_examples(originals, settings.seed),
    )


def _threshold(positive: Tensor, negative: Tensor) -> float:
    """Where (share of positives at or above) - (share of negatives at or above) is largest (Youden's J)."""
    scores, order = torch.cat((positive, negative)).double().sort(descending=True)
    gains = torch.cat(
        (
            torch.full_like(positive, 1 / len(positive), dtype=torch.float64),
            torch.full_like(negative, -1 / len(negative), dtype=torch.float64),
        )
    )[order].cumsum(0)
    last_of_equals = torch.ones_like(scores, dtype=torch.bool)
    last_of_equals[:-1] = scores[:-1] != scores[1:]
    return float(scores[torch.where(last_of_equals, gains, -1.0).argmax()])


def _examples(originals: Source, seed: int) -> list[list[Tile]]:
    images = [_shrunk(originals, row) for row in range(min(EXAMPLES, len(originals)))]
    return [
        [Tile(image), *(Tile(_copy(image, name, seed, row)) for name in TRANSFORMATIONS)]
        for row, image in enumerate(images)
    ]
