"""The client, against the app in this process and against real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from PIL import Image

from embedserve import errors
from embedserve.answers import as_error
from embedserve.api.failures import error_body
from embedserve.client import Client, Upload
from embedserve.config import ServeConfig
from embedserve.errors import (
    BadRequest,
    Busy,
    EmbedServeError,
    InvalidField,
    NotFound,
    NotReady,
    UnsupportedMedia,
)
from tests.embedserve.colours import BLUE, GREEN, RED, quarters

T = TypeVar("T")

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, EmbedServeError)]


def picture(colour: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def local(tiny_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    """Runs a coroutine with a client of an app in this process."""

    def run(work: Callable[[Client], Awaitable[T]], encoder: Path = tiny_folder) -> T:
        async def connected() -> T:
            async with Client.local(ServeConfig(data=tmp_path, encoder=str(encoder))) as client:
                return await work(client)

        return asyncio.run(connected())

    return run


@asynccontextmanager
async def canned(answers: Sequence[tuple[int, str, str]]) -> AsyncIterator[tuple[str, list[str]]]:
    """A server on a real port that gives these answers (status, headers, body), the last one for ever."""
    seen: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        seen.append(head.split("\r\n")[0])
        status, headers, body = answers[min(len(seen), len(answers)) - 1]
        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{headers}\r\n"
        writer.write((head + body).encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", seen


BUSY = '{"error": {"message": "full", "type": "rate_limit_error", "param": null, "code": "busy"}}'
MODELS = '{"object": "list", "data": []}'


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_comes_back_as_the_class_it_was(cls: type[EmbedServeError]) -> None:
    sent = cls("what, allowed, fix", param="input[3]")
    got = as_error(error_body(sent), sent.status)
    assert type(got) is cls
    assert (str(got), got.param, got.code) == ("what, allowed, fix", "input[3]", sent.code)


def test_a_finer_code_keeps_the_class_of_its_status() -> None:
    got = as_error(
        {"message": "m", "type": "invalid_request_error", "param": None, "code": "body_too_large"}, 413
    )
    assert type(got) is errors.TooLarge
    assert got.code == "body_too_large"


def test_a_busy_server_is_asked_again_until_it_answers() -> None:
    async def work() -> list[str]:
        answers = [
            (429, "Retry-After: 0\r\n", BUSY),
            (503, "", BUSY.replace("busy", "not_ready")),
            (200, "", MODELS),
        ]
        async with canned(answers) as (url, seen), Client(url) as client:
            await client.models()
            return seen

    assert asyncio.run(work()) == ["GET /v1/models HTTP/1.1"] * 3


def test_patience_has_an_end_and_the_error_carries_retry_after() -> None:
    async def work() -> None:
        async with (
            canned([(429, "Retry-After: 7\r\n", BUSY)]) as (url, seen),
            Client(url, patience=0.05) as client,
        ):
            with pytest.raises(Busy, match="full") as caught:
                await client.models()
            assert caught.value.retry_after == 7
            assert len(seen) == 2

    asyncio.run(work())


def test_other_errors_are_not_tried_again() -> None:
    async def work() -> list[str]:
        async with (
            canned([(400, "", BUSY.replace("busy", "bad_request"))]) as (url, seen),
            Client(url) as client,
        ):
            with pytest.raises(BadRequest):
                await client.models()
            return seen

    assert len(asyncio.run(work())) == 1


def test_another_program_on_the_port_is_recognised() -> None:
    async def work() -> None:
        async with canned([(404, "", "<html>nginx</html>")]) as (url, _), Client(url) as client:
            with pytest.raises(NotFound, match="another program") as caught:
                await client.models()
            assert "nginx" in str(caught.value)

    asyncio.run(work())


def test_no_server_says_how_to_start_one() -> None:
    async def work() -> None:
        async with canned([]) as (url, _):
            pass
        async with Client(url) as client:
            await client.models()

    with pytest.raises(NotReady, match="embedserve serve"):
        asyncio.run(work())


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost", "http://[bad", ""])
def test_a_url_that_is_none_says_so(url: str) -> None:
    with pytest.raises(BadRequest, match="is not a server's URL"):
        Client(url)


def test_vectors_come_in_the_order_of_the_inputs_and_a_bad_one_fails_alone(
    local: Any, tmp_path: Path
) -> None:
    file = tmp_path / "green.png"
    file.write_bytes(picture("lime"))
    red, bad, green, text = local(
        lambda client: client.embed([picture("red"), b"<html>", file, {"text": "red"}])
    )
    assert red.dtype == np.float32
    assert red @ text == pytest.approx(1, abs=1e-3)
    assert abs(float(red @ green)) < 1e-3
    assert isinstance(bad, UnsupportedMedia)


def test_classify_gives_the_best_label_first(local: Any) -> None:
    answer = local(
        lambda client: client.classify([picture("blue")], labels=["red", "blue"], templates=["{}"])
    )
    assert answer["results"][0]["labels"][0]["label"] == "blue"


def test_a_heat_map_as_numbers_and_as_a_picture(local: Any, seeing_folder: Path) -> None:
    four = quarters(RED, GREEN, BLUE, (0, 0, 0))

    async def work(client: Client) -> None:
        attention, one_head = await client.heatmap(four), await client.heatmap(four, head=1)
        assert attention["kind"] == "attention"
        assert one_head["values"] == [[1, 0], [0, 0]] != attention["values"]
        green = await client.heatmap(four, text="green")
        assert green["kind"] == "similarity"
        assert green["values"][0][1] == green["high"] == pytest.approx(1, abs=1e-6)
        shown = Image.open(BytesIO(await client.heatmap_picture(four, text="green")))
        assert (shown.format, shown.size) == ("PNG", (8, 8))
        with pytest.raises(UnsupportedMedia):
            await client.heatmap(b"<html>")

    local(work, seeing_folder)


def test_an_encoder_that_offers_no_heat_map_says_so(local: Any) -> None:
    with pytest.raises(InvalidField, match="attention"):
        local(lambda client: client.heatmap(picture("red")))


def test_label_sets_are_saved_used_and_deleted(local: Any) -> None:
    async def work(client: Client) -> None:
        await client.save_label_set("colours", {"labels": ["red", "green"]})
        assert (await client.label_set("colours"))["labels"]
        answer = await client.classify([picture("red")], label_set="colours")
        assert answer["results"][0]["labels"][0]["label"] == "red"
        await client.delete_label_set("colours")
        with pytest.raises(NotFound):
            await client.label_set("colours")

    local(work)


def test_a_collection_from_making_to_dropping(local: Any) -> None:
    async def work(client: Client) -> None:
        await client.create_collection("things", description="for a test")
        answer = await client.upload(
            "things",
            [
                Upload(id="a/ü b%2F.png", image=picture("red"), metadata={"n": 1}),
                Upload(id="bad", image=b"", metadata={}),
            ],
        )
        assert (answer["upserted"], answer["failed"]) == (1, 1)
        assert answer["results"][1]["error"]["code"]
        await client.upsert("things", [{"id": "word", "text": "green", "metadata": {"n": 2}}])
        assert (await client.item("things", "a/ü b%2F.png"))["metadata"]["n"] == 1
        assert (await client.thumbnail("things", "a/ü b%2F.png"))[8:12] == b"WEBP"
        page = await client.items("things", filter={"n": {"$gt": 1}})
        assert [item["id"] for item in page["items"]] == ["word"]
        hits = (await client.search("things", image=picture("red"), k=1))["hits"]
        assert hits[0]["id"] == "a/ü b%2F.png"
        mixed = await client.search("things", query=[{"text": "green"}, {"text": "red", "weight": -1}], k=1)
        assert mixed["hits"][0]["id"] == "word"
        assert "groups" in await client.duplicates("things", threshold=0.9)
        vote = await client.vote("things", "n", images=[picture("red")], ids=["word"], k=1)
        assert vote["results"][0]["labels"][0]["label"] == 1
        await client.delete_item("things", "word")
        many = [{"id": f"{n:03}", "text": "red", "metadata": {"many": True}} for n in range(50)]
        await client.upsert("things", many)
        assert await client.delete_items("things", [f"{n:03}" for n in range(45)] + ["unknown"]) == 45
        assert await client.delete_items("things", filter={"many": True}) == 5
        assert [one["name"] for one in await client.collections()] == ["things"]
        await client.drop_collection("things")
        with pytest.raises(NotFound):
            await client.collection("things")

    local(work)


def test_a_picture_is_found_by_the_text_it_was_uploaded_with(local: Any) -> None:
    async def work(client: Client) -> None:
        await client.create_collection("things")
        uploads = [
            Upload(id="plain", image=picture("red")),
            Upload(id="ball", image=picture("red"), text="round"),
            Upload(id="mostly round", image=picture("red"), text="round", text_weight=10),
            Upload(id="wrong", image=picture("red"), text="round", text_weight=11),
        ]
        answer = await client.upload("things", uploads)
        assert [result["status"] for result in answer["results"]] == ["ok", "ok", "ok", "error"]
        await client.upsert("things", [{"id": "box", "image": picture("red"), "text": "square"}])
        hits = (await client.search("things", text="round", k=2))["hits"]
        assert [hit["id"] for hit in hits] == ["mostly round", "ball"]
        assert [hit["score"] for hit in hits] == pytest.approx([10 / 101**0.5, 0.5 / 1.25**0.5], abs=1e-3)
        assert hits[1]["metadata"] == {}

    local(work)


def test_all_failing_is_still_an_answer_for_each(local: Any) -> None:
    async def work(client: Client) -> Any:
        await client.create_collection("things")
        return await client.upload("things", [Upload(id="bad", image=b"\0"), Upload(id="worse", image=b"")])

    answer = local(work)
    assert (answer["upserted"], answer["failed"]) == (0, 2)


def test_an_unknown_collection_is_answered_with_the_closest(local: Any) -> None:
    async def work(client: Client) -> None:
        await client.create_collection("holidays")
        await client.search("holliday", text="red")

    with pytest.raises(NotFound, match="did you mean 'holidays'"):
        local(work)


def test_a_client_outside_its_context_says_so() -> None:
    with pytest.raises(RuntimeError, match="async with"):
        asyncio.run(Client().models())
