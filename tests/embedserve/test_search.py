"""Searching collections, on the tiny encoder: every score is known by eye."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from embedserve.collections import Collection, DuplicateGroup, Library, NewItem, Part
from embedserve.config import Limits
from embedserve.errors import BadRequest, EmbedServeError, InvalidField, NotFound
from embedserve.towers import Towers
from tests.embedserve.colours import BLUE, GREEN, RED, axis, ids, library_at, png
from tests.tiny_bundle import DIM

pytestmark = pytest.mark.anyio


async def test_a_text_finds_the_pictures_it_names(colours: Collection) -> None:
    hits = await colours.search([Part(text="red")])
    assert ids(hits[:2]) == ["red.png", "a word"]
    assert [hit.score for hit in hits] == pytest.approx([1, 0.5**0.5, 0, 0, 0], abs=1e-3)
    assert (hits[0].kind, hits[0].has_thumbnail, hits[0].vector) == ("image", True, None)
    assert hits[0].metadata == {"colour": "red", "shop": {"city": "Bonn"}}


async def test_a_picture_a_vector_and_an_id_find_the_same(colours: Collection) -> None:
    by_image = await colours.search([Part(image=png(RED, 20))])
    by_vector = await colours.search([Part(vector=[3.0] + [0.0] * 7)])
    assert by_image == by_vector
    by_id = await colours.search([Part(id="red.png")])
    assert ids(by_id) == [hit.id for hit in by_image if hit.id != "red.png"]


async def test_ties_come_in_id_order(colours: Collection) -> None:
    hits = await colours.search([Part(text="square")])
    assert ids(hits) == ["a word", "blue.png", "green.png", "red.png", "vectors/dark"]


async def test_k_cuts_the_hits(colours: Collection) -> None:
    assert ids(await colours.search([Part(text="red")], k=1)) == ["red.png"]
    assert len(await colours.search([Part(id="red.png")], k=4)) == 4


async def test_min_score_leaves_out_what_is_unlike(colours: Collection) -> None:
    assert ids(await colours.search([Part(text="red")], min_score=0.5)) == ["red.png", "a word"]


async def test_a_filter_narrows_the_hits(colours: Collection) -> None:
    assert ids(await colours.search([Part(text="red")], filter={"shop.city": "Rome"})) == ["green.png"]
    assert ids(await colours.search([Part(text="red")], filter={"_kind": "text"})) == ["a word"]


async def test_vectors_come_along_when_asked_for(colours: Collection) -> None:
    for diversity in (0.0, 0.3):
        (hit,) = await colours.search([Part(text="red")], k=1, vectors=True, diversity=diversity)
        assert hit.vector is not None
        np.testing.assert_allclose(hit.vector, axis("red"), atol=1e-3)


async def test_a_mix_finds_what_lies_between(things: Collection) -> None:
    await things.upsert(
        [
            NewItem(id="red", vector=axis("red")),
            NewItem(id="blue", vector=axis("blue")),
            NewItem(id="purple", vector=axis("red", "blue", math.pi / 4)),
            NewItem(id="dark red", vector=axis("red", "dark", math.pi / 4)),
        ]
    )
    mixed = await things.search([Part(text="red"), Part(image=png(BLUE))])
    assert mixed[0].id == "purple"
    assert mixed[0].score == pytest.approx(1, abs=1e-3)
    less_dark = await things.search([Part(text="red"), Part(text="dark", weight=-0.5)])
    assert ids(less_dark) == ["red", "purple", "dark red", "blue"]
    assert less_dark[0].score == pytest.approx(1 / math.hypot(1, 0.5), abs=1e-3)
    by_two_ids = await things.search([Part(id="red"), Part(id="blue", weight=2)])
    assert ids(by_two_ids) == ["purple", "dark red"]


async def test_a_negative_weight_alone_finds_the_least_alike(colours: Collection) -> None:
    hits = await colours.search([Part(text="red", weight=-1)])
    assert hits[-1].id == "red.png"
    assert hits[-1].score == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize(
    ("query", "kind", "param", "message"),
    [
        ([], InvalidField, "query", "query is empty"),
        ([Part()], InvalidField, None, "exactly one of 'image', 'text', 'id', 'vector'"),
        ([Part(text="red", id="red.png")], InvalidField, "id", "'text' and 'id'"),
        ([Part(text=" ")], InvalidField, "text", "text is empty"),
        ([Part(text="red"), Part(text="red", weight=-1)], InvalidField, "query", "cancel out"),
        ([Part(text="red", weight=0)], InvalidField, "query", "All weights are 0"),
        ([Part(text="red", weight=math.nan)], InvalidField, "query[0].weight", "finite"),
        ([Part(vector=[1.0])], InvalidField, "vector", "holds vectors of 8"),
        ([Part(text="red"), Part(vector=[1.0])], InvalidField, "query[1].vector", "holds vectors of 8"),
        ([Part(id="rot.png")], NotFound, "id", "'rot.png' is not in this collection"),
        ([Part(id="a\0")], NotFound, "id", "not in this collection"),
        ([Part(text="red"), Part(image=b"")], BadRequest, "query[1].image", "empty"),
    ],
)
async def test_a_bad_query_names_the_part_at_fault(
    colours: Collection, query: list[Part], kind: type[EmbedServeError], param: str | None, message: str
) -> None:
    with pytest.raises(kind, match=message.replace("[", r"\[")) as caught:
        await colours.search(query)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("k", 0),
        ("k", 1001),
        ("k", True),
        ("diversity", -0.1),
        ("diversity", 1.5),
        ("diversity", math.nan),
        ("min_score", 2),
        ("min_score", math.nan),
        ("group_by", ""),
        ("group_by", "$a"),
    ],
)
async def test_a_bad_option_is_named(colours: Collection, option: str, value: object) -> None:
    with pytest.raises(InvalidField, match=f"'{option}' is ") as caught:
        await colours.search([Part(text="red")], **{option: value})
    assert caught.value.param == option


async def test_diversity_passes_over_near_copies(things: Collection) -> None:
    copies = [NewItem(id=f"copy {i}", vector=axis("red", "green", 0.10 + i * 1e-3)) for i in range(5)]
    await things.upsert([*copies, NewItem(id="other", vector=axis("red", "blue", 0.9))])
    plain = await things.search([Part(text="red")], k=2)
    assert ids(plain) == ["copy 0", "copy 1"]
    assert ids(await things.search([Part(text="red")], k=2, diversity=0.5)) == ["copy 0", "other"]
    assert set(ids(await things.search([Part(text="red")], k=6, diversity=1.0))) == {
        *(f"copy {i}" for i in range(5)),
        "other",
    }


async def test_grouping_gives_the_best_hit_of_each_value(colours: Collection) -> None:
    hits = await colours.search([Part(text="red")], group_by="colour")
    # red.png stands for both red items; vectors/dark has no colour.
    assert ids(hits) == ["red.png", "blue.png", "green.png", "vectors/dark"]
    assert ids(await colours.search([Part(text="red")], group_by="shop.city", k=2)) == ["red.png", "a word"]


async def test_grouping_looks_on_until_it_has_k_groups(things: Collection) -> None:
    """Two hundred items of one group come before the others; the first pool holds only those."""
    many = [
        NewItem(id=f"{i:03}", vector=axis("red", "green", i * 1e-3), metadata={"g": "a"}) for i in range(200)
    ]
    rest = [NewItem(id=g, vector=axis("red", "green", 1.0), metadata={"g": g}) for g in "bcd"]
    await things.upsert([*many, *rest])
    assert ids(await things.search([Part(text="red")], k=3, group_by="g")) == ["000", "b", "c"]
    assert len(await things.search([Part(text="red")], k=50, group_by="g")) == 4
    diverse = await things.search([Part(text="red")], k=2, group_by="g", diversity=0.5)
    assert diverse[0].id == "000"
    assert diverse[1].metadata["g"] != "a"


async def test_an_empty_collection_answers_nothing(things: Collection) -> None:
    for options in ({}, {"diversity": 0.5}, {"group_by": "a"}, {"vectors": True}):
        assert await things.search([Part(text="red")], **options) == []
    assert await things.neighbours([Part(text="red")], "a") == [[]]
    assert (await things.duplicates()).groups == ()


async def test_a_search_sees_every_finished_write(things: Collection) -> None:
    async def client(seed: int) -> None:
        for i in range(20):
            vector = np.random.default_rng((seed, i)).standard_normal(DIM)
            await things.upsert([NewItem(id=f"{seed}-{i}", vector=vector)])
            assert (await things.search([Part(vector=vector)], k=1))[0].id == f"{seed}-{i}"
            if i % 2:
                await things.delete([f"{seed}-{i}"])
                assert f"{seed}-{i}" not in ids(await things.search([Part(vector=vector)], k=200))

    await asyncio.gather(*map(client, range(5)))
    assert await things.count() == 50


async def test_the_limit_of_k_follows_the_settings(towers: Towers, library: Library) -> None:
    async with library_at(library.folder.parent / "small", towers, Limits(max_k=5)) as small:
        await small.create("c")
        with pytest.raises(InvalidField, match="'k' is 6; it must be a whole number from 1 to 5"):
            await (await small.get("c")).search([Part(text="red")], k=6)


# --- neighbours -----------------------------------------------------------------------------------------


async def test_neighbours_have_the_field_and_their_labels(colours: Collection) -> None:
    answers = await colours.neighbours([Part(image=png(RED)), Part(text="blue")], "colour", k=2)
    red, blue = answers
    assert isinstance(red, list)
    assert isinstance(blue, list)
    assert [(one.id, one.labels) for one in red] == [("red.png", ("red",)), ("a word", ("red",))]
    assert red[0].score == pytest.approx(1, abs=1e-3)
    assert blue[0].id == "blue.png"


async def test_neighbours_of_an_item_leave_it_out(colours: Collection) -> None:
    (answer,) = await colours.neighbours([Part(id="red.png")], "shop.city", filter={"shop.city": "Bonn"})
    assert isinstance(answer, list)
    assert [(one.id, one.labels) for one in answer] == [("blue.png", ("Bonn",))]


async def test_a_list_gives_several_labels(things: Collection) -> None:
    await things.upsert([NewItem(id="a", text="red", metadata={"tags": ["warm", {"no": 1}, 3, "loud"]})])
    (answer,) = await things.neighbours([Part(text="red")], "tags")
    assert isinstance(answer, list)
    assert answer[0].labels == ("warm", 3, "loud")


async def test_a_bad_neighbour_query_fails_alone(colours: Collection) -> None:
    bad, good, unknown = await colours.neighbours(
        [Part(image=b""), Part(text="green"), Part(id="none")], "colour", k=1
    )
    assert isinstance(bad, BadRequest)
    assert isinstance(unknown, NotFound)
    assert isinstance(good, list)
    assert good[0].id == "green.png"


# --- duplicates -----------------------------------------------------------------------------------------


async def test_duplicates_are_grouped_by_single_linkage(things: Collection) -> None:
    await things.upsert(
        [
            # Neighbours in this chain are .2 rad apart (cosine .98), its ends .4 (.92).
            *(NewItem(id=f"chain {i}", vector=axis("red", "green", 0.2 * i)) for i in range(3)),
            *(NewItem(id=f"same {i}", image=png(BLUE)) for i in range(2)),
            NewItem(id="alone", vector=axis("dark")),
        ]
    )
    found = await things.duplicates(threshold=0.95)
    assert [group.ids for group in found.groups] == [
        ("chain 0", "chain 1", "chain 2"),
        ("same 0", "same 1"),
    ]
    assert found.groups[0].similarity == pytest.approx(math.cos(0.2), abs=2e-3)
    assert (found.total_groups, found.total_items, found.scanned) == (2, 5, 6)
    limited = await things.duplicates(threshold=0.95, limit=1)
    assert (len(limited.groups), limited.total_groups) == (1, 2)
    exact = await things.duplicates(threshold=1)
    assert exact.groups == (DuplicateGroup(("same 0", "same 1"), pytest.approx(1, abs=1e-3)),)


async def test_duplicates_agree_with_every_pair_compared(things: Collection) -> None:
    rng = np.random.default_rng(4)
    centres = np.repeat(rng.standard_normal((60, DIM)), [5, 18] * 30, axis=0)
    vectors = centres + 0.08 * rng.standard_normal(centres.shape)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    await things.upsert([NewItem(id=f"{i:03}", vector=vector) for i, vector in enumerate(vectors)])
    stored = np.stack([one.vector for one in await things.scan(limit=1000, vectors=True)])
    alike = stored @ stored.T >= 0.97
    label = np.arange(690)
    while not np.array_equal(label, new := np.where(alike, label[None, :], 690).min(axis=1)):
        label = new
    expected = {
        tuple(f"{i:03}" for i in np.flatnonzero(label == one))
        for one in np.unique(label)
        if (label == one).sum() > 1
    }
    found = await things.duplicates(threshold=0.97, limit=1000)
    assert {group.ids for group in found.groups} == expected
    assert len(expected) > 30
    assert max(map(len, expected)) > 8


async def test_duplicates_within_a_filter_compare_only_those(things: Collection) -> None:
    items = [NewItem(id=f"{g}{i}", image=png(GREEN), metadata={"g": g}) for g in "ab" for i in range(2)]
    await things.upsert(items)
    found = await things.duplicates(filter={"g": "a"})
    assert [group.ids for group in found.groups] == [("a0", "a1")]


async def test_a_search_for_duplicates_can_be_cancelled(things: Collection) -> None:
    vectors = np.random.default_rng(5).standard_normal((2000, DIM))
    await things.upsert([NewItem(id=str(i), vector=vector) for i, vector in enumerate(vectors)])
    task = asyncio.create_task(things.duplicates(threshold=0.5))
    await asyncio.sleep(0.02)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await things.count() == 2000


async def test_dropping_a_collection_ends_a_search_for_duplicates(
    things: Collection, library: Library
) -> None:
    vectors = np.random.default_rng(6).standard_normal((1500, DIM))
    await things.upsert([NewItem(id=str(i), vector=vector) for i, vector in enumerate(vectors)])
    task = asyncio.create_task(things.duplicates(threshold=0.5))
    await asyncio.sleep(0)
    await library.drop("things")
    with pytest.raises(NotFound, match="has been deleted"):
        await task


@pytest.mark.parametrize(("option", "value"), [("threshold", 0.4), ("threshold", 1.1), ("limit", 0)])
async def test_bad_options_of_duplicates_are_named(things: Collection, option: str, value: float) -> None:
    with pytest.raises(InvalidField, match=f"'{option}' is {value}"):
        await things.duplicates(**{option: value})
