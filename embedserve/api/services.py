"""What every handler works with: made once by the app's lifespan, kept at `app.state.services`."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from embedserve.classify import Classifier
from embedserve.collections import Library
from embedserve.config import Limits, ServeConfig
from embedserve.errors import NotFound, closest
from embedserve.fetch import Fetcher
from embedserve.label_sets import LabelSets
from embedserve.metrics import Metrics
from embedserve.towers import Towers

if TYPE_CHECKING:
    from embedserve.api.health import Readiness

__all__ = ["Services", "check_model", "services", "unless_gone"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of one running server."""

    config: ServeConfig
    towers: Towers
    library: Library
    fetcher: Fetcher
    classifier: Classifier
    label_sets: LabelSets
    readiness: Readiness
    metrics: Metrics

    @property
    def limits(self) -> Limits:
        return self.config.limits


def services(request: Request) -> Services:
    """The services of the app that got `request`."""
    found: Services = request.app.state.services
    return found


def check_model(parts: Services, model: str | None) -> None:
    """Raises NotFound unless `model` is the encoder served here, or not said.

    One process serves one encoder. Answering for any name, as some servers do, would let a client mix the
    vectors of two encoders without noticing.
    """
    names = {parts.towers.encoder.name}
    if parts.config.encoder == "starter":
        names.add("starter")  # as it is called where it is chosen
    if model is not None and model not in names:
        raise NotFound(
            f"Model '{model[:100]}' is not served here; {closest(model, names)} "
            "See /v1/models, or leave 'model' out.",
            param="model",
            code="model_not_found",
        )


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """`work`, cancelled when the client hangs up: nobody would read the answer, others wait for the encoder.

    Call it once the body has been read. Raises ClientDisconnect. Not for writes, which are to be finished.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
