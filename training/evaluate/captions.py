"""Retrieval across the towers: images find their captions, captions their images.

As papers after CLIP measure it (Radford et al. 2021, table 13; Karpathy and Fei-Fei 2015): any of an image's
captions is right for the image, and each caption is a query of its own. A wording that several images have is
right for all of them, and is one answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from embedserve.errors import InvalidField
from training.data import Source
from training.evaluate.captions_picture import CaptionsFound, ImagesFound, captions_picture
from training.evaluate.encoder import EvaluationEncoder, require_reader
from training.evaluate.labels import Images, embed_chosen, unseen_rows
from training.evaluate.ranking import ahead
from training.evaluate.report import PICTURE_ONLY, Progress, silent
from training.precision import full_precision

__all__ = ["CaptionsResult", "CaptionsSettings", "Found", "Pairs", "evaluate_captions", "found_both_ways"]

Rows = NDArray[np.int64]

EXAMPLES, SHOWN = 5, 5
"""Queries that are drawn each way, and answers of each."""
PIXELS = 96


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionsSettings:
    """Settings of `captions`. `--set captions=` says where captions are, as for `train clip`."""

    images: Images = "auto"
    """auto: the data's test part, else what training held out, else all; or all."""
    most: int = 5000
    """Images at most, to find and to be found; more are drawn from."""
    seed: int = 0
    """Of that draw, and of the queries that are shown."""

    def __post_init__(self) -> None:
        if self.most < 2:
            raise InvalidField(f"most={self.most} images cannot be told apart; use 2 or more.", param="most")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One direction. Shares 0..1 of the queries."""

    recall_at_1: float
    """A right answer is nearest."""
    recall_at_5: float
    """A right answer is among the nearest five."""
    recall_at_10: float
    median_rank: float
    """Of the nearest right answer, from 1."""
    queries: int
    gallery: int
    """What can be found."""
    chance: float
    """recall_at_1 of a random order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionsResult:
    """Both directions."""

    image_to_text: Found
    text_to_image: Found
    images: int
    captions: int
    """All of these images; wordings that are the same count each time."""
    wordings: int
    """Different ones."""
    skipped: int = 0
    """Images that could not be read."""
    images_shown: tuple[CaptionsFound, ...] = field(metadata=PICTURE_ONLY)
    texts_shown: tuple[ImagesFound, ...] = field(metadata=PICTURE_ONLY)

    def summary(self) -> str:
        """Two lines for people."""
        return "\n".join(
            f"{way}: recall@1 {found.recall_at_1:.1%}, @5 {found.recall_at_5:.1%}, @10 "
            f"{found.recall_at_10:.1%}, median rank {found.median_rank:g} of {found.gallery:,} "
            f"({found.queries:,} queries, chance {found.chance:.1%})"
            for way, found in (
                ("image → caption", self.image_to_text),
                ("caption → image", self.text_to_image),
            )
        )

    def picture(self) -> Image.Image:
        """Images with the captions found, and captions with the images found; green is right."""
        return captions_picture(self.images_shown, self.texts_shown)


class Pairs:
    """Which captions belong to which of N images, each wording once.

    Attributes:
        wordings: The W different captions.
        images, texts: int64 [P]: the image and the wording of every caption, image after image.
    """

    def __init__(self, captions: tuple[tuple[str, ...], ...]) -> None:
        number: dict[str, int] = {}
        said = [
            (row, number.setdefault(text, len(number)))
            for row, texts in enumerate(captions)
            for text in texts
        ]
        self.wordings = tuple(number)
        self.images, self.texts = np.array(said, np.int64).T

    def of_images(self, start: int, end: int) -> Tensor:
        """bool [end - start, W]: the wordings of some images."""
        return _matrix(self.images, self.texts, start, end, len(self.wordings))

    def of_texts(self, start: int, end: int, images: int) -> Tensor:
        """bool [end - start, images]: the images of some wordings."""
        return _matrix(self.texts, self.images, start, end, images)


def _matrix(rows: Rows, columns: Rows, start: int, end: int, width: int) -> Tensor:
    found = torch.zeros(end - start, width, dtype=torch.bool)
    some = (rows >= start) & (rows < end)
    found[rows[some] - start, columns[some]] = True
    return found


