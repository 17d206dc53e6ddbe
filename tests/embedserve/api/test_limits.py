"""Limits: each refusal names the limit, and says so for one input as for many."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient

from embedserve.app import create_app
from embedserve.config import Limits, ServeConfig
from tests.embedserve.api.requests import error, listening, ok, picture, serving, upload
from tests.embedserve.colours import RED, png

LIMITS = Limits(max_body_bytes=20_000, max_image_bytes=5000, max_inputs=4, max_pixels=10_000, max_k=3)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("data"), tiny_folder, limits=LIMITS, url_inputs=False) as client:
        yield client


def test_a_body_over_the_limit_is_a_413_that_names_it(client: TestClient) -> None:
    found = error(client.post("/v1/embed", json={"inputs": ["a" * 30_000]}), 413, "body_too_large")
    assert "20000" in found["message"]


@asynccontextmanager
async def streaming(data: Path, encoder: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A client that sends bodies chunk by chunk, which starlette's does not."""
    app = create_app(ServeConfig(data=data, encoder=str(encoder), threads=1, limits=LIMITS))
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        yield client


@pytest.mark.anyio
@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
async def test_a_chunked_body_is_counted_as_it_arrives(
    tmp_path: Path, tiny_folder: Path, content_type: str
) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
        for _ in range(100):
            sent += 1000
            yield b"a" * 1000

    async with streaming(tmp_path, tiny_folder) as client:
        headers = {"Content-Type": content_type}
        error(await client.post("/v1/embed", content=chunks(), headers=headers), 413, "body_too_large")
    assert sent <= 21_000


@pytest.mark.anyio
async def test_lines_written_before_the_limit_are_told(tmp_path: Path, tiny_folder: Path) -> None:
    async def lines() -> AsyncIterator[bytes]:
        for number in range(2000):
            yield b'{"id": "%d", "text": "red"}\n' % number

    async with streaming(tmp_path, tiny_folder) as client:
        await client.put("/v1/collections/c")
        headers = {"Content-Type": "application/x-ndjson"}
        response = await client.post("/v1/collections/c/items", content=lines(), headers=headers)
        error(response, 413, "body_too_large")
        written = [result["id"] for result in response.json()["results"]]
        assert len(written) == ok(await client.get("/v1/collections/c"))["items"] > 500


def test_one_image_over_the_limit_fails_alone(client: TestClient) -> None:
    noise = np.random.default_rng(0).integers(0, 255, 6000, np.uint8).tobytes()
    files = [("file", ("large.png", png(RED) + noise)), upload(RED)]
    first, second = ok(client.post("/v1/embed", files=files))["results"]
    assert first["error"]["code"] == "image_too_large"
    assert "5000" in first["error"]["message"].replace(",", "")
    assert "embedding" in second


def test_too_many_inputs_are_a_413_that_names_the_limit(client: TestClient, empty: str) -> None:
    for response in (
        client.post("/v1/embed", json={"inputs": ["red"] * 5}),
        client.post("/v1/embed", files=[upload(RED)] * 5),
        client.post("/v1/embeddings", json={"input": ["red"] * 5}),
        client.post("/v1/embeddings", json={"input": [[2]] * 5}),
        client.post("/v1/classify", json={"images": [picture(RED)], "labels": list("abcde")}),
        client.post(f"{empty}/items", json={"items": [{"text": "red"}] * 5}),
        client.post(f"{empty}/items", files=[upload(RED)] * 5),
    ):
        assert "4" in error(response, 413)["message"]


def test_a_form_field_may_not_be_endless(tmp_path: Path, tiny_folder: Path) -> None:
    with serving(tmp_path, tiny_folder) as client:
        found = error(client.post("/v1/embed", files=[("text", (None, "a" * 2_000_000))]), 413)
        assert "1048576" in found["message"]


def test_too_many_neighbours_are_a_422_that_names_the_limit(client: TestClient, empty: str) -> None:
    found = error(client.post(f"{empty}/search", json={"text": "red", "k": 4}), 422)
    assert "3" in found["message"]


def test_urls_are_not_fetched_where_that_is_off(client: TestClient) -> None:
    request = {"inputs": [{"image": "https://example.com/a.png"}]}
    error(client.post("/v1/embed", json=request), 403, "url_inputs_off")


@pytest.mark.anyio
async def test_a_full_queue_is_a_429_for_one_as_for_many_and_the_server_stays_ready(
    tmp_path: Path, tiny_folder: Path
) -> None:
    limits = Limits(queue_size=2)
    app = create_app(
        ServeConfig(data=tmp_path, encoder=str(tiny_folder), workers=1, max_batch=1, limits=limits)
    )
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        running, go_on = threading.Event(), threading.Event()
        encoder = app.state.services.towers.encoder
        embed = encoder.embed_texts

        def slow(tokens: list[list[int]]) -> np.ndarray:
            running.set()
            go_on.wait(20)
            return embed(tokens)

        encoder.embed_texts = slow  # holds the tower while the queue fills
        two = asyncio.create_task(client.post("/v1/embed", json={"inputs": ["red", "blue"]}))
        await asyncio.to_thread(running.wait, 20)
        for response in (
            await client.post("/v1/embed", json={"inputs": ["red"]}),
            await client.post("/v1/embed", json={"inputs": ["red", "green"]}),
            await client.post("/v1/embeddings", json={"input": "red"}),
        ):
            error(response, 429, "busy")
            assert int(response.headers["retry-after"]) >= 1
        ready = asyncio.create_task(client.get("/readyz"))
        go_on.set()
        assert len(ok(await two)["results"]) == 2
        ok(await ready)
        assert "embedserve_queue_waiting" in (await client.get("/metrics")).text


def test_a_large_upload_that_is_refused_still_gets_its_answer(tmp_path: Path, tiny_folder: Path) -> None:
    """A server that closes at once makes clients report a broken connection instead of the reason."""
    body = b"a" * 5_000_000
    headers = {"Content-Type": "application/json"}

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(body), 65536):
            yield body[start : start + 65536]

    with (
        listening(tmp_path, tiny_folder, api_key=("secret",), limits=LIMITS) as url,
        httpx2.Client(base_url=url) as client,
    ):
        for content in (body, chunks()):
            error(client.post("/v1/embed", content=content, headers=headers), 401)
        headers["Authorization"] = "Bearer secret"
        for content in (body, chunks()):
            error(client.post("/v1/embed", content=content, headers=headers), 413, "body_too_large")
        ok(client.post("/v1/embed", json={"inputs": ["red"]}, headers=headers))
