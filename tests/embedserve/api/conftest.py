"""Fixtures of the HTTP tests: one app for a module's tests, and a collection of colours for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from embedserve.bundle import new_bundle, open_bundle, seal
from tests.embedserve.api.requests import ok, picture, serving
from tests.embedserve.colours import BLUE, GREEN, RED

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("data"), tiny_folder) as client:
        yield client


@pytest.fixture
def empty(client: TestClient) -> str:
    """The path of an empty collection."""
    path = f"/v1/collections/c{next(NUMBERS)}"
    ok(client.put(path), 201)
    return path


@pytest.fixture
def colours(client: TestClient, empty: str) -> str:
    """The path of a collection with three pictures and a text."""
    items = [
        {"id": "red.png", "image": picture(RED), "metadata": {"colour": "red", "n": 1}},
        {"id": "green.png", "image": picture(GREEN), "metadata": {"colour": "green", "n": 2}},
        {"id": "blue.png", "image": picture(BLUE), "metadata": {"colour": "blue", "n": 3}},
        {"id": "words", "text": "red round", "metadata": {"colour": "red", "n": 4}},
    ]
    answer = ok(client.post(f"{empty}/items", json={"items": items}))
    assert answer["failed"] == 0
    return empty


@pytest.fixture(scope="session")
def image_only_folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The tiny bundle without its text tower."""
    out = tmp_path_factory.mktemp("bundles") / "image-only"
    with new_bundle(out) as folder:
        (folder / "image.onnx").write_bytes((tiny_folder / "image.onnx").read_bytes())
        described = open_bundle(tiny_folder).description
        seal(folder, described.model_copy(update={"text": None, "name": "image-only"}))
    return out
