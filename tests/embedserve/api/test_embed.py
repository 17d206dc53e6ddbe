"""`POST /v1/embed`: a mix of images and texts, each failing alone."""

from __future__ import annotations

import numpy as np
from starlette.testclient import TestClient

from embedserve.bundle import unpack_vector
from tests.embedserve.api.requests import error, ok, picture, upload
from tests.embedserve.colours import BLUE, GREEN, RED, axis


def test_a_mix_keeps_its_order(client: TestClient) -> None:
    inputs = ["small", {"image": picture(RED)}, {"text": "dark"}, "data:image/png;base64," + picture(BLUE)]
    answer = ok(client.post("/v1/embed", json={"inputs": inputs}))
    assert answer["model"] == "tiny"
    assert answer["dim"] == 8
    assert [result["index"] for result in answer["results"]] == [0, 1, 2, 3]
    expected = [axis(word) for word in ("small", "red", "dark", "blue")]
    np.testing.assert_allclose([result["embedding"] for result in answer["results"]], expected, atol=1e-6)


def test_a_form_keeps_the_order_of_its_parts(client: TestClient) -> None:
    parts = [upload(GREEN), ("text", (None, "round")), upload(RED), ("image", (None, picture(BLUE)))]
    answer = ok(client.post("/v1/embed", files=[*parts, ("encoding_format", (None, "base64"))]))
    vectors = [unpack_vector(result["embedding"]) for result in answer["results"]]
    np.testing.assert_allclose(vectors, [axis(w) for w in ("green", "round", "red", "blue")], atol=1e-6)


def test_a_bad_input_fails_alone(client: TestClient) -> None:
    inputs = ["red", {"image": "bm8gaW1hZ2U="}, {"picture": "x"}, "", {"image": picture(BLUE)}]
    results = ok(client.post("/v1/embed", json={"inputs": inputs}))["results"]
    assert [("embedding" in result) for result in results] == [True, False, False, False, True]
    assert [results[i]["error"]["code"] for i in (1, 2, 3)] == [
        "unsupported_media",
        "invalid_field",
        "empty_text",
    ]
    assert [results[i]["error"]["param"] for i in (1, 2, 3)] == ["inputs[1].image", "inputs[2]", "inputs[3]"]
    np.testing.assert_allclose(results[4]["embedding"], axis("blue"), atol=1e-6)


def test_when_all_fail_the_status_is_that_of_the_first(client: TestClient) -> None:
    response = client.post("/v1/embed", json={"inputs": [{"image": "bm8gaW1hZ2U="}, ""]})
    assert error(response, 415) == response.json()["results"][0]["error"]
    assert response.json()["results"][1]["error"]["code"] == "empty_text"


def test_an_unknown_field_names_the_closest(client: TestClient) -> None:
    found = error(client.post("/v1/embed", json={"input": ["red"]}), 422)
    assert found["param"] in ("input", "inputs")
    found = error(
        client.post("/v1/embed", json={"inputs": ["red"], "encoding": "base64"}), 422, "unknown_field"
    )
    assert "did you mean 'encoding_format'" in found["message"]


def test_an_unknown_part_of_a_form_names_the_closest(client: TestClient) -> None:
    found = error(client.post("/v1/embed", files=[upload(RED, part="files")]), 422, "unknown_field")
    assert "did you mean 'file'" in found["message"]


def test_a_path_typed_instead_of_a_file_is_explained(client: TestClient) -> None:
    found = error(client.post("/v1/embed", files=[("file", (None, "photo.jpg"))]), 422)
    assert "-F file=@photo.jpg" in found["message"]


def test_no_inputs_are_refused(client: TestClient) -> None:
    assert error(client.post("/v1/embed", json={"inputs": []}), 422)["param"] == "inputs"
    assert error(client.post("/v1/embed", files=[("model", (None, "tiny"))]), 422)["param"] == "file"
