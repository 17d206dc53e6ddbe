"""Real servers for the browser tests, several in one process so that the imports are paid for once.

    python -m tests.embedserve.page.servers FOLDER

Serves an app for each sub-folder of FOLDER that holds a `serve.json` ({"encoder": …, "api_key": […]}). Reads
lines `start NAME` and `stop NAME`, answers each with NAME and its URL, and ends when its input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from embedserve.app import create_app
from embedserve.config import ServeConfig


class Server(uvicorn.Server):
    def __init__(self, folder: Path, port: int) -> None:
        settings = json.loads((folder / "serve.json").read_text())
        config = ServeConfig(
            data=folder / "data",
            encoder=settings["encoder"],
            api_key=tuple(settings.get("api_key", ())),
            threads=1,
        )
        super().__init__(uvicorn.Config(create_app(config), log_level="warning", lifespan="on", ws="none"))
        self.listener = socket.create_server(("127.0.0.1", port))
        self.port: int = self.listener.getsockname()[1]
        self.is_up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the end of our input is the signal


async def main(root: Path) -> None:
    ports: dict[str, int] = {}
    running: dict[str, tuple[Server, asyncio.Task[None]]] = {}

    async def stop(name: str) -> None:
        server, task = running.pop(name)
        server.should_exit = True
        await task

    while line := (await asyncio.to_thread(sys.stdin.readline)).split():
        verb, name = line
        if verb == "start":
            server = Server(root / name, ports.get(name, 0))
            ports[name] = server.port
            task = asyncio.create_task(server.serve(sockets=[server.listener]))
            running[name] = (server, task)
            await asyncio.wait(
                [task, asyncio.ensure_future(server.is_up.wait())], return_when=asyncio.FIRST_COMPLETED
            )
        else:
            await stop(name)
        print(name, f"http://127.0.0.1:{ports[name]}", flush=True)
    for name in list(running):
        await stop(name)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
