"""Runs the app on a port: from a `ServeConfig` to a server that has proven itself, and down again cleanly."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Literal

import httpx2
import uvicorn

from embedserve.answers import failure_of
from embedserve.config import ServeConfig
from embedserve.errors import BadRequest, EmbedServeError

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["LogLevel", "serve"]

LogLevel = Literal["debug", "info", "warning", "error"]

DRAIN_SECONDS = 30
"""Running requests have this long to finish after SIGTERM or Ctrl-C."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    config: ServeConfig,
    *,
    log_level: LogLevel = "warning",
    access_log: bool = False,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the running requests and returns.

    Args:
        ready: Called with the URL once the probe has passed: an embedding was computed and was right.

    Raises BadRequest or InvalidField when the address cannot be served, and what the app's start raises
    (BundleError), NotReady when the probe fails.
    """
    from embedserve.app import create_app
    from embedserve.security import refuse_unsafe

    refuse_unsafe(config)
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    with _listen(config.host, config.port) as listener:  # a taken port is told before an encoder is loaded
        app = create_app(config)
        settings = uvicorn.Config(
            app,
            log_level=log_level,
            access_log=access_log or log_level == "debug",
            lifespan="off",  # `_run` is the lifespan: what goes wrong in it reaches the caller
            ws="none",
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        server = _Server(app, settings, lambda: ready(_url(config.host, listener)))
        with asyncio.Runner(loop_factory=settings.get_loop_factory()) as runner:
            runner.run(_run(app, server, listener))
    if server.failure is not None:
        raise server.failure


async def _run(app: FastAPI, server: _Server, listener: socket.socket) -> None:
    before = {number: signal.signal(number, server.handle_exit) for number in SIGNALS}
    try:
        async with app.router.lifespan_context(app):
            await server.serve(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """uvicorn's server, which proves itself before it says that it is there."""

    def __init__(self, app: FastAPI, settings: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(settings)
        self.app = app
        self.ready = ready
        self.failure: EmbedServeError | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        transport = httpx2.ASGITransport(self.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            response = await client.get("/readyz")
        if response.is_success:
            _settle_interpreter()
            self.ready()
        else:
            self.failure = failure_of(response)
            self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """`_run` handles them: uvicorn would raise an obeyed signal again, and a clean stop is no failure."""
        yield


def _settle_interpreter() -> None:
    """Makes room for requests among the threads that run the encoder; for a process that does nothing else.

    What start-up made lives as long as the process, so the collector need not walk over it again and again,
    holding up all threads. And a request waits a tenth as long for a thread that computes in Python. Together
    they are worth a tenth of the images/s (`python -m benchmarks.serving`, smallest image: .78 to .87 of the
    machine's limit).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    sys.setswitchinterval(0.0005)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet. Raises BadRequest."""
    if not 0 <= port <= 65535:  # the system would take the last 16 bits
        raise BadRequest(f"--port {port} is no port; use 0 (a free one) to 65535.", param="port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise BadRequest(
            f"--host '{host}' --port {port}: {error}. Use an address of this machine.",
            param="host",
        ) from None
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise BadRequest(
                f"Port {port} of {host} is in use, perhaps by another `embedserve serve`. "
                "Stop that, or choose another with --port (0 takes a free one).",
                param="port",
                code="port_in_use",
            ) from None
        raise BadRequest(f"{host}:{port} cannot be used: {error.strerror}.", param="host") from None
    return listener


def _url(host: str, listener: socket.socket) -> str:
    """What to type into a browser on this machine."""
    port = listener.getsockname()[1]
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return f"http://{host}:{port}"
    if address.is_unspecified:
        return f"http://127.0.0.1:{port}" if address.version == 4 else f"http://[::1]:{port}"
    return f"http://{address}:{port}" if address.version == 4 else f"http://[{address}]:{port}"
