"""Collections on the tiny encoder: eight axes (red, green, blue, dark, …), so every score is known by eye.

A picture's vector is its mean colour, a text's the sum of its words' axes, both of unit length.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embedserve.collections import Collection, Library, NewItem, Part, Stored
from embedserve.config import Limits, ServeConfig
from embedserve.encoder import Encoder
from embedserve.errors import (
    BadRequest,
    Conflict,
    EmbedServeError,
    InvalidField,
    NotFound,
    NotReady,
    TooLarge,
    UnsupportedMedia,
)
from embedserve.towers import Towers
from tests.tiny_bundle import DIM, WORDS, write_tiny_bundle

pytestmark = pytest.mark.anyio
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def png(colour: tuple[int, int, int], size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def axis(word: str, other: str | None = None, angle: float = 0.0) -> np.ndarray:
    """A unit vector along a word's axis, turned by `angle` (radians) towards the other's."""
    vector = np.zeros(DIM, np.float32)
    vector[WORDS.index(word)] += np.cos(angle)
    if other:
        vector[WORDS.index(other)] += np.sin(angle)
    return vector


def ids(results: list) -> list[str]:
    return [result.id for result in results]


def errors(results: list[Stored | EmbedServeError]) -> list[str | None]:
    return [f"{type(one).__name__} {one.param}" if isinstance(one, EmbedServeError) else None for one in results]


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await holds():
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def towers(tiny_folder: Path) -> AsyncIterator[Towers]:
    config = ServeConfig(encoder=str(tiny_folder), threads=1)
    towers = Towers(Encoder.load(tiny_folder, threads=1), config)
    await towers.start()
    yield towers
    await towers.close()


@asynccontextmanager
async def library_at(folder: Path, towers: Towers, limits: Limits | None = None) -> AsyncIterator[Library]:
    library = Library(folder, towers, limits)
    try:
        yield library
    finally:
        await library.close()


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


# --- the library ----------------------------------------------------------------------------------------


async def test_a_new_collection_is_described(library: Library, towers: Towers) -> None:
    info, made = await library.create("photos", description="Holidays", metadata={"owner": "Ada"})
    assert made
    assert (info.name, info.description, info.metadata) == ("photos", "Holidays", {"owner": "Ada"})
    assert (info.items, info.dim, info.encoder) == (0, DIM, "tiny")
    assert info.fingerprint == towers.encoder.bundle.fingerprint
    assert info.bytes > 0
    assert info.problem is None
    assert library.names() == ["photos"]


async def test_creating_twice_changes_nothing_and_keeps_the_items(library: Library) -> None:
    first, _ = await library.create("photos", description="Holidays")
    await (await library.get("photos")).upsert([NewItem(id="a", text="red")])
    second, made = await library.create("photos")
    assert not made
    assert (second.items, second.description, second.created) == (1, "Holidays", first.created)


async def test_creating_again_with_another_description_updates_it(library: Library, towers: Towers) -> None:
    await library.create("photos", description="Holidays", metadata={"a": 1})
    info, made = await library.create("photos", description="Work")
    assert (made, info.description, info.metadata) == (False, "Work", {"a": 1})
    await library.close()
    async with library_at(library.folder, towers) as again:
        assert (await again.describe("photos")).description == "Work"


@pytest.mark.parametrize("name", ["", "Photos", "-x", "a b", "a/b", "..", "x" * 65, "ä", "a\n"])
async def test_a_bad_name_is_refused(library: Library, name: str) -> None:
    with pytest.raises(InvalidField, match="cannot be the name of a collection"):
        await library.create(name)
    with pytest.raises(NotFound):
        await library.get(name)
    assert list(library.folder.iterdir()) == []


async def test_an_unknown_collection_is_answered_with_the_closest_name(library: Library) -> None:
    await library.create("photos")
    for ask in (library.get, library.describe, library.drop):
        with pytest.raises(NotFound, match="did you mean 'photos'"):
            await ask("fotos")


async def test_nothing_is_opened_before_it_is_used(library: Library, towers: Towers) -> None:
    for i in range(5):
        await library.create(f"c{i}")
    await library.close()
    async with library_at(library.folder, towers) as again:
        assert again.names() == [f"c{i}" for i in range(5)]
        await again.get("c3")
        with_stores = {path.parent.name for path in again.folder.glob("*/store/*-wal")}
        assert with_stores == {"c3"}


async def test_concurrent_first_uses_share_one_opening(library: Library, towers: Towers) -> None:
    await library.create("photos")
    await library.close()
    async with library_at(library.folder, towers) as again:
        opened = await asyncio.gather(*(again.get("photos") for _ in range(20)))
        assert len(set(map(id, opened))) == 1


async def test_items_survive_a_restart(colours: Collection, library: Library, towers: Towers) -> None:
    before = await colours.scan(vectors=True)
    await library.close()
    async with library_at(library.folder, towers) as again:
        after = await (await again.get("things")).scan(vectors=True)
        assert [(one.id, one.metadata, one.kind, one.image_sha256) for one in after] == [
            (one.id, one.metadata, one.kind, one.image_sha256) for one in before
        ]
        assert all(np.array_equal(one.vector, other.vector) for one, other in zip(before, after, strict=True))


async def test_another_encoders_collection_is_listed_but_not_used(
    colours: Collection, library: Library, towers: Towers, tmp_path: Path
) -> None:
    await library.close()
    other = Towers(Encoder.load(write_tiny_bundle(tmp_path / "o", name="other", rotate=1).folder), ServeConfig())
    await other.start()
    try:
        async with library_at(library.folder, other) as again:
            for use in (again.get, again.create):
                with pytest.raises(Conflict, match=r"'tiny'.*'other'.*--encoder tiny.*new collection") as caught:
                    await use("things")
                assert caught.value.code == "encoder_mismatch"
            (info,) = await again.list()
            assert (info.encoder, info.items) == ("tiny", None)
            assert "'other'" in str(info.problem)
            await again.drop("things")
            assert again.names() == []
    finally:
        await other.close()


async def test_damaged_collections_do_not_break_the_list_and_can_be_dropped(library: Library) -> None:
    await library.create("good")
    for name, text in [("empty", None), ("notjson", "{"), ("wrong", '{"format": 1}')]:
        (library.folder / name).mkdir()
        if text is not None:
            (library.folder / name / "collection.json").write_text(text)
    infos = {info.name: info for info in await library.list()}
    assert infos["good"].problem is None
    assert "cannot be read" in str(infos["empty"].problem)
    assert "malformed at the document" in str(infos["notjson"].problem)
    assert "malformed at dim" in str(infos["wrong"].problem)
    with pytest.raises(EmbedServeError, match="is damaged") as caught:
        await library.get("wrong")
    assert (caught.value.status, caught.value.code) == (500, "collection_damaged")
    with pytest.raises(Conflict, match="is damaged"):
        await library.create("wrong")
    for name in ("empty", "notjson", "wrong"):
        await library.drop(name)
    assert library.names() == ["good"]


async def test_a_collection_open_in_another_process_is_a_conflict(library: Library, towers: Towers) -> None:
    await library.create("photos")
    await library.get("photos")
    async with library_at(library.folder, towers) as other:
        for use in (other.get, other.drop):
            with pytest.raises(Conflict, match="open in another process") as caught:
                await use("photos")
            assert caught.value.code == "collection_locked"
        assert "open in another process" in str((await other.describe("photos")).problem)
    assert await (await library.get("photos")).count() == 0


async def test_a_dropped_collection_is_gone_and_its_name_free(colours: Collection, library: Library) -> None:
    await library.drop("things")
    assert list(library.folder.iterdir()) == []
    with pytest.raises(NotFound, match="has been deleted"):
        await colours.count()
    with pytest.raises(NotFound):
        await library.get("things")
    await library.create("things")
    assert await (await library.get("things")).count() == 0


async def test_running_requests_finish_before_a_drop(colours: Collection, library: Library) -> None:
    writes = [
        asyncio.create_task(colours.upsert([NewItem(text="red", id=f"{i}-{j}") for j in range(20)]))
        for i in range(10)
    ]
    searches = [asyncio.create_task(colours.search([Part(text="red")])) for _ in range(10)]
    await asyncio.sleep(0)  # they are inside now
    await library.drop("things")
    assert all(task.done() for task in [*writes, *searches])
    assert all(isinstance(one, Stored) for task in writes for one in task.result())
    assert all(task.result()[0].id == "red.png" for task in searches)
    assert list(library.folder.iterdir()) == []


async def test_a_cancelled_drop_still_drops(colours: Collection, library: Library) -> None:
    task = asyncio.create_task(library.drop("things"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: _true(library.names() == []))


async def _true(value: bool) -> bool:
    return value


async def test_what_a_crash_left_of_a_drop_goes_at_the_next_start(library: Library, towers: Towers) -> None:
    trash = library.folder / ".trash-photos-0123"
    trash.mkdir()
    (trash / "collection.json").write_text("{}")
    assert library.names() == []
    async with library_at(library.folder, towers):
        assert not trash.exists()


async def test_a_closed_library_says_that_it_is_shutting_down(colours: Collection, library: Library) -> None:
    running = asyncio.create_task(colours.upsert([NewItem(id="last", text="red")]))
    await asyncio.sleep(0)
    await library.close()
    assert isinstance((await running)[0], Stored)
    for use in (library.get("things"), library.create("more"), library.describe("things"), colours.count()):
        with pytest.raises(NotReady, match="shutting down"):
            await use
    await library.close()


# --- writing --------------------------------------------------------------------------------------------


async def test_items_come_back_as_they_were_given(colours: Collection) -> None:
    found = await colours.get(["red.png", "a word", "vectors/dark", "unknown"], vectors=True)
    assert set(found) == {"red.png", "a word", "vectors/dark"}
    red = found["red.png"]
    assert (red.kind, red.has_thumbnail) == ("image", True)
    assert red.metadata == {"colour": "red", "shop": {"city": "Bonn"}}
    assert red.image_sha256 == hashlib.sha256(png(RED)).hexdigest()
    assert (found["a word"].kind, found["a word"].has_thumbnail) == ("text", False)
    assert found["vectors/dark"].kind == "vector"
    np.testing.assert_allclose(found["vectors/dark"].vector, axis("dark"), atol=1e-3)
    np.testing.assert_allclose(red.vector, axis("red"), atol=1e-3)
    assert (await colours.item("red.png")).vector is None


BAD_ITEMS = {
    "nothing given": (NewItem(id="x"), InvalidField, None),
    "two given": (NewItem(id="x", text="red", vector=[1.0] * DIM), InvalidField, "vector"),
    "empty image": (NewItem(id="x", image=b""), BadRequest, "image"),
    "truncated image": (NewItem(id="x", image=png(RED)[:40]), BadRequest, "image"),
    "a web page": (NewItem(id="x", image=b"<!DOCTYPE html><html></html>"), UnsupportedMedia, "image"),
    "empty text": (NewItem(id="x", text=" \n"), InvalidField, "text"),
    "short vector": (NewItem(id="x", vector=[1.0, 2.0]), InvalidField, "vector"),
    "nested vector": (NewItem(id="x", vector=[[1.0] * DIM]), InvalidField, "vector"),
    "words for a vector": (NewItem(id="x", vector=["red"] * DIM), InvalidField, "vector"),
    "NaN": (NewItem(id="x", vector=[float("nan")] * DIM), InvalidField, "vector"),
    "infinity": (NewItem(id="x", vector=[float("inf")] * DIM), InvalidField, "vector"),
    "too large for float32": (NewItem(id="x", vector=[1e300] * DIM), InvalidField, "vector"),
    "zeros": (NewItem(id="x", vector=[0.0] * DIM), InvalidField, "vector"),
    "empty id": (NewItem(id="", text="red"), InvalidField, "id"),
    "long id": (NewItem(id="é" * 513, text="red"), InvalidField, "id"),
    "NUL in id": (NewItem(id="a\0b", text="red"), InvalidField, "id"),
    "lone surrogate in id": (NewItem(id="\ud800", text="red"), InvalidField, "id"),
    "reserved key": (NewItem(id="x", text="red", metadata={"_image": "f" * 64}), InvalidField, "metadata"),
    "operator key": (NewItem(id="x", text="red", metadata={"$gt": 1}), InvalidField, "metadata"),
    "metadata list": (NewItem(id="x", text="red", metadata=[1]), InvalidField, "metadata"),
    "metadata NaN": (NewItem(id="x", text="red", metadata={"a": float("nan")}), InvalidField, "metadata"),
    "metadata set": (NewItem(id="x", text="red", metadata={"a": {1}}), InvalidField, "metadata"),
    "metadata surrogate": (NewItem(id="x", text="red", metadata={"a": "\ud800"}), InvalidField, "metadata"),
    "large metadata": (NewItem(id="x", text="red", metadata={"a": "x" * 66_000}), TooLarge, "metadata"),
    "deep metadata": (
        NewItem(id="x", text="red", metadata=json.loads('{"a":' * 60 + "1" + "}" * 60)),
        InvalidField,
        "metadata",
    ),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
async def test_a_bad_item_fails_alone(things: Collection, name: str) -> None:
    bad, kind, param = BAD_ITEMS[name]
    results = await things.upsert([NewItem(id="1", image=png(RED)), bad, NewItem(id="2", text="red")])
    assert (results[0], results[2]) == (Stored("1", "image"), Stored("2", "text"))
    assert isinstance(results[1], kind)
    assert results[1].param == param
    assert ids(await things.scan()) == ["1", "2"]


async def test_only_bad_items_write_nothing(things: Collection) -> None:
    results = await things.upsert([NewItem(id="", text="red"), NewItem(text="")])
    assert errors(results) == ["InvalidField id", "InvalidField text"]
    assert await things.count() == 0


async def test_the_message_of_a_wrong_vector_gives_both_dimensions(things: Collection) -> None:
    (error,) = await things.upsert([NewItem(vector=[1.0, 2.0])])
    assert str(error).startswith(f"the vector has 2 numbers; this collection holds vectors of {DIM}.")


@pytest.mark.parametrize("name", ["a/b/c", "/", ".", "東京 🗼", "q?x=1#y", "x" * 1024, "Ä", "' OR 1=1 --"])
async def test_ids_may_be_almost_anything(things: Collection, name: str) -> None:
    (stored,) = await things.upsert([NewItem(id=name, image=png(RED))])
    assert stored == Stored(name, "image")
    assert (await things.item(name)).id == name
    assert (await things.thumbnail(name)).data
    assert (await things.search([Part(text="red")]))[0].id == name
    assert await things.delete([name]) == 1


async def test_without_an_id_the_content_names_the_item(things: Collection) -> None:
    items = [NewItem(image=png(RED)), NewItem(text="red"), NewItem(vector=axis("red"))]
    first, second = await things.upsert(items), await things.upsert(items)
    assert ids(first) == ids(second)
    assert first[0].id == hashlib.sha256(png(RED)).hexdigest()[:32]
    assert await things.count() == 3


async def test_of_an_id_given_twice_the_last_wins(things: Collection) -> None:
    results = await things.upsert([NewItem(id="a", image=png(RED)), NewItem(id="a", image=png(BLUE))])
    assert results == [Stored("a", "image")] * 2
    assert await things.count() == 1
    assert (await things.item("a")).image_sha256 == hashlib.sha256(png(BLUE)).hexdigest()


async def test_an_upsert_replaces_vector_metadata_and_kind(things: Collection) -> None:
    await things.upsert([NewItem(id="a", image=png(RED), metadata={"old": 1})])
    await things.upsert([NewItem(id="a", text="blue", metadata={"new": 2})])
    item = await things.item("a", vectors=True)
    assert (item.kind, item.metadata, item.has_thumbnail) == ("text", {"new": 2}, False)
    np.testing.assert_allclose(item.vector, axis("blue"), atol=1e-3)
    with pytest.raises(NotFound, match="has no thumbnail"):
        await things.thumbnail("a")


async def test_more_items_than_allowed_are_refused(library: Library, towers: Towers, tmp_path: Path) -> None:
    async with library_at(tmp_path / "small", towers, Limits(max_inputs=3)) as small:
        await small.create("c")
        collection = await small.get("c")
        for call in (
            collection.upsert([NewItem(text="red")] * 4),
            collection.get(["a"] * 4),
            collection.delete(["a"] * 4),
            collection.search([Part(text="red")] * 4),
            collection.neighbours([Part(text="red")] * 4, "x"),
        ):
            with pytest.raises(TooLarge, match="at most 3"):
                await call


async def test_deleting_by_ids_counts_what_went(colours: Collection) -> None:
    assert await colours.delete(["red.png", "unknown", "a\0b", "a word"]) == 2
    assert ids(await colours.scan()) == ["blue.png", "green.png", "vectors/dark"]


async def test_deleting_by_filter_takes_what_matches(colours: Collection) -> None:
    assert await colours.delete(filter={"shop.city": "Bonn"}) == 2
    assert ids(await colours.scan()) == ["a word", "green.png", "vectors/dark"]
    assert await colours.delete(filter={}) == 3


async def test_deleting_takes_ids_or_a_filter(colours: Collection) -> None:
    with pytest.raises(InvalidField, match="none of them"):
        await colours.delete()
    with pytest.raises(InvalidField, match="'ids' and 'filter'"):
        await colours.delete(["a"], filter={})
    assert await colours.count() == 5


async def test_counting_and_scanning_follow_the_filter(colours: Collection) -> None:
    assert await colours.count({"colour": "red"}) == 2
    assert await colours.count({"_kind": "image"}) == 3
    first = await colours.scan(limit=2)
    assert ids(first) == ["a word", "blue.png"]
    assert ids(await colours.scan(after="blue.png", limit=2)) == ["green.png", "red.png"]
    assert ids(await colours.scan(filter={"colour": {"$in": ["blue", "green"]}})) == ["blue.png", "green.png"]


@pytest.mark.parametrize("filter", [{"$nope": 1}, {"a": {"$gt": {}}}, {"$and": 3}])
async def test_a_bad_filter_is_an_invalid_field(colours: Collection, filter: dict) -> None:
    for call in (
        colours.count(filter),
        colours.scan(filter=filter),
        colours.delete(filter=filter),
        colours.search([Part(text="red")], filter=filter),
        colours.duplicates(filter=filter),
    ):
        with pytest.raises(InvalidField) as caught:
            await call
        assert caught.value.param == "filter"
    assert await colours.count() == 5


async def test_stats_tell_items_and_thumbnails(colours: Collection) -> None:
    stats = await colours.stats()
    assert stats["thumbnails"]["count"] == 3
    assert stats["thumbnails"]["bytes"] > 0


# --- thumbnails -----------------------------------------------------------------------------------------


async def test_a_thumbnail_is_a_small_webp(things: Collection) -> None:
    await things.upsert([NewItem(id="big", image=png(RED, 2000))])
    thumbnail = await things.thumbnail("big")
    picture = Image.open(io.BytesIO(thumbnail.data))
    assert (picture.format, max(picture.size)) == ("WEBP", 256)
    assert thumbnail.sha256 == hashlib.sha256(png(RED, 2000)).hexdigest()


async def test_a_thumbnail_of_nothing_is_not_found(colours: Collection) -> None:
    for name, message in [("unknown", "not in this collection"), ("a word", "no thumbnail"), ("a\0", "not in")]:
        with pytest.raises(NotFound, match=message):
            await colours.thumbnail(name)


async def test_thumbnails_go_with_their_last_item(things: Collection) -> None:
    await things.upsert([NewItem(id="a", image=png(RED)), NewItem(id="b", image=png(RED))])
    await things.upsert([NewItem(id="c", image=png(BLUE)), NewItem(id="d", image=png(GREEN))])

    async def pictures() -> int:
        return (await things.stats())["thumbnails"]["count"]

    assert await pictures() == 3
    await things.delete(["a", "c"])
    await until(lambda: _equals(pictures(), 2))
    assert (await things.thumbnail("b")).data
    await things.upsert([NewItem(id="d", text="green")])
    await until(lambda: _equals(pictures(), 1))
    await things.delete(filter={})
    await until(lambda: _equals(pictures(), 0))


async def _equals(value: Awaitable[int], other: int) -> bool:
    return await value == other


async def test_no_item_ever_lacks_its_thumbnail_while_items_come_and_go(things: Collection) -> None:
    """Eight clients on four ids and four pictures; whatever an item shows at any time can be had."""
    pictures = [png(colour) for colour in (RED, GREEN, BLUE, (9, 9, 9))]
    lost = []

    async def client(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
            name = str(rng.integers(4))
            if rng.random() < 0.6:
                await things.upsert([NewItem(id=name, image=pictures[rng.integers(4)])])
            elif rng.random() < 0.9:
                await things.delete([name])
            else:
                await things.delete(filter={})
            try:
                await things.thumbnail(str(rng.integers(4)))
            except NotFound as error:
                if "is lost" in str(error):
                    lost.append(str(error))

    await asyncio.gather(*map(client, range(8)))
    assert lost == []
    shown = {item.image_sha256 for item in await things.scan()}

    async def tidy() -> bool:
        return (await things.stats())["thumbnails"]["count"] == len(shown)

    await until(tidy)
