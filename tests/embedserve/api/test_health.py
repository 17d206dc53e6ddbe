"""Liveness, readiness that computes, metrics that parse, and one answer for what nobody expected."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from embedserve.api import health
from embedserve.app import create_app
from embedserve.bundle import Probe, new_bundle, open_bundle, seal
from embedserve.config import ServeConfig
from embedserve.encoder import Encoder
from embedserve.errors import BundleError
from tests.embedserve.api.requests import error, ok, picture, serving, upload
from tests.embedserve.colours import GREEN, RED, png


def samples(client: TestClient) -> dict[tuple[str, frozenset], float]:
    text = client.get("/metrics").text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(client: TestClient, name: str, **labels: str) -> float:
    return samples(client).get((name, frozenset(labels.items())), 0.0)


def test_alive_and_ready(client: TestClient) -> None:
    assert ok(client.get("/healthz")) == {"status": "alive"}
    ready = ok(client.get("/readyz"))
    assert ready["status"] == "ready"
    assert ready["model"] == "tiny"


def test_ready_compares_with_the_golden_vectors(tmp_path: Path, tiny_folder: Path) -> None:
    probe = Encoder.load(tiny_folder, threads=1).make_probe(png(RED), "red round")
    with serving(tmp_path / "data", with_probe(tmp_path / "good", tiny_folder, probe)) as client:
        ready = ok(client.get("/readyz"))
        assert (ready["image_cosine"], ready["text_cosine"]) == (pytest.approx(1), pytest.approx(1))
    other = Encoder.load(tiny_folder, threads=1).make_probe(png(GREEN), "red round")
    wrong = probe.model_copy(update={"image_vector": other.image_vector})
    with (
        pytest.raises(BundleError, match="cosine"),
        serving(tmp_path / "data", with_probe(tmp_path / "wrong", tiny_folder, wrong)),
    ):
        pass


def with_probe(out: Path, tiny_folder: Path, probe: Probe) -> Path:
    with new_bundle(out) as folder:
        for file in tiny_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        seal(folder, open_bundle(tiny_folder).description.model_copy(update={"probe": probe}))
    return out


@pytest.mark.anyio
async def test_not_ready_when_nothing_is_computed_and_ready_again_later(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(health, "FRESH_SECONDS", 0.0)
    app = create_app(ServeConfig(data=tmp_path, encoder=str(tiny_folder), threads=1))
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
    ):
        towers = app.state.services.towers
        embed, stuck = towers.texts, asyncio.Event()

        async def never(texts: object) -> object:
            await stuck.wait()
            return await embed(texts)

        towers.texts = never
        response = await client.get("/readyz")
        error(response, 503, "probe_timeout")
        assert response.headers["retry-after"]
        assert "embedserve_ready 0.0" in (await client.get("/metrics")).text
        ok(await client.get("/healthz"))
        towers.texts = embed
        ok(await client.get("/readyz"))
        assert "embedserve_ready 1.0" in (await client.get("/metrics")).text

        def broken(tokens: object) -> object:
            raise RuntimeError("out of memory")

        app.state.services.towers.encoder.embed_texts = broken
        error(await client.get("/readyz"), 503, "probe_failed")


def test_metrics_have_one_prefix_and_base_units(client: TestClient) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith("embedserve_") for family in families)
    assert not [family.name for family in families if family.name.endswith(("_ms", "_mb", "_milliseconds"))]
    assert value(client, "embedserve_build_info", version="0.1.0", encoder="tiny") == 1


def test_requests_are_counted_by_route_and_status(client: TestClient, colours: str) -> None:
    template = "/v1/collections/{name}/items/{id:path}"
    labels = {"method": "GET", "route": template}
    before = value(client, "embedserve_http_requests_total", status="200", **labels)
    for name in ("red.png", "green.png", "blue.png"):
        ok(client.get(f"{colours}/items/{name}"))
    client.get(f"{colours}/items/unknown")
    client.get("/no/such/path")
    assert value(client, "embedserve_http_requests_total", status="200", **labels) == before + 3
    assert value(client, "embedserve_http_requests_total", status="404", **labels) >= 1
    assert value(client, "embedserve_http_request_duration_seconds_count", **labels) >= 4
    assert value(client, "embedserve_http_requests_total", method="GET", route="unmatched", status="404") >= 1
    assert not [key for key in samples(client) if "red.png" in str(key)]


def test_batches_bad_images_and_items_are_counted(client: TestClient, colours: str) -> None:
    bad = value(client, "embedserve_decode_failures_total", code="unsupported_media")
    taken = value(client, "embedserve_batch_size_sum", tower="image")
    runs = value(client, "embedserve_run_duration_seconds_count", tower="image")
    ok(client.post("/v1/embed", files=[upload(RED), ("file", ("x", b"no image"))]))
    client.post(f"{colours}/items", json={"items": [{"image": "bm8gaW1hZ2U="}]})
    assert value(client, "embedserve_decode_failures_total", code="unsupported_media") == bad + 2
    assert value(client, "embedserve_batch_size_sum", tower="image") == taken + 3
    # The first two inputs may share a run, or each have a worker of its own.
    assert value(client, "embedserve_run_duration_seconds_count", tower="image") - runs in {2, 3}
    assert value(client, "embedserve_queue_waiting", tower="image") == 0
    name = colours.rpartition("/")[2]
    assert value(client, "embedserve_collection_items", collection=name) == 4
    ok(client.delete(colours), 204)
    assert name not in client.get("/metrics").text


def test_two_apps_count_for_themselves(client: TestClient, tmp_path: Path, tiny_folder: Path) -> None:
    with serving(tmp_path, tiny_folder) as other:
        ok(other.post("/v1/embed", json={"inputs": [{"image": picture(RED)}]}))
        labels = {"method": "POST", "route": "/v1/embed", "status": "200"}
        assert value(other, "embedserve_http_requests_total", **labels) == 1


def test_an_unexpected_error_leaks_nothing_and_is_logged(
    tmp_path: Path, tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path, tiny_folder, cors_origin=("http://shop.example",)) as client:
        services = client.app.state.services

        def broken(names: object) -> None:
            raise RuntimeError("the secret path /srv/x")

        services.label_sets.names = lambda: broken(None)
        with caplog.at_level(logging.ERROR, "embedserve"):
            response = client.get("/v1/labelsets", headers={"Origin": "http://shop.example"})
        found = error(response, 500, "internal_error")
        assert "secret" not in response.text
        (record,) = [record for record in caplog.records if record.name == "embedserve"]
        assert record.args[0] in found["message"]
        assert "the secret path" in caplog.text
        assert response.headers["access-control-allow-origin"] == "http://shop.example"
        assert response.headers["x-content-type-options"] == "nosniff"
        labels = {"method": "GET", "route": "/v1/labelsets", "status": "500"}
        assert value(client, "embedserve_http_requests_total", **labels) == 1
        ok(client.get("/readyz"))
