"""The queries on which two encoders differ most, as a picture."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from PIL import Image, ImageDraw, ImageFont

from embedserve.compare import Comparison, Neighbour
from embedserve.config import Limits
from embedserve.decode import decode
from embedserve.errors import EmbedServeError

__all__ = ["draw"]

TILE = 112
"""Pixels of a picture's side."""
GAP = 10
CAPTION = 16
MARGIN = 20
SHOWN = 6
"""Neighbours of each encoder."""

Colour = tuple[int, int, int]

PAPER, INK, SOFT = (255, 255, 255), (24, 32, 29), (110, 122, 116)
SHARED, OWN = (150, 168, 160), (200, 72, 20)
"""Frames: of a neighbour that both encoders have, and of one that only this one has."""


def draw(found: Comparison, folder: Path) -> Image.Image:
    """One block for each query: the query at the left, A's neighbours above B's, best first; framed in orange
    what the other encoder does not have among its neighbours.

    Args:
        found: With at least one query.
        folder: Where the images lie.
    """
    line = TILE + CAPTION + GAP
    block = 2 * line + GAP
    shown = min(SHOWN, found.k)
    head = 3 * CAPTION + MARGIN
    left = MARGIN + TILE + 3 * GAP
    width = left + shown * (TILE + GAP) + MARGIN
    sheet = _Sheet(width, head + len(found.queries) * block + MARGIN, folder)
    title = f"A {found.a.name} ({found.a.dim})  ·  B {found.b.name} ({found.b.dim})"
    sheet.write((MARGIN, MARGIN // 2), title, width - 2 * MARGIN, 14)
    summary = (
        f"{found.images} images · {found.overlap:.0%} of the {found.k} nearest shared · rank correlation "
        f"{found.rank_correlation:.2f} · orange: only this encoder has it"
    )
    sheet.write((MARGIN, MARGIN // 2 + CAPTION + 4), summary, width - 2 * MARGIN, 12)
    for number, query in enumerate(found.queries):
        top = head + number * block
        middle = top + line // 2
        sheet.tile((MARGIN, middle), query.image, PurePosixPath(query.image).name, INK, 3)
        sheet.write((MARGIN, middle + TILE + CAPTION), f"{query.overlap:.0%} shared", TILE)
        for letter, y, neighbours in (("A", top, query.a), ("B", top + line, query.b)):
            sheet.write((left - 2 * GAP, y + TILE // 2 - 7), letter, 2 * GAP, 13)
            for column, one in enumerate(neighbours[:shown]):
                sheet.neighbour((left + column * (TILE + GAP), y), one)
    return sheet.image


class _Sheet:
    def __init__(self, width: int, height: int, folder: Path) -> None:
        self.image = Image.new("RGB", (width, height), PAPER)
        self._pen = ImageDraw.Draw(self.image)
        self._folder = folder

    def neighbour(self, place: tuple[int, int], one: Neighbour) -> None:
        caption = f"{one.score:.2f} {PurePosixPath(one.image).name}"
        frame, width = (SHARED, 1) if one.shared else (OWN, 3)
        self.tile(place, one.image, caption, frame, width)

    def tile(self, place: tuple[int, int], image: str, caption: str, frame: Colour, width: int) -> None:
        x, y = place
        picture = _thumbnail(self._folder / image)
        if picture is not None:
            self.image.paste(picture, (x + (TILE - picture.width) // 2, y + (TILE - picture.height) // 2))
        self._pen.rectangle((x - 2, y - 2, x + TILE + 1, y + TILE + 1), outline=frame, width=width)
        self.write((x, y + TILE + 3), caption, TILE)

    def write(self, place: tuple[int, int], words: str, width: int, size: int = 11) -> None:
        """Writes `words`, cut to `width` pixels."""
        font = ImageFont.load_default(size)
        kept = words
        while kept and self._pen.textlength(kept, font) > width:
            kept = kept[:-1]
        self._pen.text(place, kept if kept == words else f"{kept[:-1]}…", INK if size > 12 else SOFT, font)


def _thumbnail(path: Path) -> Image.Image | None:
    """None for a file that has gone since it was embedded."""
    try:
        picture = decode(path.read_bytes(), Limits(), background=PAPER, shrink_to=TILE)
    except (OSError, EmbedServeError):
        return None
    picture.thumbnail((TILE, TILE))
    return picture
