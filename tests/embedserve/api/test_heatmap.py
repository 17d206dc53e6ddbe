"""Heat maps, patches and attention over HTTP."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from embedserve.api.embed import MOST_LOOKS
from embedserve.bundle import Description, ImageOutputs, seal
from tests.embedserve.api.requests import error, ok, picture, serving
from tests.embedserve.colours import BLUE, GREEN, RED, axis, png, quarters
from tests.tiny_bundle import OUTPUTS, write_tiny_bundle

FOUR = quarters(RED, GREEN, BLUE, (0, 0, 0))
FILE = {"file": ("four.png", FOUR, "image/png")}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, seeing_folder: Path) -> Iterator[TestClient]:
    with serving(tmp_path_factory.mktemp("data"), seeing_folder) as client:
        yield client


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """An encoder whose patches lie in a space of their own, and that gives no attention."""
    folder = tmp_path_factory.mktemp("bundles") / "apart"
    described = write_tiny_bundle(folder, name="apart", outputs=OUTPUTS).description
    assert described.image
    image = described.image.model_copy(update={"outputs": ImageOutputs(rows=2, columns=2, patches=8)})
    seal(folder, Description.model_validate({**described.model_dump(), "image": image.model_dump()}))
    with serving(tmp_path_factory.mktemp("data"), folder) as client:
        yield client


def test_the_attention_as_numbers(seeing: TestClient) -> None:
    answer = ok(seeing.post("/v1/heatmap", files=FILE))
    np.testing.assert_allclose(answer["values"], [[2 / 3, 1 / 6], [1 / 6, 0]], atol=1e-6)
    assert (answer["kind"], answer["rows"], answer["columns"]) == ("attention", 2, 2)
    assert (answer["low"], answer["high"]) == (0, pytest.approx(2 / 3))
    assert answer["region"] == {"left": 0, "top": 0, "width": 1, "height": 1}
    one = ok(seeing.post("/v1/heatmap", files=FILE, data={"head": "1"}))
    assert one["values"] == [[1, 0], [0, 0]]


def test_json_and_form_give_the_same(seeing: TestClient) -> None:
    image = base64.b64encode(FOUR).decode()
    for asked in ({}, {"text": "green"}, {"head": 0}):
        form = ok(seeing.post("/v1/heatmap", files=FILE, data={k: str(v) for k, v in asked.items()}))
        assert ok(seeing.post("/v1/heatmap", json={"image": image, **asked})) == form


def test_a_text_finds_its_part_of_the_picture(seeing: TestClient) -> None:
    for word, place in (("red", (0, 0)), ("green", (0, 1)), ("blue", (1, 0)), ("dark", (1, 1))):
        answer = ok(seeing.post("/v1/heatmap", files=FILE, data={"text": word}))
        assert answer["kind"] == "similarity"
        values = np.array(answer["values"])
        assert np.unravel_index(values.argmax(), values.shape) == place
        assert values[place] == pytest.approx(1, abs=1e-6)


def test_the_map_as_a_picture(seeing: TestClient) -> None:
    answer = seeing.post("/v1/heatmap", files=FILE, data={"format": "png", "text": "blue"})
    assert answer.headers["Content-Type"] == "image/png"
    shown = np.asarray(Image.open(io.BytesIO(answer.content)).convert("L")).astype(int)
    assert shown.shape == (8, 8)
    assert shown[7, 0] == shown.max()


def test_a_wide_picture_is_told_which_part_was_seen(seeing: TestClient) -> None:
    file = io.BytesIO()
    Image.new("RGB", (400, 100), RED).save(file, "PNG")
    answer = ok(seeing.post("/v1/heatmap", files={"file": file.getvalue()}))
    assert answer["region"] == {"left": 0.375, "top": 0, "width": 0.25, "height": 1}


def test_patches_of_another_space_answer_no_text(apart: TestClient) -> None:
    found = error(apart.post("/v1/heatmap", files=FILE, data={"text": "red"}), 422, "no_such_output")
    assert found["param"] == "text"
    error(apart.post("/v1/heatmap", files=FILE), 422, "no_such_output")
    ok(apart.post("/v1/embed", files=FILE, data={"include": "patches"}))


def test_an_encoder_without_outputs_refuses_and_says_where_to_look(client: TestClient) -> None:
    found = error(client.post("/v1/heatmap", files=FILE), 422, "no_such_output")
    assert "/v1/models" in found["message"]
    asked = {"inputs": [{"image": picture(RED)}], "include": ["attention"]}
    assert error(client.post("/v1/embed", json=asked), 422, "no_such_output")["param"] == "include"
    assert ok(client.get("/v1/models"))["data"][0]["outputs"] is None


def test_models_says_what_the_encoder_offers(seeing: TestClient) -> None:
    outputs = ok(seeing.get("/v1/models"))["data"][0]["outputs"]
    assert outputs == {"rows": 2, "columns": 2, "patches": 8, "attention": 2, "text_space": True}


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"head": "2"}, "head"),
        ({"head": "-1"}, "head"),
        ({"head": "x"}, "head"),
        ({"head": "0", "text": "red"}, "head"),
        ({"format": "jpeg"}, "format"),
        ({"text": ""}, "text"),
        ({"texts": "red"}, "texts"),
        ({"model": "other"}, "model"),
    ],
)
def test_what_cannot_be_asked_is_named(seeing: TestClient, data: dict[str, str], param: str) -> None:
    status = 404 if param == "model" else 422
    assert error(seeing.post("/v1/heatmap", files=FILE, data=data), status)["param"] == param


def test_a_bad_picture_is_the_senders_fault(seeing: TestClient) -> None:
    assert error(seeing.post("/v1/heatmap", files={"file": FOUR[:50]}), 400)["param"] == "file"
    error(seeing.post("/v1/heatmap", files={"file": b"text"}), 415)
    error(seeing.post("/v1/heatmap", data={"text": "red"}, files={"model": b""}), 422)
    error(seeing.post("/v1/heatmap", files=[("file", FOUR), ("file", FOUR)]), 422)
    error(seeing.post("/v1/heatmap", json={"image": "http://127.0.0.1/a.png"}), 403)


def test_a_read_key_may_ask(tmp_path: Path, seeing_folder: Path) -> None:
    with serving(tmp_path, seeing_folder, api_key=("look:read",)) as client:
        error(client.post("/v1/heatmap", files=FILE), 401)
        ok(client.post("/v1/heatmap", files=FILE, headers={"Authorization": "Bearer look"}))


# ---- /v1/embed ---------------------------------------------------------------------------------------


def test_patches_and_attention_come_with_the_vectors(seeing: TestClient) -> None:
    image = {"image": base64.b64encode(FOUR).decode()}
    inputs = ["red", image, {"image": "%%%"}, {"image": picture(BLUE)}]
    answer = ok(seeing.post("/v1/embed", json={"inputs": inputs, "include": ["patches", "attention"]}))
    text, four, bad, blue = answer["results"]
    assert set(text) == {"index", "embedding"}
    assert set(bad) == {"index", "error"}
    assert four["patches"]["shape"] == [4, 8]
    np.testing.assert_allclose(
        four["patches"]["data"], [axis("red"), axis("green"), axis("blue"), axis("dark")], atol=1e-6
    )
    assert four["attention"]["shape"] == [2, 4]
    np.testing.assert_allclose(blue["patches"]["data"], [axis("blue")] * 4, atol=1e-6)
    plain = ok(seeing.post("/v1/embed", json={"inputs": inputs}))["results"]
    assert plain[1] == {"index": 1, "embedding": four["embedding"]}


def test_base64_patches_are_little_endian_float32(seeing: TestClient) -> None:
    data = {"include": "patches", "encoding_format": "base64"}
    (one,) = ok(seeing.post("/v1/embed", files=FILE, data=data))["results"]
    patches = np.frombuffer(base64.b64decode(one["patches"]["data"]), "<f4").reshape(one["patches"]["shape"])
    np.testing.assert_allclose(patches[1], axis("green"), atol=1e-6)


def test_include_takes_known_names_and_few_images(seeing: TestClient) -> None:
    asked = {"inputs": ["red"], "include": ["tokens"]}
    assert error(seeing.post("/v1/embed", json=asked), 422)["param"] == "include[0]"
    many = [{"image": base64.b64encode(png(RED)).decode()}] * (MOST_LOOKS + 1)
    found = error(seeing.post("/v1/embed", json={"inputs": many, "include": ["attention"]}), 413)
    assert found["param"] == "include"
    ok(seeing.post("/v1/embed", json={"inputs": many}))
