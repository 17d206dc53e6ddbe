"""kill -9 while clients write and delete: what was acknowledged is there after the restart, and nothing else.

A real server process, killed at seeded moments and started again on the same data, round after round. Each
client owns its ids and writes down what was acknowledged; for the one request that was on its way when the
server died, both the state before and the state asked for are right.

Three rounds run with the other tests; EMBEDSERVE_CRASH_ROUNDS=50 runs fifty.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from tests.tiny_bundle import DIM

ROUNDS = int(os.environ.get("EMBEDSERVE_CRASH_ROUNDS", "3"))
CLIENTS = 6
IDS = 40
"""Ids of each client; few, so that most are replaced and deleted again and again."""
SEED = 20_240_229
STARVED = 90
"""Seconds that a start or an answer may take on a machine busy with other things."""
ITEMS = "/v1/collections/crash/items"

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120 + 60 * ROUNDS)]


@dataclass(frozen=True)
class Version:
    """One version of an item. From its number follow its vector or picture, so a mixture would show."""

    number: int
    picture: bool

    @property
    def colour(self) -> tuple[int, int, int]:
        rng = np.random.default_rng(self.number)
        red, green, blue = rng.integers(256, size=3).tolist()
        return red, green, blue

    @property
    def vector(self) -> np.ndarray:
        if self.picture:
            mean = np.array(self.colour) / 255
            full = np.array([*mean, 1 - mean.max(), 0, 0, 0, 0])
        else:
            full = np.random.default_rng(self.number).standard_normal(DIM)
        return full / np.linalg.norm(full)

    def item(self, name: str, client: int) -> dict[str, Any]:
        metadata = {"client": client, "number": self.number, "picture": self.picture}
        about = {"id": name, "metadata": metadata}
        if not self.picture:
            return {**about, "vector": self.vector.tolist()}
        file = io.BytesIO()
        Image.new("RGB", (8, 8), self.colour).save(file, "PNG")
        return {**about, "image": base64.b64encode(file.getvalue()).decode()}


State = Version | None
"""What an id holds; None when it is deleted, or was never written."""


@dataclass
class Ledger:
    """What one client knows: the acknowledged state of each id, and what it asked for without an answer."""

    client: int
    acknowledged: dict[str, State] = field(default_factory=dict)
    asked: dict[str, State] = field(default_factory=dict)

    def allowed(self, name: str) -> set[State]:
        states = {self.acknowledged.get(name)}
        return states | {self.asked[name]} if name in self.asked else states


class Clients:
    """All clients of one round: `answers` counts acknowledged requests, `enough` is set at `until`."""

    def __init__(self, until: int) -> None:
        self.answers = 0
        self.until = until
        self.enough = asyncio.Event()
        self.killed = False

    async def run(self, ledger: Ledger, http: httpx2.AsyncClient, rng: np.random.Generator) -> None:
        """Writes and deletes until the server is gone."""
        number = int(rng.integers(1 << 40))
        ids = [f"client {ledger.client}/{i}" for i in range(IDS)]
        while True:
            some = [str(one) for one in rng.choice(ids, size=int(rng.integers(1, 12)), replace=False)]
            action = rng.random()
            if action < 0.65:
                ledger.asked = {}
                for name in some:
                    number += 1
                    ledger.asked[name] = Version(number, picture=bool(rng.random() < 0.3))
                items = [
                    version.item(name, ledger.client) for name, version in ledger.asked.items() if version
                ]
                request = http.build_request("POST", ITEMS, json={"items": items})
            elif action < 0.95:
                ledger.asked = dict.fromkeys(some)
                request = http.build_request("DELETE", ITEMS, params={"id": some})
            else:
                wanted = {"client": ledger.client, "picture": True}
                ledger.asked = {
                    name: None for name, state in ledger.acknowledged.items() if state and state.picture
                }
                request = http.build_request("DELETE", ITEMS, params={"filter": json.dumps(wanted)})
            try:
                response = await http.send(request)
            except httpx2.TransportError:
                if self.killed:
                    return  # and `asked` keeps what is in doubt
                raise
            assert response.status_code == 200, response.text
            if request.method == "POST":
                assert response.json()["failed"] == 0, response.text
            ledger.acknowledged |= ledger.asked
            ledger.asked = {}
            self.answers += 1
            if self.answers >= self.until:
                self.enough.set()


@asynccontextmanager
async def server(data: Path, encoder: Path) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    """A server process on a free port, and its URL once it is ready. Killed at the end, if it still runs."""
    command = [sys.executable, "-m", "embedserve", "serve", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [*command, "--data", str(data), "--encoder", str(encoder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        try:
            async with asyncio.timeout(STARVED):
                line = await asyncio.to_thread(process.stdout.readline)
            url = re.search(r"http://[\d.:]+", line)
            assert url is not None, f"the server did not start: {line!r}"
            yield process, url[0]
        finally:
            process.kill()
            await asyncio.to_thread(process.wait)


async def stored(http: httpx2.AsyncClient) -> dict[str, dict[str, Any]]:
    """All items by id, with their vectors."""
    found: dict[str, dict[str, Any]] = {}
    params: dict[str, Any] = {"limit": 1000, "include": ["metadata", "vector"]}
    while True:
        page = (await http.get(ITEMS, params=params)).raise_for_status().json()
        found |= {item["id"]: item for item in page["items"]}
        if page["next"] is None:
            return found
        params["after"] = page["next"]


async def check(http: httpx2.AsyncClient, ledgers: list[Ledger]) -> int:
    """Compares the server with the ledgers, which then take over what was in doubt. Returns the items."""
    found = await stored(http)
    expected: dict[str, State] = {}
    for ledger in ledgers:
        for name in {**ledger.acknowledged, **ledger.asked}:
            item = found.get(name)
            state = None
            if item is not None:
                state = Version(item["metadata"]["number"], item["metadata"]["picture"])
            assert state in ledger.allowed(name), f"{name}: {state} is none of {ledger.allowed(name)}"
            expected[name] = ledger.acknowledged[name] = state
        ledger.asked = {}
    there = {name: state for name, state in expected.items() if state}
    assert set(found) == set(there), "items that nobody wrote"
    for name, state in there.items():
        np.testing.assert_allclose(found[name]["vector"], state.vector, atol=0.02, err_msg=name)
        assert (found[name]["thumbnail"] is not None) == state.picture
    await check_thumbnails(http, found)
    await check_search(http, there)
    return len(found)


async def check_thumbnails(http: httpx2.AsyncClient, found: Mapping[str, dict[str, Any]]) -> None:
    for item in found.values():
        if item["thumbnail"] is not None:
            response = await http.get(item["thumbnail"])
            assert response.status_code == 200, f"{item['id']}: {response.text}"


async def check_search(http: httpx2.AsyncClient, there: Mapping[str, Version]) -> None:
    """The index holds what the database holds: every item is found by its own vector, and nothing else is."""
    body = {"vector": [1.0] * DIM, "k": 1000, "include": []}
    hits = await search(http, body)
    assert {hit["id"] for hit in hits} == set(there)
    for name, state in list(there.items())[:10]:
        body = {"vector": state.vector.tolist(), "k": 20}
        hits = await search(http, body)
        assert name in {hit["id"] for hit in hits if hit["score"] > 0.999}


async def search(http: httpx2.AsyncClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = await http.post("/v1/collections/crash/search", json=body)
    return list(response.raise_for_status().json()["hits"])


async def test_kill_9_loses_no_acknowledged_write_and_brings_no_deleted_item_back(
    tmp_path: Path, tiny_folder: Path
) -> None:
    rng = np.random.default_rng(SEED)
    ledgers = [Ledger(client) for client in range(CLIENTS)]
    answers = in_doubt = items = 0
    for _ in range(ROUNDS):
        async with (
            server(tmp_path / "data", tiny_folder) as (process, url),
            httpx2.AsyncClient(base_url=url, timeout=STARVED) as http,
        ):
            assert (await http.put("/v1/collections/crash")).status_code in {200, 201}
            items = await check(http, ledgers)
            clients = Clients(until=int(rng.integers(5, 80)))
            running = [
                asyncio.create_task(clients.run(one, http, r))
                for one, r in zip(ledgers, rng.spawn(CLIENTS), strict=True)
            ]
            enough = asyncio.create_task(clients.enough.wait())
            await asyncio.wait([*running, enough], return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(rng.uniform(0, 0.03))  # into the middle of whatever goes on
            died = process.poll()
            clients.killed = True
            process.kill()
            ends = await asyncio.gather(*running, return_exceptions=True)
            enough.cancel()
            assert died is None, f"the server ended by itself with {died} and {ends}"
            assert ends == [None] * CLIENTS, ends
        answers += clients.answers
        in_doubt += sum(bool(ledger.asked) for ledger in ledgers)
    async with (
        server(tmp_path / "data", tiny_folder) as (_, url),
        httpx2.AsyncClient(base_url=url, timeout=STARVED) as http,
    ):
        items = await check(http, ledgers)
        assert (await http.get("/readyz")).status_code == 200
    print(f"{ROUNDS} kills, {answers} acknowledged requests, {in_doubt} cut off, {items} items at the end")
    assert in_doubt > 0, "no request was cut off, so nothing was tested"
