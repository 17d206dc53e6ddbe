"""Collections over HTTP: made, described, listed, dropped; refused where they are another encoder's."""

from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.embedserve.api.requests import error, ok, serving
from tests.tiny_bundle import write_tiny_bundle


def test_a_collection_is_created_described_changed_and_dropped(client: TestClient) -> None:
    made = ok(
        client.put("/v1/collections/shoes", json={"description": "Shoes", "metadata": {"year": 2024}}), 201
    )
    assert made["name"] == "shoes"
    assert made["items"] == 0
    assert made["dim"] == 8
    assert made["encoder"] == "tiny"
    changed = ok(client.put("/v1/collections/shoes", json={"description": "Boots"}))
    assert (changed["description"], changed["metadata"]) == ("Boots", {"year": 2024})
    assert ok(client.get("/v1/collections/shoes"))["description"] == "Boots"
    assert "shoes" in [each["name"] for each in ok(client.get("/v1/collections"))["collections"]]
    ok(client.delete("/v1/collections/shoes"), 204)
    error(client.get("/v1/collections/shoes"), 404)
    error(client.delete("/v1/collections/shoes"), 404)


def test_put_needs_no_body(client: TestClient) -> None:
    ok(client.put("/v1/collections/plain"), 201)
    ok(client.put("/v1/collections/plain"), 200)


@pytest.mark.parametrize("name", ["Shoes", "a b", "-x", "x" * 65, "猫"])
def test_names_are_plain(client: TestClient, name: str) -> None:
    found = error(client.put(f"/v1/collections/{name}"), 422)
    assert found["param"] == "name"


def test_an_unknown_collection_names_the_closest(client: TestClient) -> None:
    ok(client.put("/v1/collections/holiday-photos"), 201)
    for method, path, body in [
        ("GET", "", None),
        ("GET", "/items", None),
        ("POST", "/items", {"items": [{"text": "red"}]}),
        ("GET", "/items/a", None),
        ("DELETE", "/items/a", None),
        ("POST", "/search", {"text": "red"}),
        ("POST", "/classify", {"ids": ["a"], "field": "x"}),
        ("GET", "/duplicates", None),
        ("GET", "/thumbnails/a", None),
    ]:
        found = error(client.request(method, f"/v1/collections/holiday-photo{path}", json=body), 404)
        assert "did you mean 'holiday-photos'" in found["message"]


def test_a_collection_of_another_encoder_is_a_409_and_the_rest_works(
    tmp_path: Path, tiny_folder: Path
) -> None:
    other = write_tiny_bundle(tmp_path / "other", name="other", rotate=1).folder
    with serving(tmp_path / "data", other) as client:
        ok(client.put("/v1/collections/theirs"), 201)
        ok(client.post("/v1/collections/theirs/items", json={"items": [{"id": "a", "text": "red"}]}))
    with serving(tmp_path / "data", tiny_folder) as client:
        ok(client.put("/v1/collections/ours"), 201)
        for response in (
            client.post("/v1/collections/theirs/search", json={"text": "red"}),
            client.post("/v1/collections/theirs/items", json={"items": [{"text": "red"}]}),
            client.get("/v1/collections/theirs/items/a"),
            client.put("/v1/collections/theirs"),
        ):
            assert "other" in error(response, 409)["message"]
        listed = {each["name"]: each for each in ok(client.get("/v1/collections"))["collections"]}
        assert listed["theirs"]["problem"]
        assert listed["ours"]["problem"] is None
        ok(client.post("/v1/collections/ours/items", json={"items": [{"text": "red"}]}))
        ok(client.get("/readyz"))
        ok(client.delete("/v1/collections/theirs"), 204)


def test_collections_survive_a_restart(tmp_path: Path, tiny_folder: Path) -> None:
    with serving(tmp_path, tiny_folder) as client:
        ok(client.put("/v1/collections/kept"), 201)
        ok(client.post("/v1/collections/kept/items", json={"items": [{"id": "a", "text": "red"}]}))
    with serving(tmp_path, tiny_folder) as client:
        assert ok(client.get("/v1/collections/kept"))["items"] == 1
        hits = ok(client.post("/v1/collections/kept/search", json={"text": "red"}))["hits"]
        assert [hit["id"] for hit in hits] == ["a"]
