"""The picture of a retrieval across the towers: some queries each way, with what was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from training.evaluate.drawing import RIGHT, WRONG, Tile, fitting, grid, stack

__all__ = ["CaptionsFound", "ImagesFound", "captions_picture"]

WIDTH, LINE, SIZE, EDGE = 720, 18, 12, 6


@dataclass(frozen=True, slots=True)
class CaptionsFound:
    """An image, and the captions nearest to it with whether they are right."""

    image: Image.Image
    captions: Sequence[tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class ImagesFound:
    """A caption, and the images nearest to it with whether they are right."""

    caption: str
    images: Sequence[tuple[Image.Image, bool]]


def captions_picture(images: Sequence[CaptionsFound], texts: Sequence[ImagesFound]) -> Image.Image:
    """Images with their captions on top, captions with their images below; green is right, orange is not."""
    parts = [_line("captions that images find", "black")]
    parts += [_beside(one) for one in images]
    parts.append(_line("images that captions find", "black"))
    for one in texts:
        tiles = [Tile(image, "", RIGHT if right else WRONG) for image, right in one.images]
        parts += [_line(f"“{one.caption}”", "black"), grid([tiles])]
    return stack(parts)


def _beside(one: CaptionsFound) -> Image.Image:
    tile = grid([[Tile(one.image)]])
    lines = [
        _line(f"{'✓' if right else '✗'}  {text}", RIGHT if right else WRONG, WIDTH - tile.width)
        for text, right in one.captions
    ]
    canvas = Image.new("RGB", (WIDTH, max(tile.height, LINE * len(lines))), "white")
    canvas.paste(tile, (0, 0))
    if lines:
        canvas.paste(stack(lines), (tile.width, 0))
    return canvas


def _line(text: str, colour: str | tuple[int, int, int], width: int = WIDTH) -> Image.Image:
    font = _font()
    canvas = Image.new("RGB", (width, LINE), "white")
    ImageDraw.Draw(canvas).text((EDGE, 2), fitting(text, width - 2 * EDGE, font), colour, font)
    return canvas


def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's own, which has more scripts than Pillow's."""
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", SIZE)
