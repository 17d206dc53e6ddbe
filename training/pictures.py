"""The pictures of a run: what the method sees of images, and what lies near what in the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from training.augment import IMAGENET_MEAN, IMAGENET_STD, show
from training.batches import Batches
from training.data import Pixels
from training.online import Measured, OnlineEvaluation, evaluation_views
from training.views import View
from training.watch import neighbours_picture, views_picture

__all__ = ["draw_neighbours", "draw_views"]

EXAMPLES, NEIGHBOURS = 8, 8


def draw_views(path: Path, batches: Batches, size: int) -> None:
    """The views of the first images of the first step, beside the images."""
    rows = batches.rows[batches.order.rows(0)[:EXAMPLES]]
    parts = batches.from_step(0, 1)
    views = next(parts).views
    parts.close()
    views_picture(
        _shown(batches.pixels, rows, size),
        [show(view[:EXAMPLES], IMAGENET_MEAN, IMAGENET_STD).cpu().numpy() for view in views],
        path,
        names=_view_names(batches.views, size),
    )


def draw_neighbours(path: Path, online: OnlineEvaluation, measured: Measured, size: int) -> None:
    """The nearest training images of some held-out ones (of training images where nothing was held out)."""
    queries, rows, skipped = measured.queries, online.queries, 0
    if not len(rows):
        queries, rows, skipped = measured.bank, online.bank, 1  # the nearest of all is the image itself
    chosen = np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).astype(np.int64)
    cosines = F.normalize(queries[torch.from_numpy(chosen)], dim=1) @ F.normalize(measured.bank, dim=1).T
    nearest = (
        cosines.topk(min(NEIGHBOURS + skipped, len(online.bank)), dim=1).indices[:, skipped:].cpu().numpy()
    )
    found = online.bank[nearest]
    labels = online.pixels.source.labels
    right = (labels[found] == labels[rows[chosen]][:, None]) if online.labelled else None
    pictures = _shown(online.pixels, found.reshape(-1), size)
    neighbours_picture(
        _shown(online.pixels, rows[chosen], size),
        pictures.reshape(*found.shape, *pictures.shape[1:]),
        right,
        path,
    )


def _view_names(views: Sequence[View], size: int) -> list[str]:
    full = sum(view.size == size for view in views)
    if full == len(views):
        return []
    return [f"view {at + 1}" if at < full else f"crop {at + 1 - full}" for at in range(len(views))]


def _shown(pixels: Pixels, rows: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    views = evaluation_views(pixels, rows, size)
    return show(views, IMAGENET_MEAN, IMAGENET_STD).cpu().numpy()
