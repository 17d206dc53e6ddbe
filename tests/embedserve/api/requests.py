"""Small helpers of the HTTP tests: apps in this process, files for forms, answers checked for their form."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from starlette.testclient import TestClient

from embedserve.app import create_app
from embedserve.config import ServeConfig
from tests.embedserve.colours import png


@contextmanager
def serving(data: Path, encoder: Path, **settings: Any) -> Iterator[TestClient]:
    """A client of an app in this process. Exceptions become answers, as on a real server."""
    config = ServeConfig(data=data, encoder=str(encoder), threads=1, **settings)
    with TestClient(create_app(config), base_url="http://localhost", raise_server_exceptions=False) as client:
        yield client


class _Server(uvicorn.Server):
    def __init__(self, config: ServeConfig) -> None:
        super().__init__(uvicorn.Config(create_app(config), port=0, log_level="warning", ws="none"))
        self.up = threading.Event()

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        self.port = self.servers[0].sockets[0].getsockname()[1]
        self.up.set()


@contextmanager
def listening(data: Path, encoder: Path, **settings: Any) -> Iterator[str]:
    """The URL of a real server, which runs in a thread of this process."""
    server = _Server(ServeConfig(data=data, encoder=str(encoder), threads=1, **settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert server.up.wait(20)
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def picture(colour: tuple[int, int, int]) -> str:
    """A plain picture as base64."""
    return base64.b64encode(png(colour)).decode()


def upload(colour: tuple[int, int, int], name: str = "photo.png", part: str = "file") -> tuple[str, Any]:
    """A file part of a form."""
    return part, (name, png(colour), "image/png")


def error(response: httpx2.Response, status: int, code: str | None = None) -> dict[str, Any]:
    """The error in `response`, which must have this status and the form that all errors have."""
    assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert len(found["message"]) > 20
    if code is not None:
        assert found["code"] == code
    return dict(found)


def ok(response: httpx2.Response, status: int = 200) -> Any:
    """The JSON of a success."""
    assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
    return response.json() if response.content else None
