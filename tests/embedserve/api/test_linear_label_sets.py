"""Label sets that were fitted to images: saved, served with and without a text tower, refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from embedserve.bundle import open_bundle, pack_vector
from tests.embedserve.api.requests import error, ok, picture, serving, upload
from tests.embedserve.colours import BLUE, GREEN, RED, axis


@pytest.fixture(scope="module")
def wordless(tmp_path_factory: pytest.TempPathFactory, image_only_folder: Path) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("data"), image_only_folder) as client:
        yield client


def tones(bundle: Path, dim: int = 8, **changes: Any) -> dict[str, Any]:
    """Reds and greens are warm, blues are cool; fitted to the bundle's vectors."""
    opened = open_bundle(bundle)
    weights = np.stack([axis("red") + axis("green"), axis("blue")])[:, :dim] * 10
    return {
        "kind": "linear",
        "labels": ["warm", "cool"],
        "dim": dim,
        "weights": pack_vector(weights),
        "bias": [0.0, 0.5],
        "encoder": opened.name,
        "fingerprint": opened.fingerprint,
        "fitted": {
            "kind": "linear",
            "counts": {"warm": 6, "cool": 4},
            "judged": 10,
            "accuracy": 0.9,
            "ece": 0.05,
            "collection": "photos",
            "field": "tone",
        },
        **changes,
    }


def test_an_encoder_without_text_classifies_with_a_fitted_set(
    wordless: TestClient, image_only_folder: Path
) -> None:
    sent = tones(image_only_folder)
    saved = ok(wordless.put("/v1/labelsets/tones", json=sent), 201)
    assert saved == {"name": "tones", **sent}
    assert ok(wordless.get("/v1/labelsets/tones")) == saved
    assert "tones" in ok(wordless.get("/v1/labelsets"))["label_sets"]
    request = {"images": [picture(GREEN), picture(BLUE)], "label_set": "tones"}
    answer = ok(wordless.post("/v1/classify", json=request))
    assert [result["labels"][0]["label"] for result in answer["results"]] == ["warm", "cool"]
    warm, cool = answer["results"][0]["labels"]
    assert warm["probability"] == pytest.approx(1 / (1 + np.exp(0.5 - 10)), abs=1e-6)
    assert warm["cosine"] == pytest.approx(np.sqrt(0.5), abs=1e-6)
    assert cool["cosine"] == pytest.approx(0, abs=1e-6)


def test_a_fitted_set_can_be_used_with_a_form_and_a_bad_image_fails_alone(
    wordless: TestClient, image_only_folder: Path
) -> None:
    ok(wordless.put("/v1/labelsets/form", json=tones(image_only_folder)), 201)
    files = [upload(RED, part="image"), ("image", ("a.png", b"no picture", "image/png"))]
    answer = ok(wordless.post("/v1/classify", files=files, data={"label_set": "form", "top": "1"}))
    assert [one["label"] for one in answer["results"][0]["labels"]] == ["warm"]
    assert answer["results"][1]["error"]["param"] == "image[1]"


def test_a_set_of_fewer_numbers_looks_at_the_first_of_a_vector(client: TestClient, tiny_folder: Path) -> None:
    ok(client.put("/v1/labelsets/short", json=tones(tiny_folder, dim=3)), 201)
    (result,) = ok(
        client.post("/v1/classify", json={"images": [picture((0, 0, 200))], "label_set": "short"})
    )["results"]
    best = result["labels"][0]
    assert best["label"] == "cool"
    assert best["cosine"] == pytest.approx(1)  # of the first three numbers alone; there is darkness behind
    (result,) = ok(
        client.post("/v1/classify", json={"images": [picture((0, 0, 0)), picture(RED)], "label_set": "short"})
    )["results"][:1]
    assert result["error"]["code"] == "no_direction"


def test_a_set_of_another_encoder_is_a_conflict(
    tmp_path: Path, tiny_folder: Path, image_only_folder: Path
) -> None:
    with serving(tmp_path, image_only_folder) as client:
        ok(client.put("/v1/labelsets/tones", json=tones(image_only_folder)), 201)
        found = error(client.put("/v1/labelsets/other", json=tones(tiny_folder)), 409, "encoder_mismatch")
        assert found["param"] == "fingerprint"
    with serving(tmp_path, tiny_folder) as client:
        request = {"images": [picture(RED)], "label_set": "tones"}
        found = error(client.post("/v1/classify", json=request), 409, "encoder_mismatch")
        assert found["param"] == "label_set"
        assert "'image-only'" in found["message"]
        assert "embedserve train probe" in found["message"]
        assert ok(client.get("/v1/labelsets/tones"))["encoder"] == "image-only"
        ok(client.delete("/v1/labelsets/tones"), 204)


@pytest.mark.parametrize(
    ("change", "param"),
    [({"templates": ["a photo of {}."]}, "templates"), ({"activation": "sigmoid"}, "activation")],
)
def test_what_belongs_to_words_has_no_place_with_a_fitted_set(
    client: TestClient, tiny_folder: Path, change: dict[str, Any], param: str
) -> None:
    client.put("/v1/labelsets/tones", json=tones(tiny_folder))
    request = {"images": [picture(RED)], "label_set": "tones", **change}
    found = error(client.post("/v1/classify", json=request), 422)
    assert found["param"] == param
    assert "'tones'" in found["message"]
    ok(client.post("/v1/classify", json={**request, "templates": None, "activation": "softmax"}))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"dim": 9}, "weights"),
        ({"labels": ["warm"]}, "labels"),
        ({"bias": [0.0]}, "bias"),
        ({"bias": [0.0, "x"]}, "bias"),
        ({"bias": [0.0, float("inf")]}, "bias"),
        ({"weights": "%%%"}, "weights"),
        ({"kind": "quadratic"}, "kind"),
        ({"fitted": {"kind": "linear", "counts": {"warm": 1, "cool": 0}}}, "fitted.counts"),
        ({"fitted": {"kind": "guess", "counts": {"warm": 1, "cool": 1}}}, "fitted.kind"),
        ({"templates": ["{}"]}, "templates"),
    ],
)
def test_a_fitted_set_is_checked_before_it_is_saved(
    client: TestClient, tiny_folder: Path, change: dict[str, Any], param: str
) -> None:
    body = json.dumps(tones(tiny_folder, **change))
    response = client.put("/v1/labelsets/refused", content=body, headers={"Content-Type": "application/json"})
    assert error(response, 422)["param"].startswith(param)
    error(client.get("/v1/labelsets/refused"), 404)


def test_words_and_weights_may_replace_each_other(client: TestClient, tiny_folder: Path) -> None:
    ok(client.put("/v1/labelsets/either", json={"labels": ["red", "blue"]}), 201)
    ok(client.put("/v1/labelsets/either", json=tones(tiny_folder)))
    request = {"images": [picture(RED)], "label_set": "either", "top": 1}
    assert ok(client.post("/v1/classify", json=request))["results"][0]["labels"][0]["label"] == "warm"
    ok(client.put("/v1/labelsets/either", json={"labels": ["red", "blue"]}))
    assert ok(client.post("/v1/classify", json=request))["results"][0]["labels"][0]["label"] == "red"


def test_a_set_of_words_needs_an_encoder_that_reads(wordless: TestClient) -> None:
    ok(wordless.put("/v1/labelsets/words", json={"labels": ["red", "blue"]}), 201)
    request = {"images": [picture(RED)], "label_set": "words"}
    error(wordless.post("/v1/classify", json=request), 422, "no_text_tower")