def evaluate_captions(
    encoder: EvaluationEncoder, source: Source, settings: CaptionsSettings, progress: Progress = silent
) -> CaptionsResult:
    """Retrieval by cosine, both ways.

    Raises:
        InvalidField: An encoder without text, data without captions, or a single image or wording.
    """
    reader = require_reader(encoder, "captions")
    if source.captions is None:
        raise InvalidField(
            f"'{source.name}' was opened without captions; give open_source(captions=CaptionRules()).",
            param="data",
        )

    def chosen(source: Source) -> Rows:
        rows = unseen_rows(source, encoder, settings.images)
        some: Rows = np.random.default_rng(settings.seed).permutation(rows)[: settings.most]
        return np.sort(some)

    embedded = embed_chosen(encoder, source, chosen, progress)
    chance = np.random.default_rng(settings.seed)
    captions = embedded.source.captions
    pairs = Pairs(captions or ())
    images = len(embedded.source)
    if images < 2 or len(pairs.wordings) < 2:
        raise InvalidField(
            f"captions tells images and wordings apart, and there are {images} and {len(pairs.wordings)} in "
            f"'{source.name}' to choose from; it takes two of each at least (images=all takes all).",
            param="data",
        )
    texts = reader.embed(pairs.wordings, progress=progress)
    to_text, to_image = found_both_ways(embedded.vectors, texts, pairs)
    shown_images = np.sort(chance.permutation(images)[:EXAMPLES])
    shown_texts = np.sort(chance.permutation(len(pairs.wordings))[:EXAMPLES])
    near_texts = _nearest(embedded.vectors, texts, shown_images)
    near_images = _nearest(texts, embedded.vectors, shown_texts)

    def picture(row: int) -> Image.Image:
        image = embedded.source.read(row, shrink_to=PIXELS)
        image.thumbnail((2 * PIXELS, 2 * PIXELS))
        return image

    right_texts = _right(shown_images, near_texts, pairs.of_images)
    right_images = _right(shown_texts, near_images, lambda one, end: pairs.of_texts(one, end, images))
    return CaptionsResult(
        image_to_text=to_text,
        text_to_image=to_image,
        images=images,
        captions=len(pairs.images),
        wordings=len(pairs.wordings),
        skipped=len(embedded.skipped),
        images_shown=tuple(
            CaptionsFound(
                picture(query), [(pairs.wordings[one], good) for one, good in zip(near, right, strict=True)]
            )
            for query, near, right in zip(shown_images.tolist(), near_texts, right_texts, strict=True)
        ),
        texts_shown=tuple(
            ImagesFound(
                pairs.wordings[query], [(picture(one), good) for one, good in zip(near, right, strict=True)]
            )
            for query, near, right in zip(shown_texts.tolist(), near_images, right_images, strict=True)
        ),
    )


def found_both_ways(images: Tensor, texts: Tensor, pairs: Pairs) -> tuple[Found, Found]:
    """Image → caption and caption → image.

    Args:
        images: [N, dim], of any length.
        texts: [W, dim], of each wording.
    """
    device, count = images.device, len(images)
    of_images = ahead(images, texts, lambda start, end: pairs.of_images(start, end).to(device)).cpu().numpy()
    of_texts = (
        ahead(texts, images, lambda start, end: pairs.of_texts(start, end, count).to(device)).cpu().numpy()
    )
    wordings = len(pairs.wordings)
    # Each wording of an image once, and for a wording each of its images.
    own = np.bincount(pairs.images, minlength=count)
    shared = np.bincount(pairs.texts, minlength=wordings)
    return (
        _found(of_images, wordings, own),
        _found(of_texts[pairs.texts], count, shared[pairs.texts]),
    )


def _found(before: Rows, gallery: int, right: Rows) -> Found:
    at = {k: float((before < k).mean()) for k in (1, 5, 10)}
    return Found(
        recall_at_1=at[1],
        recall_at_5=at[5],
        recall_at_10=at[10],
        median_rank=float(np.median(before + 1)),
        queries=len(before),
        gallery=gallery,
        chance=float((right / gallery).mean()),
    )


@full_precision
def _nearest(queries: Tensor, gallery: Tensor, rows: Rows) -> list[list[int]]:
    chosen = queries[torch.from_numpy(rows).to(queries.device)].float()
    cosines = chosen @ torch.nn.functional.normalize(gallery.float(), dim=1).T
    found: list[list[int]] = cosines.topk(min(SHOWN, len(gallery)), dim=1).indices.tolist()
    return found


def _right(rows: Rows, found: list[list[int]], belongs: Callable[[int, int], Tensor]) -> list[list[bool]]:
    return [belongs(row, row + 1)[0, near].tolist() for row, near in zip(rows.tolist(), found, strict=True)]
