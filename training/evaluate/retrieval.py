"""Retrieval: whether an image's nearest neighbours are those that belong with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from embedserve.errors import InvalidField
from training.data import Source, split
from training.evaluate.drawing import RIGHT, WRONG, Tile, grid
from training.evaluate.embedding import Embedded
from training.evaluate.encoder import EvaluationEncoder
from training.evaluate.report import PICTURE_ONLY, Progress, silent
from training.precision import full_precision

__all__ = ["RetrievalResult", "RetrievalSettings", "evaluate_retrieval", "leave_one_out", "nearest_others"]

Rows = NDArray[np.int64]

CHUNK = 2**23
"""Similarities sorted at once."""
EXAMPLES, NEIGHBOURS = 10, 8
SHOWN = 96
"""Pixels of a side of the pictures' images."""


@full_precision
@torch.no_grad()
def leave_one_out(features: Tensor, belongs: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks all other images by their cosine to each query.

    Args:
        features: [n, dim], of any length.
        belongs: int64 [n]: images with the same number are the ones to find.
        queries: int64 [m]: rows that are asked for. Each has at least one other image of its number.

    Returns:
        int64 [m]: the rank of the first right image, from 1. float64 [m]: average precision, the mean over
        the right images of the share of right ones up to there.
    """
    unit = F.normalize(features.float(), dim=1)
    n = len(unit)
    ranks = torch.arange(1, n, device=unit.device)
    firsts, precisions = [], []
    step = max(1, CHUNK // n)
    for start in range(0, len(queries), step):
        rows = queries[start : start + step]
        cosines = unit[rows] @ unit.T
        cosines.scatter_(1, rows[:, None], -torch.inf)  # the image itself comes last, and is cut off
        order = cosines.argsort(dim=1, descending=True, stable=True)[:, :-1]
        right = belongs[order] == belongs[rows][:, None]
        firsts.append(right.int().argmax(1) + 1)
        so_far = right.cumsum(1) / ranks
        precisions.append((so_far * right).sum(1, dtype=torch.float64) / right.sum(1))
    return torch.cat(firsts), torch.cat(precisions)


@full_precision
@torch.no_grad()
def nearest_others(features: Tensor, queries: Tensor, k: int) -> Tensor:
    """The k nearest rows of each query row by cosine, itself left out: int64 [m, k], at most n - 1."""
    unit = F.normalize(features.float(), dim=1)
    cosines = unit[queries] @ unit.T
    cosines.scatter_(1, queries[:, None], -torch.inf)
    return cosines.topk(min(k, len(unit) - 1), dim=1).indices


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSettings:
    """Settings of `retrieval`."""

    by: Literal["auto", "groups", "labels"] = "auto"
    """What belongs together: images of one group, or of one label; auto takes groups where there are."""
    queries: Literal["heldout", "all"] = "heldout"
    """Which images are asked for: those that training held out (all of a bundle's, and where it held none
    out), or all. Every other image can be found."""
    most: int = 5000
    """Images asked for at most; more are drawn from."""
    seed: int = 0
    """Of that draw."""

    def __post_init__(self) -> None:
        if self.most < 1:
            raise InvalidField(f"most={self.most} images cannot be asked for; use 1 or more.", param="most")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalResult:
    """Shares 0..1."""

    by: str
    """'groups' or 'labels'."""
    recall_at_1: float
    """Share of queries whose nearest other image belongs with them."""
    recall_at_5: float
    """A right image among the nearest five."""
    recall_at_10: float
    mean_average_precision: float
    """Over the whole ranking."""
    chance: float
    """recall_at_1 of a random order."""
    queries: int
    gallery: int
    """Images that can be found."""
    alone: int
    """Images that nothing belongs with; they are not asked for but can be found."""
    skipped: int = 0
    """Images that could not be read."""
    examples: list[list[Tile]] = field(metadata=PICTURE_ONLY)
    """For some queries: the query and its nearest others."""

    def summary(self) -> str:
        """One or two lines for people."""
        return (
            f"retrieval by {self.by}: recall@1 {self.recall_at_1:.1%}, @5 {self.recall_at_5:.1%}, "
            f"@10 {self.recall_at_10:.1%}, mAP {self.mean_average_precision:.1%} (chance {self.chance:.1%})\n"
            f"{self.queries:,} queries among {self.gallery:,} images"
        )

    def picture(self) -> Image.Image:
        """Queries drawn at random, each with its nearest others: green belongs with it, red does not."""
        return grid(self.examples, side=SHOWN, columns=("query", *map(str, range(1, NEIGHBOURS + 1))))


def evaluate_retrieval(
    encoder: EvaluationEncoder, source: Source, settings: RetrievalSettings, progress: Progress = silent
) -> RetrievalResult:
    """Leave-one-out retrieval by cosine.

    Raises:
        InvalidField: Neither groups nor labels, or no two images to ask for belong together.
    """
    _belongs(source, settings.by)
    embedded = encoder.embed(source, progress=progress)
    source = embedded.source
    by, belongs = _belongs(source, settings.by)
    known = belongs >= 0
    counts = np.bincount(belongs[known])
    others = np.where(known, counts[np.where(known, belongs, 0)] - 1, 0)
    allowed = np.zeros(len(source), bool)
    allowed[_askable(encoder, source, settings)] = True
    askable = np.flatnonzero(allowed & (others > 0))
    if not len(askable):
        raise InvalidField(
            f"No image of '{source.name}' that may be asked for has another one of its {by[:-1]}; give "
            "data with two images or more of one, or set queries=all.",
            param="queries",
        )
    chance = np.random.default_rng(settings.seed)
    queries = np.sort(chance.permutation(askable)[: settings.most])
    device = embedded.vectors.device
    first, precision = leave_one_out(
        embedded.vectors, torch.from_numpy(belongs).to(device), torch.from_numpy(queries).to(device)
    )
    return RetrievalResult(
        by=by,
        recall_at_1=float((first <= 1).double().mean()),
        recall_at_5=float((first <= 5).double().mean()),
        recall_at_10=float((first <= 10).double().mean()),
        mean_average_precision=float(precision.mean()),
        chance=float((others[queries] / (len(source) - 1)).mean()),
        queries=len(queries),
        gallery=len(source),
        alone=int((others == 0).sum()),
        skipped=len(embedded.skipped),
        examples=_examples(embedded, belongs, np.sort(chance.permutation(queries)[:EXAMPLES])),
    )


def _belongs(source: Source, by: str) -> tuple[str, Rows]:
    if by == "groups" or (by == "auto" and source.groups is not None):
        if source.groups is None:
            raise InvalidField(
                f"by=groups, but '{source.name}' has none; name what groups its images (group_by=folder, "
                "name, or a column), or use by=labels.",
                param="by",
            )
        return "groups", np.unique(source.groups, return_inverse=True)[1].reshape(-1).astype(np.int64)
    if not (source.labels >= 0).any():
        raise InvalidField(
            f"retrieval needs groups or labels, and '{source.name}' has neither. Name what groups its images "
            "(group_by=folder, name, or a column), or put them into a folder for each class. near_duplicates "
            "and attention need none.",
            param="data",
        )
    return "labels", source.labels


def _askable(encoder: EvaluationEncoder, source: Source, settings: RetrievalSettings) -> Rows:
    if settings.queries == "heldout" and encoder.holdout is not None:
        heldout = split(source, holdout=encoder.holdout, seed=encoder.seed)[1]
        if len(heldout):
            return heldout
    return np.arange(len(source))


def _examples(embedded: Embedded, belongs: Rows, queries: Rows) -> list[list[Tile]]:
    near = nearest_others(
        embedded.vectors, torch.from_numpy(queries).to(embedded.vectors.device), NEIGHBOURS
    ).cpu()

    def tile(row: int, frame: tuple[int, int, int] | None) -> Tile:
        image = embedded.source.read(row, shrink_to=SHOWN)
        image.thumbnail((2 * SHOWN, 2 * SHOWN))
        return Tile(image, "", frame)

    return [
        [
            tile(int(query), None),
            *(tile(one, RIGHT if belongs[one] == belongs[query] else WRONG) for one in found.tolist()),
        ]
        for query, found in zip(queries, near, strict=True)
    ]
