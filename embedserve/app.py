"""The server: `create_app(config)` puts the parts together and says in which order a request meets them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from embedserve import __version__
from embedserve.api import (
    classify,
    collections,
    embed,
    failures,
    health,
    heatmap,
    items,
    openai,
    openapi,
    page,
    search,
    upserts,
)
from embedserve.api.services import Services
from embedserve.classify import Classifier
from embedserve.collections import Library
from embedserve.config import ServeConfig
from embedserve.encoder import Encoder
from embedserve.fetch import Fetcher
from embedserve.label_sets import LabelSets
from embedserve.metrics import Metrics, Observe
from embedserve.security import BodyLimit, Guard, SecurityHeaders, refuse_unsafe
from embedserve.towers import Towers

__all__ = ["create_app"]

ROUTERS = (
    openai.router,
    embed.router,
    heatmap.router,
    classify.router,
    collections.router,
    upserts.router,
    items.router,
    search.router,
    health.router,
)


def create_app(config: ServeConfig) -> FastAPI:
    """The whole API as an ASGI app. The encoder is loaded when the server starts, not here.

    Raises InvalidField when `config` would let other machines in without a key. Starting raises BundleError
    for an encoder that cannot be loaded.
    """
    refuse_unsafe(config)
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            app.state.services = await _start(config, metrics, stack)
            yield

    app = FastAPI(
        title="EmbedServe",
        version=__version__,
        lifespan=lifespan,
        middleware=_middleware(config, metrics),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    failures.install(app, [*ROUTERS, page.router])
    for router in ROUTERS:
        app.include_router(router)
    page.install(app)
    openapi.describe(app)
    return app


async def _start(config: ServeConfig, metrics: Metrics, stack: AsyncExitStack) -> Services:
    """Starts the parts in order; `stack` closes them in reverse, so that accepted work is finished."""
    encoder = Encoder.load(
        config.encoder, threads=config.threads, device=config.device, engines=config.engine_cache
    )
    towers = Towers(encoder, config)
    metrics.about(encoder.name)
    metrics.watch(towers.queues)
    stack.push_async_callback(towers.close)
    await towers.start()
    library = Library(config.data / "collections", towers, config.limits)
    stack.push_async_callback(library.close)
    fetcher = Fetcher(config.limits, config.fetch_networks)
    stack.push_async_callback(fetcher.close)
    return Services(
        config=config,
        towers=towers,
        library=library,
        fetcher=fetcher,
        classifier=Classifier(towers),
        label_sets=LabelSets(config.data / "labelsets"),
        readiness=health.Readiness(towers),
        metrics=metrics,
    )


def _middleware(config: ServeConfig, metrics: Metrics) -> list[Middleware]:
    """Outermost first. All are plain ASGI: together they cost a request some 20 µs."""
    layers = [
        Middleware(Observe, metrics=metrics),
        Middleware(SecurityHeaders, embeddable=bool(config.cors_origin)),
    ]
    if config.cors_origin:
        layers.append(
            Middleware(
                CORSMiddleware,  # outside the guard: a preflight has no key, and refusals need its headers
                allow_origins=list(config.cors_origin),
                allow_methods=["GET", "POST", "PUT", "DELETE"],
                allow_headers=["Authorization", "Content-Type"],
                expose_headers=["Retry-After"],
                max_age=600,
            )
        )
    layers += [
        Middleware(failures.LastResort),
        Middleware(Guard, config=config),
        Middleware(BodyLimit, limit=config.limits.max_body_bytes),
    ]
    return layers
