"""Fixtures of the serving tests: the tiny encoder with its queues, and a collection of colours."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from embedserve.collections import Collection, Library, NewItem
from embedserve.config import ServeConfig
from embedserve.encoder import Encoder
from embedserve.towers import Towers
from tests.embedserve.colours import BLUE, GREEN, RED, axis, library_at, png
from tests.tiny_bundle import OUTPUTS, write_tiny_bundle


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Of coroutine tests (`pytest.mark.anyio`)."""
    return "asyncio"


@pytest.fixture(scope="session")
def seeing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with patches and attention, and with prefixes of 4 and 6 numbers."""
    out = tmp_path_factory.mktemp("bundles") / "seeing"
    return write_tiny_bundle(out, name="seeing", outputs=OUTPUTS, dims=(4, 6)).folder


@pytest.fixture(scope="module")
async def towers(tiny_folder: Path) -> AsyncIterator[Towers]:
    config = ServeConfig(encoder=str(tiny_folder), threads=1)
    towers = Towers(Encoder.load(tiny_folder, threads=1), config)
    await towers.start()
    yield towers
    await towers.close()


@pytest.fixture
async def library(tmp_path: Path, towers: Towers) -> AsyncIterator[Library]:
    async with library_at(tmp_path / "collections", towers) as library:
        yield library


@pytest.fixture
async def things(library: Library) -> Collection:
    await library.create("things")
    return await library.get("things")


@pytest.fixture
async def colours(things: Collection) -> Collection:
    """Three pictures, a text and a vector."""
    await things.upsert(
        [
            NewItem(id="red.png", image=png(RED), metadata={"colour": "red", "shop": {"city": "Bonn"}}),
            NewItem(id="green.png", image=png(GREEN), metadata={"colour": "green", "shop": {"city": "Rome"}}),
            NewItem(id="blue.png", image=png(BLUE), metadata={"colour": "blue", "shop": {"city": "Bonn"}}),
            NewItem(id="a word", text="red round", metadata={"colour": "red"}),
            NewItem(id="vectors/dark", vector=axis("dark") * 7),
        ]
    )
    return things
