"""The demo collection, with the tiny encoder: OpenMoji's drawings become pictures, then items."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from embedserve.client import Client
from embedserve.config import ServeConfig
from embedserve.demo import Drawing, build_demo, drawings, rasterise
from embedserve.ingest import IngestReport


@pytest.fixture(scope="module")
def every() -> dict[str, Drawing]:
    return {one.id: one for one in drawings()}


def test_there_are_some_two_thousand_drawings_each_with_its_own_id(every: dict[str, Drawing]) -> None:
    assert len(every) == len(drawings())
    assert 1900 < len(every) < 2500


def test_skin_tones_are_left_out(every: dict[str, Drawing]) -> None:
    assert not [one.id for one in every.values() if "skin-tone" in one.id or "1F3FD" in one.svg.stem]


def test_names_are_words_and_aliases_help_to_find_them(every: dict[str, Drawing]) -> None:
    apple = every["red-apple"].metadata()
    assert apple["name"] == "red apple"
    assert apple["emoji"] == "🍎"
    assert apple["codepoints"] == "1F34E"
    assert every["cooking"].metadata()["caption"] == "cooking, egg, fried egg"
    assert not [one.name for one in every.values() if "_" in one.name or ":" in one.name]


def test_flags_are_called_flags(every: dict[str, Drawing]) -> None:
    assert every["flag-of-bolivia"].metadata()["flag"] is True
    assert every["flag-of-scotland"].name == "flag of Scotland"
    assert every["red-apple"].metadata()["flag"] is False


def test_a_drawing_is_rasterised_on_white(every: dict[str, Drawing]) -> None:
    picture = Image.open(BytesIO(rasterise(every["red-apple"].svg, 64)))
    assert picture.size == (64, 64)
    pixels = picture.convert("RGB")
    assert pixels.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = pixels.getpixel((32, 40))  # type: ignore[misc] # an RGB image has three bands
    assert red > 2 * max(green, blue)


def test_the_collection_is_built_found_by_word_and_completed_by_a_second_run(
    every: dict[str, Drawing], tiny_folder: Path, tmp_path: Path
) -> None:
    names = ["red-apple", "green-apple", "blueberries", "red-square", "green-square", "blue-square"]
    some = [every[name] for name in names]

    async def work() -> tuple[IngestReport, IngestReport, dict[str, Any], Any]:
        async with Client.local(ServeConfig(data=tmp_path, encoder=str(tiny_folder))) as client:
            first = await build_demo(client, some[:4])
            second = await build_demo(client, some)
            about = await client.collection("openmoji")
            found = await client.search("openmoji", text="green square", k=1)
            return first, second, dict(about), found

    first, second, about, found = asyncio.run(work())
    assert (first.added, first.problems) == (4, [])
    assert (second.unchanged, second.added) == (4, 2)
    assert about["items"] == 6
    assert "CC BY-SA" in about["description"]
    assert found["hits"][0]["id"] == "green-square"
    assert found["hits"][0]["thumbnail"]


def test_a_drawing_is_found_by_a_word_of_its_name_that_no_picture_shows(
    every: dict[str, Drawing], tiny_folder: Path, tmp_path: Path
) -> None:
    """ "large" is no colour, and the tiny encoder sees nothing but colours in a picture."""
    names = ["large-blue-diamond", "small-blue-diamond", "blue-square"]

    async def work() -> list[str]:
        async with Client.local(ServeConfig(data=tmp_path, encoder=str(tiny_folder))) as client:
            await build_demo(client, [every[name] for name in names])
            return [
                hit["id"]
                for word in ("large", "small", "square")
                for hit in (await client.search("openmoji", text=word, k=1))["hits"]
            ]

    assert asyncio.run(work()) == names


def test_a_drawing_that_cannot_be_read_fails_alone(
    every: dict[str, Drawing], tiny_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.svg"
    broken.write_text("<svg")

    async def work() -> IngestReport:
        async with Client.local(ServeConfig(data=tmp_path / "data", encoder=str(tiny_folder))) as client:
            return await build_demo(client, [Drawing(broken, "?", "broken", ()), every["red-apple"]])

    report = asyncio.run(work())
    assert report.added == 1
    assert [problem.path for problem in report.problems] == ["broken"]
