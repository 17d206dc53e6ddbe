"""Items and their thumbnails in a collection: written one by one or many at once, a bad one fails alone."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from embedserve.bundle import new_bundle, open_bundle, seal
from embedserve.collections import Collection, NewItem, Part, Stored
from embedserve.config import Limits, ServeConfig
from embedserve.encoder import Encoder
from embedserve.errors import (
    BadRequest,
    Busy,
    EmbedServeError,
    InvalidField,
    NotFound,
    TooLarge,
    UnsupportedMedia,
)
from embedserve.towers import Towers
from tests.embedserve.colours import BLUE, GREEN, RED, axis, ids, library_at, png, until
from tests.tiny_bundle import DIM

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def towers_of(bundle: Path) -> AsyncIterator[Towers]:
    towers = Towers(Encoder.load(bundle, threads=1), ServeConfig())
    await towers.start()
    yield towers
    await towers.close()


def errors(results: list[Stored | EmbedServeError]) -> list[str | None]:
    return [
        f"{type(one).__name__} {one.param}" if isinstance(one, EmbedServeError) else None for one in results
    ]


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


WEIGHT = "text_weight"
BAD_ITEMS = {
    "nothing given": (NewItem(id="x"), InvalidField, None),
    "two given": (NewItem(id="x", text="red", vector=[1.0] * DIM), InvalidField, "vector"),
    "empty image": (NewItem(id="x", image=b""), BadRequest, "image"),
    "truncated image": (NewItem(id="x", image=png(RED)[:40]), BadRequest, "image"),
    "a web page": (NewItem(id="x", image=b"<!DOCTYPE html><html></html>"), UnsupportedMedia, "image"),
    "image and vector": (NewItem(id="x", image=png(RED), vector=[1.0] * DIM), InvalidField, "vector"),
    "all three": (
        NewItem(id="x", image=png(RED), text="red", vector=[1.0] * DIM),
        InvalidField,
        "vector",
    ),
    "bad image with a text": (NewItem(id="x", image=png(RED)[:40], text="red"), BadRequest, "image"),
    "image with an empty text": (NewItem(id="x", image=png(RED), text=" "), InvalidField, "text"),
    "weight below 0": (NewItem(id="x", image=png(RED), text="red", text_weight=-0.1), InvalidField, WEIGHT),
    "weight above 10": (NewItem(id="x", image=png(RED), text="red", text_weight=10.1), InvalidField, WEIGHT),
    "weight NaN": (NewItem(id="x", image=png(RED), text_weight=float("nan")), InvalidField, WEIGHT),
    "weight in words": (NewItem(id="x", text="red", text_weight="half"), InvalidField, WEIGHT),
    "weight true": (NewItem(id="x", image=png(RED), text="red", text_weight=True), InvalidField, WEIGHT),
    "empty text": (NewItem(id="x", text=" \n"), InvalidField, "text"),
    "short vector": (NewItem(id="x", vector=[1.0, 2.0]), InvalidField, "vector"),
    "nested vector": (NewItem(id="x", vector=[[1.0] * DIM]), InvalidField, "vector"),
    "ragged vector": (NewItem(id="x", vector=[[1.0], [1.0, 2.0]]), InvalidField, "vector"),
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


async def test_the_message_says_what_an_item_may_hold(things: Collection) -> None:
    (error,) = await things.upsert([NewItem(image=png(RED), text="red", vector=axis("red"))])
    assert str(error) == (
        "The item has 'image' and 'text' and 'vector'; give 'image', 'text', 'vector', or 'image' and 'text' "
        "together."
    )


# --- an image with a text -------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, 0.5, 1, 10])
async def test_an_image_with_a_text_lies_between_them_by_the_weight(
    things: Collection, weight: float
) -> None:
    item = NewItem(id="ball", image=png(RED), text="round", text_weight=weight, metadata={"n": 1})
    assert await things.upsert([item]) == [Stored("ball", "image")]
    stored = await things.item("ball", vectors=True)
    wanted = axis("red") + weight * axis("round")
    np.testing.assert_allclose(stored.vector, wanted / np.linalg.norm(wanted), atol=1e-3)
    assert (stored.kind, stored.metadata) == ("image", {"n": 1})  # the text is not kept
    assert stored.image_sha256 == hashlib.sha256(png(RED)).hexdigest()
    assert (await things.thumbnail("ball")).data


async def test_the_text_counts_half_unless_told_otherwise(things: Collection) -> None:
    await things.upsert([NewItem(id="ball", image=png(RED), text="round")])
    stored = await things.item("ball", vectors=True)
    np.testing.assert_allclose(stored.vector, (axis("red") + 0.5 * axis("round")) / 1.25**0.5, atol=1e-3)


async def test_an_image_with_a_text_is_found_by_both(things: Collection) -> None:
    await things.upsert(
        [
            NewItem(id="red ball", image=png(RED), text="round"),
            NewItem(id="red box", image=png(RED), text="square"),
            NewItem(id="blue ball", image=png(BLUE), text="round"),
            NewItem(id="blue", image=png(BLUE)),
        ]
    )
    assert (await things.search([Part(image=png(BLUE))]))[0].id == "blue"
    assert ids(await things.search([Part(text="round")], k=2)) == ["blue ball", "red ball"]
    assert ids(await things.search([Part(text="red round")], k=2)) == ["red ball", "red box"]


async def test_without_an_id_a_picture_with_another_text_is_the_same_item(things: Collection) -> None:
    first = await things.upsert([NewItem(image=png(RED), text="round")])
    assert await things.upsert([NewItem(image=png(RED), text="square")]) == first
    assert ids(first) == [hashlib.sha256(png(RED)).hexdigest()[:32]]


async def test_the_weight_of_a_lone_image_or_text_changes_nothing(things: Collection) -> None:
    await things.upsert(
        [NewItem(id="i", image=png(RED), text_weight=7), NewItem(id="t", text="red", text_weight=0)]
    )
    for item in (await things.get(["i", "t"], vectors=True)).values():
        np.testing.assert_allclose(item.vector, axis("red"), atol=1e-3)


async def test_an_image_and_a_text_that_cancel_out_fail_alone(tiny_folder: Path, tmp_path: Path) -> None:
    """With an encoder whose texts point away from what they say."""
    with new_bundle(tmp_path / "contrary") as folder:
        for name in ("image.onnx", "tokenizer.json"):
            shutil.copy(tiny_folder / name, folder)
        model = onnx.load(tiny_folder / "text.onnx")
        (table,) = (one for one in model.graph.initializer if one.name == "table")
        table.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(table), "table"))
        onnx.save(model, folder / "text.onnx")
        seal(folder, open_bundle(tiny_folder).description.model_copy(update={"name": "contrary"}))
    async with towers_of(tmp_path / "contrary") as towers, library_at(tmp_path / "c", towers) as library:
        await library.create("things")
        things = await library.get("things")
        results = await things.upsert(
            [
                NewItem(id="1", image=png(RED), text="red", text_weight=1),
                NewItem(id="2", image=png(RED), text="red"),
                NewItem(id="3", image=png(BLUE), text="red", text_weight=1),
            ]
        )
        assert errors(results) == ["InvalidField text_weight", None, None]
        assert "cancel out" in str(results[0])
        stored = await things.get(["1", "2", "3"], vectors=True)
        np.testing.assert_allclose(stored["2"].vector, axis("red"), atol=1e-3)
        np.testing.assert_allclose(stored["3"].vector, (axis("blue") - axis("red")) / 2**0.5, atol=1e-3)
        assert "1" not in stored


async def test_both_towers_work_at_the_same_time(
    things: Collection, towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = threading.Barrier(2, timeout=10)  # broken, and the items fail, unless both towers come

    def after_meeting(run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def meet(inputs: Any) -> Any:
            meeting.wait()
            return run(inputs)

        return meet

    for name in ("embed_images", "embed_texts"):
        monkeypatch.setattr(towers.encoder, name, after_meeting(getattr(towers.encoder, name)))
    results = await things.upsert([NewItem(id="ball", image=png(RED), text="round")])
    assert results == [Stored("ball", "image")]


async def test_where_one_queue_is_full_nothing_is_written_and_the_other_one_stops(
    things: Collection, towers: Towers
) -> None:
    queue = towers.queues["text"]
    before = towers.queues["image"].items
    with queue.places(ServeConfig().limits.queue_size), pytest.raises(Busy):
        await things.upsert([NewItem(image=png(RED), text="red"), NewItem(image=png(BLUE))])
    assert await things.count() == 0
    assert towers.queues["image"].items == before
    assert [queue.waiting for queue in towers.queues.values()] == [0, 0, 0]
    await things.upsert([NewItem(image=png(RED), text="red")])


async def test_a_text_for_an_encoder_without_a_text_tower_fails_alone(
    tiny_folder: Path, tmp_path: Path
) -> None:
    with new_bundle(tmp_path / "eyes") as folder:
        shutil.copy(tiny_folder / "image.onnx", folder)
        seal(folder, open_bundle(tiny_folder).description.model_copy(update={"text": None, "name": "eyes"}))
    async with towers_of(tmp_path / "eyes") as towers, library_at(tmp_path / "c", towers) as library:
        await library.create("pictures")
        pictures = await library.get("pictures")
        results = await pictures.upsert(
            [
                NewItem(id="1", text="red"),
                NewItem(id="2", image=png(RED)),
                NewItem(id="3", image=png(RED), text="red"),
            ]
        )
        assert errors(results) == ["InvalidField text", None, "InvalidField text"]
        assert "eyes" in str(results[2])
        text, image = await pictures.neighbours([Part(text="red"), Part(image=png(RED))], "colour")
        assert (type(text), image) == (InvalidField, [])
        with pytest.raises(InvalidField, match="eyes"):
            await pictures.search([Part(text="red")])


async def test_only_bad_items_write_nothing(things: Collection) -> None:
    results = await things.upsert([NewItem(id="", text="red"), NewItem(text="")])
    assert errors(results) == ["InvalidField id", "InvalidField text"]
    assert await things.count() == 0


async def test_the_message_of_a_wrong_vector_gives_both_dimensions(things: Collection) -> None:
    (error,) = await things.upsert([NewItem(vector=[1.0, 2.0])])
    assert str(error).startswith(f"The vector has 2 numbers; this collection holds vectors of {DIM}.")


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


async def test_more_items_than_allowed_are_refused(towers: Towers, tmp_path: Path) -> None:
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
    await things.upsert([NewItem(id="big", image=png(RED, 600))])
    thumbnail = await things.thumbnail("big")
    picture = Image.open(io.BytesIO(thumbnail.data))
    assert (picture.format, max(picture.size)) == ("WEBP", 256)
    assert thumbnail.sha256 == hashlib.sha256(png(RED, 600)).hexdigest()


async def test_a_thumbnail_of_nothing_is_not_found(colours: Collection) -> None:
    for name, message in [
        ("unknown", "not in this collection"),
        ("a word", "no thumbnail"),
        ("a\0", "not in"),
    ]:
        with pytest.raises(NotFound, match=message):
            await colours.thumbnail(name)


async def test_thumbnails_go_with_their_last_item(things: Collection) -> None:
    await things.upsert([NewItem(id="a", image=png(RED)), NewItem(id="b", image=png(RED))])
    await things.upsert([NewItem(id="c", image=png(BLUE)), NewItem(id="d", image=png(GREEN))])

    async def pictures_are(number: int) -> bool:
        return bool((await things.stats())["thumbnails"]["count"] == number)

    assert await pictures_are(3)
    await things.delete(["a", "c"])
    await until(partial(pictures_are, 2))
    assert (await things.thumbnail("b")).data
    await things.upsert([NewItem(id="d", text="green")])
    await until(partial(pictures_are, 1))
    await things.delete(filter={})
    await until(partial(pictures_are, 0))


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
