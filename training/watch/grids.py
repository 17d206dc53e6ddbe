"""Pictures made of small images: what a method sees, and which images it finds alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from training.durable import replacing

__all__ = ["neighbours_picture", "views_picture"]

SIDE = 112
"""Pixels of a side of a full-size image in a picture; small ones are enlarged by a whole factor."""
MARGIN, GAP, DIVIDER, FRAME, LEAST_WIDTH = 20, 10, 34, 4, 56
TITLE, DETAIL = 15, 12
INK, GREY, LINE = (32, 33, 36), (120, 124, 130), (222, 224, 228)
RIGHT, WRONG = (0, 137, 101), (213, 84, 0)
"""Green and orange that stay apart for people who cannot tell green from red."""

Colour = tuple[int, int, int]
Pictures = NDArray[np.uint8]


def views_picture(
    images: Pictures, views: Sequence[Pictures], path: Path, *, names: Sequence[str] = ()
) -> None:
    """Draws images and their views as a PNG: a row for each image, its views beside it in their true sizes.

    Args:
        images: uint8 [n, S, S, 3].
        views: For each view uint8 [n, s, s, 3]; sizes may differ.
        path: The file, replaced whole.
        names: What the views are called; 'view 1', 'view 2', … where it is not given.

    Raises:
        EmbedServeError: The file cannot be written.
    """
    scale = _scale(max((view.shape[1] for view in views), default=images.shape[1]))
    columns = [images, *views]
    titles = ["image", *(names or [f"view {at + 1}" for at in range(len(views))])]
    widths = [max(round(pixels.shape[1] * scale), LEAST_WIDTH) for pixels in columns]
    sheet = _Sheet(len(images), widths, row=max(widths), head=TITLE + DETAIL + 14)
    for pixels, title, at in zip(columns, titles, range(len(columns)), strict=True):
        sheet.heading(at, title, f"{pixels.shape[1]} pixels")
        for row, picture in enumerate(pixels):
            sheet.outlined(_tile(picture, scale), row, at)
    sheet.write(path)


def neighbours_picture(
    queries: Pictures, neighbours: Pictures, right: NDArray[np.bool_] | None, path: Path
) -> None:
    """Draws images and their nearest neighbours as a PNG, the nearest first.

    Args:
        queries: uint8 [n, s, s, 3].
        neighbours: uint8 [n, k, s, s, 3].
        right: bool [n, k], whether a neighbour has the query's label; None where there are no labels.
        path: The file, replaced whole.

    Raises:
        EmbedServeError: The file cannot be written.
    """
    scale, frame = _scale(queries.shape[1]), FRAME if right is not None else 0
    width = max(round(queries.shape[1] * scale) + 2 * frame, LEAST_WIDTH)
    widths = [width] * (1 + neighbours.shape[1])
    sheet = _Sheet(len(queries), widths, row=width, head=TITLE + 10, foot=DETAIL + 16 if frame else 0)
    sheet.heading(0, "image")
    for rank in range(1, len(widths)):
        sheet.heading(rank, "nearest" if rank == 1 else str(rank))
    for row, query in enumerate(queries):
        sheet.outlined(_tile(query, scale), row, 0)
        for at, neighbour in enumerate(neighbours[row]):
            if right is None:
                sheet.outlined(_tile(neighbour, scale), row, at + 1)
            else:
                sheet.judged(_tile(neighbour, scale), row, at + 1, right=bool(right[row, at]))
    if right is not None:
        sheet.legend(right)
    sheet.write(path)


# --------------------------------------------------------------------------------------------- drawing


class _Sheet:
    """White paper with a grid of pictures, whose first column stands apart."""

    def __init__(self, rows: int, widths: Sequence[int], *, row: int, head: int, foot: int = 0) -> None:
        gaps = [0, DIVIDER, *[GAP] * (len(widths) - 2)][: len(widths)]
        self._lefts = [MARGIN + sum(widths[:at]) + sum(gaps[: at + 1]) for at in range(len(widths))]
        self._tops = [MARGIN + head + at * (row + GAP) for at in range(rows)]
        self._widths, self._row = widths, row
        below = MARGIN + head + rows * (row + GAP) - GAP
        self.image = Image.new("RGB", (self._lefts[-1] + widths[-1] + MARGIN, below + foot + MARGIN), "white")
        self._draw = ImageDraw.Draw(self.image)
        if len(widths) > 1:
            middle = MARGIN + widths[0] + DIVIDER // 2
            self._draw.line((middle, MARGIN, middle, below), fill=LINE, width=2)

    def heading(self, column: int, title: str, detail: str = "") -> None:
        left, width = self._lefts[column], self._widths[column]
        for words, size, colour, top in ((title, TITLE, INK, 0), (detail, DETAIL, GREY, TITLE + 4)):
            font = ImageFont.load_default(size)
            while words and font.getlength(words) > width + GAP:
                words = words[:-1]  # noqa: PLW2901
            self._draw.text((left + (width - font.getlength(words)) / 2, MARGIN + top), words, colour, font)

    def outlined(self, tile: Image.Image, row: int, column: int) -> None:
        """A picture with a thin line around it, so that a white one has an edge."""
        self._framed(tile, row, column, LINE, 1)

    def judged(self, tile: Image.Image, row: int, column: int, *, right: bool) -> None:
        """A picture in a frame of the colour of right or wrong, and with a tick or a cross."""
        left, top = self._framed(tile, row, column, RIGHT if right else WRONG, FRAME)
        badge = _badge(right)
        self.image.paste(badge, (left + tile.width + FRAME - badge.width, top - FRAME))

    def _framed(
        self, tile: Image.Image, row: int, column: int, colour: Colour, frame: int
    ) -> tuple[int, int]:
        left = self._lefts[column] + (self._widths[column] - tile.width) // 2
        top = self._tops[row] + (self._row - tile.height) // 2
        box = (left - frame, top - frame, left + tile.width + frame - 1, top + tile.height + frame - 1)
        self._draw.rectangle(box, fill=colour)
        self.image.paste(tile, (left, top))
        return left, top

    def legend(self, right: NDArray[np.bool_]) -> None:
        """How many are right, at the foot."""
        font = ImageFont.load_default(DETAIL + 1)
        left, top, hits = MARGIN, self.image.height - MARGIN - DETAIL, int(right.sum())
        for colour, words in (
            (RIGHT, f"same label: {hits} of {right.size}"),
            (WRONG, f"another label: {right.size - hits} of {right.size}"),
        ):
            self._draw.rectangle((left, top, left + DETAIL, top + DETAIL), fill=colour)
            self._draw.text((left + DETAIL + 8, top - 2), words, INK, font)
            left += DETAIL + 8 + round(font.getlength(words)) + 28

    def write(self, path: Path) -> None:
        with replacing(path) as file:
            self.image.save(file, "PNG", optimize=True)


def _badge(right: bool) -> Image.Image:
    size, fine = 20, 4  # drawn four times as large, for smooth edges
    badge = Image.new("RGB", (size * fine, size * fine), RIGHT if right else WRONG)
    draw = ImageDraw.Draw(badge)
    strokes = [((5, 10), (9, 14), (15, 6))] if right else [((6, 6), (14, 14)), ((14, 6), (6, 14))]
    for stroke in strokes:
        draw.line([(x * fine, y * fine) for x, y in stroke], "white", 2 * fine + 1, joint="curve")
    return badge.resize((size, size), Image.Resampling.LANCZOS)


def _scale(size: int) -> float:
    """How much images of `size` pixels are enlarged: by a whole number, for pixels to stay square."""
    return float(SIDE // size) if size * 2 <= SIDE else SIDE / size


def _tile(pixels: Pictures, scale: float) -> Image.Image:
    image = Image.fromarray(pixels)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    whole = scale >= 1 and scale == int(scale)
    return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)
