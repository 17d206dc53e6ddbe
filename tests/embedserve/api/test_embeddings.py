"""`POST /v1/embeddings` and `GET /v1/models`: OpenAI's forms."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from tests.embedserve.api.requests import error, ok, picture
from tests.embedserve.colours import BLUE, GREEN, RED, axis
from tests.tiny_bundle import WORDS

DATA_URI = "data:image/png;base64,"


def embed(client: TestClient, given: Any, **more: Any) -> list[np.ndarray]:
    answer = ok(client.post("/v1/embeddings", json={"input": given, **more}))
    assert answer["object"] == "list"
    assert [entry["index"] for entry in answer["data"]] == list(range(len(answer["data"])))
    assert {entry["object"] for entry in answer["data"]} == {"embedding"}
    return [np.array(entry["embedding"], np.float32) for entry in answer["data"]]


def test_a_text_becomes_its_vector(client: TestClient) -> None:
    np.testing.assert_allclose(embed(client, "red"), [axis("red")], atol=1e-6)


@pytest.mark.parametrize(
    "given",
    [
        DATA_URI + picture(GREEN),
        {"image": DATA_URI + picture(GREEN)},
        {"image": picture(GREEN)},
        [{"text": "green"}],
        [WORDS.index("green") + 2],
        [[WORDS.index("green") + 2]],
    ],
    ids=[
        "data URI",
        "object with URI",
        "object with base64",
        "text object",
        "token ids",
        "list of token ids",
    ],
)
def test_every_form_of_green_is_green(client: TestClient, given: Any) -> None:
    np.testing.assert_allclose(embed(client, given), [axis("green")], atol=1e-6)


def test_strings_are_images_when_the_modality_says_so(client: TestClient) -> None:
    np.testing.assert_allclose(embed(client, [picture(BLUE)], modality="image"), [axis("blue")], atol=1e-6)


def test_an_http_url_is_a_text_unless_the_modality_is_image(client: TestClient) -> None:
    assert len(embed(client, "http://127.0.0.1/red.png")) == 1
    refused = error(
        client.post("/v1/embeddings", json={"input": "http://127.0.0.1/red.png", "modality": "image"}), 403
    )
    assert refused["param"] == "input"


def test_mixed_inputs_keep_their_order(client: TestClient) -> None:
    given = ["dark", {"image": picture(RED)}, "small", {"image": picture(BLUE)}, {"text": "large"}, [4]]
    expected = [axis(word) for word in ("dark", "red", "small", "blue", "large", "blue")]
    np.testing.assert_allclose(embed(client, given), expected, atol=1e-6)


def test_base64_is_little_endian_float32_and_exact(client: TestClient) -> None:
    (floats,) = embed(client, "red green small")
    request = {"input": "red green small", "encoding_format": "base64"}
    text = ok(client.post("/v1/embeddings", json=request))["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(text), "<f4"), floats)


def test_dimensions_cut_and_renormalise(client: TestClient) -> None:
    (cut,) = embed(client, "red green round", dimensions=2)
    np.testing.assert_allclose(cut, [np.sqrt(0.5), np.sqrt(0.5)], atol=1e-6)
    assert len(embed(client, "red", dimensions=8)[0]) == 8


def test_a_prefix_without_direction_is_told_so(client: TestClient) -> None:
    found = error(client.post("/v1/embeddings", json={"input": ["red", "round"], "dimensions": 2}), 422)
    assert found["param"] == "dimensions"
    assert "input[1]" in found["message"]


@pytest.mark.parametrize("dimensions", [0, -1, 9, 2.5, "2", True])
def test_other_dimensions_are_refused(client: TestClient, dimensions: Any) -> None:
    found = error(client.post("/v1/embeddings", json={"input": "red", "dimensions": dimensions}), 422)
    assert found["param"] == "dimensions"


def test_usage_counts_the_tokens_of_texts_and_arrays(client: TestClient) -> None:
    given = ["red green", [2, 3, 4], {"image": picture(RED)}]
    usage = ok(client.post("/v1/embeddings", json={"input": given}))["usage"]
    assert usage == {"prompt_tokens": 5, "total_tokens": 5}


def test_another_model_is_a_404_that_names_the_one_served(client: TestClient) -> None:
    found = error(
        client.post("/v1/embeddings", json={"input": "red", "model": "tinny"}), 404, "model_not_found"
    )
    assert "did you mean 'tiny'" in found["message"]
    assert embed(client, "red", model="tiny")


def test_fields_of_other_servers_are_ignored(client: TestClient) -> None:
    assert embed(client, "red", user="someone", truncate="END", input_type="query")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "input"),
        ([], "input"),
        (7, "input"),
        ({"picture": "x"}, "input"),
        (["red", None], "input[1]"),
        (["red", {"image": 3}], "input[1]"),
        (["red", {"image": "x", "text": "y"}], "input[1]"),
        (["red", []], "input[1]"),
        (["red", [2, "x"]], "input[1]"),
        (["red", " "], "input[1]"),
        ("", "input"),
        ([2, 99], "input"),
        ([2, -1], "input"),
        (["red", [2] * 17], "input[1]"),
    ],
)
def test_inputs_that_are_none_are_refused_by_name(client: TestClient, given: Any, param: str) -> None:
    assert error(client.post("/v1/embeddings", json={"input": given}), 422)["param"] == param


def test_models_describe_the_encoder(client: TestClient) -> None:
    (model,) = ok(client.get("/v1/models"))["data"]
    assert model["id"] == "tiny"
    assert model["object"] == "model"
    assert model["dim"] == 8
    assert model["modalities"] == ["image", "text"]
    assert ok(client.get("/v1/models/tiny")) == model
    error(client.get("/v1/models/large"), 404, "model_not_found")
