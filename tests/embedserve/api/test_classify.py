"""`POST /v1/classify` and the saved label sets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.embedserve.api.requests import error, ok, picture, serving, upload
from tests.embedserve.colours import BLUE, GREEN, RED

PLAIN = {"templates": ["{}"]}


def test_a_picture_gets_the_label_of_its_colour(client: TestClient) -> None:
    request = {"images": [picture(RED), picture(BLUE)], "labels": ["blue", "green", "red"], "top": 2}
    answer = ok(client.post("/v1/classify", json=request))
    assert answer["model"] == "tiny"
    assert [result["labels"][0]["label"] for result in answer["results"]] == ["red", "blue"]
    assert [len(result["labels"]) for result in answer["results"]] == [2, 2]


def test_probabilities_are_the_softmax_of_scaled_cosines(client: TestClient) -> None:
    request = {"images": [picture(RED)], "labels": ["red", "green"], **PLAIN}
    labels = ok(client.post("/v1/classify", json=request))["results"][0]["labels"]
    assert labels[0]["cosine"] == pytest.approx(1.0, abs=1e-6)
    assert labels[0]["probability"] == pytest.approx(1 / (1 + math.exp(-10)), abs=1e-9)  # scale 10
    assert sum(label["probability"] for label in labels) == pytest.approx(1)


def test_a_sigmoid_judges_each_label_alone(client: TestClient) -> None:
    request = {"images": [picture(RED)], "labels": ["red", "green"], "activation": "sigmoid", **PLAIN}
    labels = ok(client.post("/v1/classify", json=request))["results"][0]["labels"]
    assert labels[0]["probability"] == pytest.approx(1 / (1 + math.exp(-10)))
    assert labels[1]["probability"] == pytest.approx(0.5)


def test_a_label_may_have_several_prompts(client: TestClient) -> None:
    request = {
        "images": [picture(GREEN)],
        "labels": {"warm": ["red"], "cool": ["green", "blue"]},
        **PLAIN,
    }
    best = ok(client.post("/v1/classify", json=request))["results"][0]["labels"][0]
    assert best["label"] == "cool"
    assert best["cosine"] == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_curl_can_classify_with_a_form(client: TestClient) -> None:
    form = {"labels": "red, green,blue", "top": "1", "templates": "a photo of {}."}
    answer = ok(client.post("/v1/classify", files=[upload(GREEN, part="image")], data=form))
    assert [label["label"] for label in answer["results"][0]["labels"]] == ["green"]
    form = {"labels": '{"a, b": ["red"], "c": ["green"]}'}
    answer = ok(client.post("/v1/classify", files=[upload(RED, part="image")], data=form))
    assert answer["results"][0]["labels"][0]["label"] == "a, b"


def test_a_bad_image_fails_alone(client: TestClient) -> None:
    request = {"images": ["bm8gaW1hZ2U=", picture(BLUE)], "labels": ["red", "blue"]}
    results = ok(client.post("/v1/classify", json=request))["results"]
    assert results[0]["error"]["param"] == "images[0]"
    assert results[1]["labels"][0]["label"] == "blue"
    error(client.post("/v1/classify", json={**request, "images": ["bm8gaW1hZ2U="]}), 415)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"labels": []}, "labels"),
        ({"labels": ["red", "red"]}, "labels"),
        ({"labels": ["red", " "]}, "labels"),
        ({"labels": {"red": []}}, "labels"),
        ({"templates": []}, "templates"),
        ({"templates": ["{}", "a photo"]}, "templates[1]"),
        ({"templates": ["{} and {}"]}, "templates[0]"),
        ({"label_set": "pets"}, "labels"),
        ({"labels": None}, "labels"),
        ({"top": 0}, "top"),
        ({"activation": "tanh"}, "activation"),
        ({"images": []}, "images"),
    ],
)
def test_requests_that_make_no_sense_say_why(client: TestClient, change: dict, param: str) -> None:
    request = {"images": [picture(RED)], "labels": ["red", "blue"], **change}
    found = error(client.post("/v1/classify", json=request), 422)
    assert found["param"].startswith(param)


def test_an_encoder_without_text_points_to_the_vote(tmp_path: Path, image_only_folder: Path) -> None:
    with serving(tmp_path, image_only_folder) as client:
        request = {"images": [picture(RED)], "labels": ["red", "blue"]}
        found = error(client.post("/v1/classify", json=request), 422, "no_text_tower")
        assert "/v1/collections/{name}/classify" in found["message"]
        assert ok(client.get("/v1/models"))["data"][0]["modalities"] == ["image"]
        results = ok(client.post("/v1/embed", json={"inputs": ["red", {"image": picture(RED)}]}))["results"]
        assert "no text tower" in results[0]["error"]["message"]
        assert results[1]["embedding"][0] == pytest.approx(1)
        ok(client.get("/readyz"))


def test_a_label_set_is_saved_used_replaced_and_deleted(client: TestClient) -> None:
    saved = ok(client.put("/v1/labelsets/colours", json={"labels": {"warm": ["red"], "cool": ["blue"]}}), 201)
    assert saved["labels"] == {"warm": ["red"], "cool": ["blue"]}
    assert all(template.count("{}") == 1 for template in saved["templates"])
    assert "colours" in ok(client.get("/v1/labelsets"))["label_sets"]
    request = {"images": [picture(BLUE)], "label_set": "colours"}
    assert ok(client.post("/v1/classify", json=request))["results"][0]["labels"][0]["label"] == "cool"

    changed = ok(client.put("/v1/labelsets/colours", json={"labels": ["red", "dark"], **PLAIN}))
    assert ok(client.get("/v1/labelsets/colours")) == changed
    assert changed == {
        "name": "colours",
        "labels": {"red": ["red"], "dark": ["dark"]},
        "templates": ["{}"],
        "activation": None,
    }
    ok(client.delete("/v1/labelsets/colours"), 204)
    error(client.delete("/v1/labelsets/colours"), 404, "label_set_not_found")
    assert error(client.post("/v1/classify", json=request), 404)["param"] == "label_set"


def test_label_sets_survive_a_restart(tmp_path: Path, tiny_folder: Path) -> None:
    with serving(tmp_path, tiny_folder) as client:
        saved = ok(client.put("/v1/labelsets/pets", json={"labels": ["red", "Grüne Äpfel"]}), 201)
    with serving(tmp_path, tiny_folder) as client:
        assert ok(client.get("/v1/labelsets/pets")) == saved
        assert "did you mean 'pets'" in error(client.get("/v1/labelsets/pet"), 404)["message"]


@pytest.mark.parametrize("name", ["Pets", "a b", "-x", "x" * 65, "..", "%2e%2e%2fx"])
def test_label_sets_have_plain_names(client: TestClient, name: str) -> None:
    response = client.put(f"/v1/labelsets/{name}", json={"labels": ["red", "blue"]})
    assert response.status_code in (404, 405, 422)
    assert response.json()["error"]["message"]
