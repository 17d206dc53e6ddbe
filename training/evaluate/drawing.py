"""Pictures of results: grids of small images, and charts. Everything is a Pillow image in the end."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RIGHT", "WRONG", "Tile", "bars", "chart", "fitting", "grid", "heatmap", "overlay", "stack"]

Colour = tuple[int, int, int]
RIGHT, WRONG = (0, 137, 101), (213, 84, 0)
"""A green and an orange that people who cannot tell green from red tell apart, as in a run's pictures."""
GAP, FRAME, TEXT = 6, 4, 11
MOST_NAMES = 40
"""Names written along the side of a chart; more cannot be read."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One small image of a grid."""

    image: Image.Image
    caption: str = ""
    frame: Colour | None = None


def grid(rows: Sequence[Sequence[Tile]], *, side: int = 96, columns: Sequence[str] = ()) -> Image.Image:
    """Tiles in rows, each fitted into a square of `side` pixels with its caption below.

    Args:
        rows: Tiles from left to right; rows may differ in length.
        columns: Words above the columns.
    """
    font = ImageFont.load_default(TEXT)
    head = TEXT + GAP if columns else 0
    foot = TEXT + GAP if any(tile.caption for row in rows for tile in row) else 0
    cell = side + 2 * FRAME + GAP, side + 2 * FRAME + foot + GAP
    across = max((len(row) for row in rows), default=0)
    canvas = Image.new("RGB", (cell[0] * max(across, 1) + GAP, head + cell[1] * len(rows) + GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for column, words in enumerate(columns):
        draw.text((GAP + column * cell[0], GAP), fitting(words, cell[0] - GAP, font), "black", font)
    for at_row, row in enumerate(rows):
        for at_column, tile in enumerate(row):
            left, top = GAP + at_column * cell[0], GAP + head + at_row * cell[1]
            small = _fitted(tile.image, side)
            if tile.frame is not None:
                box = (left, top, left + side + 2 * FRAME - 1, top + side + 2 * FRAME - 1)
                draw.rectangle(box, fill="white", outline=tile.frame, width=FRAME)
            inside = (left + FRAME + (side - small.width) // 2, top + FRAME + (side - small.height) // 2)
            canvas.paste(small, inside)
            words = fitting(tile.caption, cell[0] - GAP, font)
            draw.text((left, top + side + 2 * FRAME + 1), words, "black", font)
    return canvas


def _fitted(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.BICUBIC
    return image.convert("RGB").resize(size, how)


def fitting(words: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The words, cut so that they are at most `width` pixels long."""
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(f"{words}…") > width:
        words = words[:-1]
    return f"{words}…"


def overlay(image: Image.Image, weights: NDArray[np.float32], colour: Colour = (255, 40, 40)) -> Image.Image:
    """The image with a colour laid over it.

    Args:
        image: RGB.
        weights: [h, w], 0..1: how much of the colour; resized to the image.
    """
    mask = Image.fromarray((np.clip(weights, 0, 1) * 255).astype(np.uint8)).resize(image.size)
    # At most 70%, so that what lies below can always be seen.
    mask = mask.point([round(0.7 * value) for value in range(256)])
    return Image.composite(Image.new("RGB", image.size, colour), image.convert("RGB"), mask)


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Images below one another on white."""
    canvas = Image.new("RGB", (max(one.width for one in images), sum(one.height for one in images)), "white")
    top = 0
    for one in images:
        canvas.paste(one, (0, top))
        top += one.height
    return canvas


def chart(draw: Callable[..., None], *, panels: int = 1, size: tuple[float, float] = (6, 4)) -> Image.Image:
    """A Matplotlib chart.

    Args:
        draw: Called with the axes, one for each panel.
        panels: Axes side by side.
        size: Of one panel, in hundreds of pixels.
    """
    # Without pyplot: no window system is asked for, and no figure outlives this function.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((size[0] * panels, size[1]), dpi=100, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw(*axes)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)  # type: ignore[no-untyped-call]
    return Image.open(file).convert("RGB")


def bars(axes: Axes, names: Sequence[str], values: Sequence[float], title: str) -> None:
    """Horizontal bars of shares 0..1, the first on top, each with its value."""
    places = np.arange(len(values))
    axes.barh(places, values, color="tab:blue")
    axes.set(xlim=(0, 1), title=title)
    axes.invert_yaxis()
    if len(names) > MOST_NAMES:
        axes.set_yticks([])
        return
    axes.set_yticks(places, [name[:24] for name in names], fontsize=min(9, 320 / max(len(names), 1)))
    for place, value in enumerate(values):
        inside = value > 0.85
        axes.text(
            value + (-0.01 if inside else 0.01),
            place,
            f"{value:.3f}",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            fontsize=min(8, 320 / len(names)),
        )


def heatmap(axes: Axes, matrix: NDArray[np.float64], names: Sequence[str], title: str) -> None:
    """A confusion matrix with the truth down the side; rows are shares of the true class."""
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if len(names) > MOST_NAMES:
        return
    ticks, size = np.arange(len(names)), min(9, 240 / max(len(names), 1))
    axes.set_xticks(ticks, [name[:16] for name in names], rotation=90, fontsize=size)
    axes.set_yticks(ticks, [name[:16] for name in names], fontsize=size)
    if len(names) <= 15:
        for row in range(len(names)):
            for column in range(len(names)):
                shade = "white" if shares[row, column] > 0.5 else "black"
                axes.text(
                    column,
                    row,
                    f"{matrix[row, column]:.0f}",
                    ha="center",
                    va="center",
                    color=shade,
                    fontsize=7,
                )
