"""Pictures, vectors and collections for the tiny encoder, whose vectors can be computed by eye."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from embedserve.collections import Library
from embedserve.config import Limits
from embedserve.towers import Towers
from tests.tiny_bundle import DIM, WORDS

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def quarters(*colours: tuple[int, int, int], size: int = 8) -> bytes:
    """A PNG of four quarters: top left, top right, bottom left, bottom right."""
    picture = Image.new("RGB", (size, size))
    half = size // 2
    for place, colour in zip(((0, 0), (half, 0), (0, half), (half, half)), colours, strict=True):
        picture.paste(colour, (*place, place[0] + half, place[1] + half))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def axis(word: str, other: str | None = None, angle: float = 0.0) -> np.ndarray:
    """A unit vector along a word's axis, turned by `angle` (radians) towards the other's."""
    vector = np.zeros(DIM, np.float32)
    vector[WORDS.index(word)] += np.cos(angle)
    if other:
        vector[WORDS.index(other)] += np.sin(angle)
    return vector


def ids(results: Iterable[Any]) -> list[str]:
    return [result.id for result in results]


@asynccontextmanager
async def library_at(folder: Path, towers: Towers, limits: Limits | None = None) -> AsyncIterator[Library]:
    library = Library(folder, towers, limits)
    try:
        yield library
    finally:
        await library.close()


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Returns once `holds` does; for what goes on in the background."""
    async with asyncio.timeout(10):
        while not await holds():
            await asyncio.sleep(0.01)
