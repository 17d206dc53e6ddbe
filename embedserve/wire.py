"""The client's side of the wire: one connection to a server, or to the app inside this process."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from embedserve.answers import JsonObject, body_of, failure_of, retry_after
from embedserve.config import ServeConfig
from embedserve.errors import BadRequest, Busy, NotReady

__all__ = ["Wire"]


class Wire:
    """Sends requests to one server; an async context manager. The arguments are those of `Client`."""

    def __init__(self, url: str, *, api_key: str | None, timeout: float, patience: float) -> None:
        self.url = _checked(url)
        self.config: ServeConfig | None = None
        """Of a server in this process, which answers instead of the one at `url`."""
        self._patience = patience
        self._api_key = api_key
        self._timeout = timeout
        self._stack = AsyncExitStack()
        self._http: httpx2.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            transport = None if self.config is None else await _in_process(self.config, stack)
            http = httpx2.AsyncClient(
                base_url=self.url,
                timeout=self._timeout,
                transport=transport,
                headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else None,
            )
            self._http = await stack.enter_async_context(http)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http = None
        await self._stack.aclose()

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        params: JsonObject | None = None,
        files: Sequence[tuple[str, Any]] | None = None,
        partial: bool = False,
        patience: float | None = None,
    ) -> httpx2.Response:
        """One call, repeated while the server is busy. `partial`: a failure with results is an answer."""
        if self._http is None:
            raise RuntimeError("use the client inside `async with Client(...) as client:`")
        left = self._patience if patience is None else patience
        delay = 0.25
        while True:
            try:
                response = await self._http.request(method, path, json=json, params=params, files=files)
            except httpx2.HTTPError as error:
                raise self._unreachable(error) from error
            if response.is_success or (partial and "results" in body_of(response)):
                return response
            failure = failure_of(response)
            if not isinstance(failure, Busy | NotReady) or left <= 0:
                raise failure
            wait = min(left, retry_after(response) or delay * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            await asyncio.sleep(wait)
            left -= wait
            delay = min(2 * delay, 5.0)

    def _unreachable(self, error: httpx2.HTTPError) -> NotReady:
        if isinstance(error, httpx2.TimeoutException):
            return NotReady(
                f"'{self.url}' did not answer within {self._timeout:g} s; send fewer inputs at a time.",
                code="timeout",
            )
        return NotReady(
            f"No server answers at '{self.url}' ({error or type(error).__name__}). "
            "Start one with `embedserve serve`, or check the URL.",
            code="no_server",
        )


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80)
    except ValueError:
        good = False
    if not good:
        raise BadRequest(f"'{url}' is not a server's URL; use http://HOST:PORT, as in http://127.0.0.1:8000.")
    return url.rstrip("/")


async def _in_process(config: ServeConfig, stack: AsyncExitStack) -> httpx2.ASGITransport:
    from embedserve.app import create_app

    app = create_app(config)
    await stack.enter_async_context(app.router.lifespan_context(app))
    return httpx2.ASGITransport(app, raise_app_exceptions=False)
