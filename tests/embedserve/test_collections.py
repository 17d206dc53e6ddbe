"""The library: collections are made, opened once, described and dropped, whatever a crash left behind."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedserve.collections import Collection, Library, NewItem, Part, Stored
from embedserve.config import ServeConfig
from embedserve.encoder import Encoder
from embedserve.errors import Conflict, EmbedServeError, InvalidField, NotFound, NotReady
from embedserve.towers import Towers
from tests.embedserve.colours import library_at
from tests.tiny_bundle import DIM, write_tiny_bundle

pytestmark = pytest.mark.anyio


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
        assert {path.parent.name for path in again.folder.glob("*/thumbnails.sqlite-wal")} == {"c3"}


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
    other = Towers(
        Encoder.load(write_tiny_bundle(tmp_path / "o", name="other", rotate=1).folder), ServeConfig()
    )
    await other.start()
    try:
        async with library_at(library.folder, other) as again:
            for use in (again.get, again.create):
                with pytest.raises(
                    Conflict, match=r"'tiny'.*'other'.*--encoder tiny.*new collection"
                ) as caught:
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


async def test_files_that_cannot_be_opened_do_not_break_the_list(library: Library, towers: Towers) -> None:
    for name in ("one", "two"):
        await library.create(name)
    await library.close()
    async with library_at(library.folder, towers) as again:
        shutil.rmtree(again.folder / "one" / "store")
        (again.folder / "one" / "store").write_text("a file where a folder should be")
        (again.folder / "two" / "thumbnails.sqlite").write_bytes(b"no database" * 1000)
        one, two = await again.list()
        assert "cannot be read or written" in str(one.problem)
        assert "lose only their thumbnails" in str(two.problem)
        (again.folder / "two" / "thumbnails.sqlite").unlink()
        assert (await again.describe("two")).problem is None


async def test_a_collection_open_in_another_process_is_a_conflict(library: Library, towers: Towers) -> None:
    await library.create("photos")
    await library.get("photos")
    async with library_at(library.folder, towers) as other:
        for use in (other.get, other.drop):
            with pytest.raises(Conflict, match="open in another process") as caught:
                await use("photos")
            assert caught.value.code == "collection_locked"
            assert str(caught.value).count("--url") == 1
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
    assert all(task.result()[0].score > 0.999 for task in searches)  # many are as red as red.png
    assert list(library.folder.iterdir()) == []


async def test_a_cancelled_drop_still_drops(colours: Collection, library: Library) -> None:
    task = asyncio.create_task(library.drop("things"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(NotFound):
        await library.get("things")  # waits for the drop, and finds nothing


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
