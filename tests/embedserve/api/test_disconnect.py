"""A client that hangs up leaves the queue, so that those who wait are served sooner."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedserve.app import create_app
from embedserve.config import ServeConfig


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/v1/embed", "/v1/embeddings"])
async def test_inputs_of_a_client_that_is_gone_are_not_computed(
    tmp_path: Path, tiny_folder: Path, path: str
) -> None:
    app = create_app(ServeConfig(data=tmp_path, encoder=str(tiny_folder), workers=1, max_batch=1))
    async with app.router.lifespan_context(app):
        towers = app.state.services.towers
        running, go_on, computed = asyncio.Event(), threading.Event(), []
        embed, loop = towers.encoder.embed_texts, asyncio.get_running_loop()

        def slow(tokens: list[list[int]]) -> np.ndarray:
            computed.extend(tokens)
            loop.call_soon_threadsafe(running.set)
            go_on.wait(20)
            return embed(tokens)

        towers.encoder.embed_texts = slow
        first = asyncio.create_task(towers.texts(["red"]))
        await running.wait()

        gone, sent = asyncio.Event(), []
        field = "inputs" if path == "/v1/embed" else "input"
        body = json.dumps({field: ["blue", "green"]}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            for message in messages:
                return message
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        request = asyncio.create_task(app(scope, receive, send))
        async with asyncio.timeout(20):
            while towers.queues["text"].waiting < 2:
                await asyncio.sleep(0)
            gone.set()
            await request
            while towers.queues["text"].waiting:
                await asyncio.sleep(0)
        go_on.set()
        await first
        await towers.texts(["dark"])
        assert computed == [[2], [5]]
        assert sent == []
        assert 'status="499"' in app.state.services.metrics.text().decode()
