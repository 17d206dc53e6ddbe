"""`/healthz` (the process answers), `/readyz` (an embedding was really computed) and `/metrics`."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from embedserve.api.failures import error_response, json_response
from embedserve.api.openapi import answers
from embedserve.api.services import Services, services
from embedserve.bundle import unpack_vector
from embedserve.errors import BundleError, Busy, EmbedServeError, NotReady
from embedserve.metrics import CONTENT_TYPE_LATEST
from embedserve.towers import Towers

__all__ = ["Readiness", "router"]

router = APIRouter(tags=["health"])

PROBE_SECONDS = 10.0
"""A probe that takes longer has failed."""
FRESH_SECONDS = 1.0
"""So long the last probe's answer holds: anyone may ask, and asking must not cost a computation each time."""


class Alive(BaseModel):
    status: Literal["alive"]


class Ready(BaseModel):
    status: Literal["ready"]
    model: str
    image_cosine: float | None = Field(description="To the bundle's golden vector; null without one.")
    text_cosine: float | None
    seconds: float = Field(description="How long the probe took, queue included.")


class Readiness:
    """Runs the bundle's probe through the same queues that requests go through, one probe at a time.

    Under load the probe waits like everyone else. That is no failure as long as the towers finish batches,
    so a probe that is still waiting while others are served counts as passed.
    """

    def __init__(self, towers: Towers) -> None:
        self._towers = towers
        self._probe = towers.encoder.bundle.description.probe
        self._png = base64.b64decode(self._probe.image) if self._probe.image else _gray_png()
        self._running: asyncio.Task[Ready] | None = None
        self._last: tuple[float, Ready] | None = None

    async def check(self) -> Ready:
        """Raises NotReady when no embedding can be computed, or not the right one."""
        if self._last is not None and time.monotonic() - self._last[0] < FRESH_SECONDS:
            return self._last[1]
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await asyncio.shield(self._running)

    async def _run(self) -> Ready:
        started = time.perf_counter()
        before = self._batches()
        image = text = None
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                image, text = await asyncio.gather(self._image(), self._text())
        except TimeoutError:
            now = self._batches()
            if not all(now[tower] > before[tower] for tower in now):
                raise NotReady(
                    f"The probe gave no embedding within {PROBE_SECONDS:g} s. "
                    "If this lasts, restart the server.",
                    code="probe_timeout",
                ) from None
        except NotReady:
            raise
        except EmbedServeError as error:
            raise NotReady(f"The probe failed: {error}", code="probe_failed") from None
        ready = Ready(
            status="ready",
            model=self._towers.encoder.name,
            image_cosine=image,
            text_cosine=text,
            seconds=round(time.perf_counter() - started, 6),
        )
        self._last = (time.monotonic(), ready)
        return ready

    def _batches(self) -> dict[str, int]:
        encoder, queues = self._towers.encoder, self._towers.queues
        there = {"image": encoder.has_images, "text": encoder.has_text}
        return {tower: queue.batches for tower, queue in queues.items() if there.get(tower)}

    async def _image(self) -> float | None:
        if not self._towers.encoder.has_images:
            return None
        vector = await _patiently(lambda: self._towers.images([self._png]))
        return self._cosine(vector, self._probe.image_vector)

    async def _text(self) -> float | None:
        if not self._towers.encoder.has_text:
            return None
        vector = await _patiently(lambda: self._towers.texts([self._probe.text or "a probe"]))
        return self._cosine(vector, self._probe.text_vector)

    def _cosine(self, vector: NDArray[np.float32], golden: str | None) -> float | None:
        if golden is None:
            return None
        cosine = float(vector @ unpack_vector(golden))
        if not cosine >= self._probe.min_cosine:
            raise BundleError(
                f"the probe's vector has cosine {cosine:.4f} to the golden one; at least "
                f"{self._probe.min_cosine} is needed. Run `embedserve check` on the bundle."
            )
        return round(min(1.0, cosine), 6)


async def _patiently(
    embed: Callable[[], Awaitable[list[NDArray[np.float32] | EmbedServeError]]],
) -> NDArray[np.float32]:
    """The vector of a single input, tried again while the queue is full."""
    while True:
        try:
            result = (await embed())[0]
        except Busy:
            await asyncio.sleep(0.05)
            continue
        if isinstance(result, EmbedServeError):
            raise result
        return result


def _gray_png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (128, 128, 128)).save(file, "PNG")
    return file.getvalue()


@router.get("/healthz", operation_id="healthz", summary="Whether the process answers", response_model=Alive)
async def healthz() -> Response:
    """Says nothing about the encoder; an orchestrator restarts what does not answer here."""
    return json_response({"status": "alive"})


@router.get(
    "/readyz",
    operation_id="readyz",
    summary="Whether embeddings can be computed",
    response_model=Ready,
    responses={503: answers()[503]},
)
async def readyz(request: Request) -> Response:
    """Computes embeddings through the queues that requests use; 503 when they are wrong or do not come."""
    parts = services(request)
    try:
        ready = await parts.readiness.check()
    except NotReady as error:
        parts.metrics.ready.set(0)
        return error_response(error)
    parts.metrics.ready.set(1)
    return json_response(ready)


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Metrics for Prometheus",
    responses=answers()
    | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "Prometheus text"}}
    | answers(),
    response_class=Response,
)
async def metrics(request: Request) -> Response:
    return Response(await _scrape(services(request)), media_type=CONTENT_TYPE_LATEST)


async def _scrape(parts: Services) -> bytes:
    counts: dict[str, int] = {}
    for name in parts.library.names():
        # One that cannot be used has no items to tell; /v1/collections has its problem.
        with suppress(EmbedServeError):
            counts[name] = await (await parts.library.get(name)).count()
    items = parts.metrics.items
    items.clear()  # dropped collections leave no series behind
    for name, count in counts.items():
        items.labels(name).set(count)
    return parts.metrics.text()
