"""Prometheus metrics of one app, in base units and under one prefix.

Each app has a registry of its own, so several can live in one process. What others count already (queues,
collections) is read when /metrics is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedserve import __version__
from embedserve.errors import EmbedServeError

__all__ = ["CONTENT_TYPE_LATEST", "Metrics", "Observe"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCH = (1, 2, 4, 8, 16, 32, 64)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
"""Others are counted together: a client may invent any word."""


class Queue(Protocol):
    """What is read from a tower's queue; `embedserve.batcher.Batcher` is one."""

    on_batch: Callable[[int, float], None]

    @property
    def waiting(self) -> int: ...


class Metrics:
    """Counters that handlers and middleware write, and a text that Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "embedserve_http_requests",
            "Requests by route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "embedserve_http_request_duration_seconds",
            "From the request's first byte to the answer's last.",
            ["method", "route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.running = Gauge(
            "embedserve_http_requests_in_progress", "Requests being answered.", registry=self.registry
        )
        self.batches = Histogram(
            "embedserve_batch_size",
            "Inputs that one run of a tower took.",
            ["tower"],
            buckets=BATCH,
            registry=self.registry,
        )
        self.run_seconds = Histogram(
            "embedserve_run_duration_seconds",
            "One run of a tower.",
            ["tower"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.bad_images = Counter(
            "embedserve_decode_failures",
            "Images that could not be used, by the error's code.",
            ["code"],
            registry=self.registry,
        )
        self.ready = Gauge(
            "embedserve_ready",
            "1 when the last probe of /readyz computed an embedding.",
            registry=self.registry,
        )
        self.items = Gauge(
            "embedserve_collection_items", "Items of each collection.", ["collection"], registry=self.registry
        )
        ProcessCollector(namespace="embedserve", registry=self.registry)

    def about(self, encoder: str) -> None:
        """States which encoder is served, in the usual form of an info metric."""
        info = Gauge("embedserve_build_info", "Always 1.", ["version", "encoder"], registry=self.registry)
        info.labels(__version__, encoder).set(1)

    def watch(self, queues: Mapping[str, Queue]) -> None:
        """Counts the batches of each tower's queue, and reads at /metrics how many inputs wait."""
        for tower, queue in queues.items():
            queue.on_batch = partial(self._count_batch, tower)
        self.registry.register(_Waiting(queues))

    def _count_batch(self, tower: str, items: int, seconds: float) -> None:
        self.batches.labels(tower).observe(items)
        self.run_seconds.labels(tower).observe(seconds)

    def count_bad_images(self, results: Iterable[object]) -> None:
        """Counts the errors among the results of embedding images."""
        for result in results:
            if isinstance(result, EmbedServeError):
                self.bad_images.labels(result.code).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _Waiting(Collector):
    def __init__(self, queues: Mapping[str, Queue]) -> None:
        self._queues = queues

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(
            "embedserve_queue_waiting", "Inputs that wait for a tower.", labels=["tower"]
        )
        for tower, queue in self._queues.items():
            family.add_metric([tower], queue.waiting)
        yield family


class Observe:
    """ASGI middleware: counts and times requests by route template, so that ids make no new series."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client went away before there was an answer (nginx' number for it)

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        started = time.perf_counter()
        self.metrics.running.inc()
        try:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.running.dec()
            method = scope["method"] if scope["method"] in METHODS else "other"
            route = getattr(scope.get("route"), "path", "unmatched") or "unmatched"
            self.metrics.requests.labels(method, route, str(status)).inc()
            self.metrics.seconds.labels(method, route).observe(time.perf_counter() - started)
