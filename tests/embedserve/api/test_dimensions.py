"""Shorter vectors: cut, of unit length again, and only where the encoder was trained for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.embedserve.api.requests import error, ok, picture, serving
from tests.embedserve.colours import BLUE, GREEN, RED

WORDS = ["red green", "red small", {"image": picture(BLUE)}]


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory, seeing_folder: Path) -> Iterator[TestClient]:
    """Serves an encoder that lists prefixes of 4 and 6 of its 8 numbers."""
    with serving(tmp_path_factory.mktemp("data"), seeing_folder) as client:
        yield client


def literal(vector: list[float], size: int) -> list[float]:
    length = sum(number * number for number in vector[:size]) ** 0.5
    return [number / length for number in vector[:size]]


@pytest.mark.parametrize("size", [4, 6, 8])
def test_both_routes_cut_and_renormalise(nested: TestClient, size: int) -> None:
    full = [one["embedding"] for one in ok(nested.post("/v1/embed", json={"inputs": WORDS}))["results"]]
    expected = [literal(vector, size) for vector in full]
    asked = {"inputs": WORDS, "dimensions": size}
    answer = ok(nested.post("/v1/embed", json=asked))
    assert answer["dim"] == size
    np.testing.assert_allclose([one["embedding"] for one in answer["results"]], expected, atol=1e-6)
    answer = ok(nested.post("/v1/embeddings", json={"input": WORDS, "dimensions": size}))
    np.testing.assert_allclose([one["embedding"] for one in answer["data"]], expected, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 7, 9, 0])
def test_lengths_that_the_bundle_does_not_list_are_refused_everywhere(nested: TestClient, size: int) -> None:
    for method, path, body in (
        ("POST", "/v1/embed", {"inputs": ["red"]}),
        ("POST", "/v1/embeddings", {"input": "red"}),
        ("PUT", "/v1/collections/short", {}),
    ):
        found = error(nested.request(method, path, json={**body, "dimensions": size}), 422)
        assert found["param"] == "dimensions"
        assert size in (0, 9) or "prefixes of 4, 6, 8" in found["message"]


def test_a_prefix_without_direction_fails_alone(nested: TestClient) -> None:
    answer = ok(nested.post("/v1/embed", json={"inputs": ["round", "red round"], "dimensions": 4}))
    assert answer["results"][0]["error"]["code"] == "no_direction"
    assert answer["results"][1]["embedding"] == [1, 0, 0, 0]


# ---- collections -------------------------------------------------------------------------------------


@pytest.fixture
def short(nested: TestClient) -> Iterator[str]:
    """The path of a collection of four numbers, with pictures, a text and a vector."""
    path = "/v1/collections/short"
    made = ok(nested.put(path, json={"dimensions": 4}), 201)
    assert made["dim"] == 4
    items = [
        {"id": "red", "image": picture(RED)},
        {"id": "green", "image": picture(GREEN), "text": "green small"},
        {"id": "words", "text": "blue round"},
        {"id": "vector", "vector": [0, 0, 0, 5]},
        {"id": "no direction", "text": "round"},
        {"id": "too long", "vector": [1] * 8},
    ]
    answer = ok(nested.post(f"{path}/items", json={"items": items}))
    assert [one["status"] for one in answer["results"]] == ["ok"] * 4 + ["error"] * 2
    yield path
    ok(nested.delete(path), 204)


def test_a_collection_stores_and_finds_by_its_first_numbers(nested: TestClient, short: str) -> None:
    stored = ok(nested.get(f"{short}/items?include=vector"))["items"]
    vectors = {one["id"]: one["vector"] for one in stored}
    np.testing.assert_allclose(vectors["words"], [0, 0, 1, 0], atol=1e-3)
    np.testing.assert_allclose(vectors["vector"], [0, 0, 0, 1], atol=1e-3)
    for query, first in (
        ({"text": "red small"}, "red"),
        ({"image": picture(BLUE)}, "words"),
        ({"vector": [0, 0, 0, 2]}, "vector"),
        ({"query": [{"text": "green"}, {"id": "words", "weight": 0.1}]}, "green"),
    ):
        hits = ok(nested.post(f"{short}/search", json={**query, "k": 3}))["hits"]
        assert hits[0]["id"] == first
        assert hits[0]["score"] == pytest.approx(1, abs=0.01)
    error(nested.post(f"{short}/search", json={"vector": [1] * 8}), 422)
    assert error(nested.post(f"{short}/search", json={"text": "round"}), 422)["code"] == "no_direction"


def test_its_length_stays(nested: TestClient, short: str) -> None:
    error(nested.put(short, json={"dimensions": 6}), 409, "other_dimensions")
    assert ok(nested.put(short, json={"dimensions": 4, "description": "Short."}))["dim"] == 4
    assert ok(nested.put(short, json={"description": "Still short."}))["dim"] == 4


def test_it_opens_again_with_its_length(tmp_path: Path, seeing_folder: Path) -> None:
    for time in range(2):
        with serving(tmp_path, seeing_folder) as client:
            if not time:
                ok(client.put("/v1/collections/kept", json={"dimensions": 4}), 201)
                items = {"items": [{"id": "red", "text": "red"}]}
                ok(client.post("/v1/collections/kept/items", json=items))
            else:
                hits = ok(client.post("/v1/collections/kept/search", json={"text": "red round"}))["hits"]
                assert hits[0]["score"] == pytest.approx(1, abs=1e-3)
                assert ok(client.get("/v1/collections/kept"))["dim"] == 4
