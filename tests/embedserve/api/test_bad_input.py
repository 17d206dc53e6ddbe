"""Every kind of bad input gets its status and a message that says what to do, the rest of its batch succeeds,
and afterwards the server is as ready as before."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.embedserve.api.requests import error, ok, picture
from tests.embedserve.colours import BLUE, axis, png


@pytest.fixture(autouse=True)
def still_ready(client: TestClient) -> Iterator[None]:
    yield
    ok(client.get("/readyz"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG whose header promises side × side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
        + b"\0\0\0\0IEND\xaeB`\x82"
    )


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))

BAD_IMAGES = {
    "truncated": (encoded(NOISE, "JPEG")[:800], 400, "truncated"),
    "empty": (b"", 400, "empty"),
    "html": (b"<!doctype html><html><body>404</body></html>", 415, "HTML"),
    "text": (b"just some words", 415, "not an image"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", 415, "PDF"),
    "200 megapixels": (bomb(14_200), 413, "pixels"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_explained_and_its_neighbour_embedded(client: TestClient, name: str) -> None:
    data, status, word = BAD_IMAGES[name]
    files = [("file", (f"{name}.jpg", data, "image/jpeg"))]
    found = error(client.post("/v1/embed", files=files), status)
    assert word.lower() in found["message"].lower()
    both = ok(client.post("/v1/embed", files=[*files, ("file", ("blue.png", png(BLUE), "image/png"))]))
    assert both["results"][0]["error"]["message"] == found["message"]
    np.testing.assert_allclose(both["results"][1]["embedding"], axis("blue"), atol=1e-6)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_leaves_the_other_items_of_its_request_alone(
    client: TestClient, empty: str, name: str
) -> None:
    data, _, word = BAD_IMAGES[name]
    items = [
        {"id": "bad", "image": base64.b64encode(data).decode()},
        {"id": "good", "image": picture(BLUE)},
    ]
    answer = ok(client.post(f"{empty}/items", json={"items": items}))
    assert [result["status"] for result in answer["results"]] == ["error", "ok"]
    assert answer["results"][0]["error"]["param"] == "items[0].image"
    assert word.lower() in answer["results"][0]["error"]["message"].lower()


def test_unusual_images_are_fine(client: TestClient) -> None:
    red = Image.new("RGB", (9, 5), (255, 0, 0))
    frames = [red.quantize(), Image.new("RGB", (9, 5), (0, 0, 255)).quantize()]
    exif = Image.Exif()
    exif[0x0112] = 6
    usual = {
        "1×1": encoded(Image.new("RGB", (1, 1), (255, 0, 0)), "PNG"),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "CMYK": encoded(Image.new("CMYK", (9, 5), (0, 255, 255, 0)), "JPEG", quality=100),
        "rotated": encoded(red, "PNG", exif=exif),
        "palette": encoded(red.quantize(), "PNG"),
        "half transparent": encoded(Image.new("RGBA", (9, 5), (255, 0, 0, 255)), "PNG"),
    }
    inputs = [{"image": base64.b64encode(data).decode()} for data in usual.values()]
    results = ok(client.post("/v1/embed", json={"inputs": inputs}))["results"]
    for name, result in zip(usual, results, strict=True):
        np.testing.assert_allclose(result["embedding"], axis("red"), atol=0.02, err_msg=name)
    white = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    gray16 = Image.fromarray(np.full((8, 8), 65535, np.uint16))
    inputs = [{"image": base64.b64encode(encoded(image, "PNG")).decode()} for image in (white, gray16)]
    for result in ok(client.post("/v1/embed", json={"inputs": inputs}))["results"]:
        np.testing.assert_allclose(result["embedding"][:4], [3**-0.5] * 3 + [0], atol=1e-3)


@pytest.mark.parametrize(
    "text", ["red 🍎", "red\0blue", "أحمر", "\u202ered", "a" * 60_000, "\ufffd", "red\n\n\tblue"]
)
def test_unusual_texts_are_fine(client: TestClient, text: str) -> None:
    (result,) = ok(client.post("/v1/embed", json={"inputs": [text]}))["results"]
    assert np.linalg.norm(result["embedding"]) == pytest.approx(1, abs=1e-5)


def test_a_text_of_100_kb_is_a_413_that_names_the_limit(client: TestClient) -> None:
    for response in (
        client.post("/v1/embeddings", json={"input": "a" * 100_000}),
        client.post("/v1/embed", json={"inputs": ["ä" * 50_000]}),
    ):
        found = error(response, 413, "text_too_large")
        assert "100000" in found["message"]
        assert "65536" in found["message"]


def test_an_empty_text_is_a_422(client: TestClient, empty: str) -> None:
    for response in (
        client.post("/v1/embeddings", json={"input": ""}),
        client.post("/v1/embed", json={"inputs": [""]}),
        client.post(f"{empty}/search", json={"text": "\n"}),
        client.post(f"{empty}/items", json={"items": [{"id": "a", "text": ""}]}),
    ):
        error(response, 422, "empty_text")


@pytest.mark.parametrize(
    ("image", "status"),
    [
        ("%%%", 400),
        ("data:image/png;base64,%%%", 400),
        ("data:image/png,", 400),
        ("file:///etc/passwd", 422),
        ("ftp://example.com/a.png", 422),
        ("/etc/passwd", 415),
        ("../photo.jpg", 400),
        ("http://127.0.0.1/a.png", 403),
        ("http://169.254.169.254/latest/meta-data", 403),
        ("https://localhost/a.png", 403),
        ("http://", 400),
    ],
)
def test_images_come_only_from_where_they_may(client: TestClient, image: str, status: int) -> None:
    response = client.post("/v1/embed", json={"inputs": [{"image": image}, "red"]})
    first, second = ok(response)["results"]
    assert first["error"]["param"] == "inputs[0].image"
    assert "embedding" in second
    found = error(client.post("/v1/embed", json={"inputs": [{"image": image}]}), status)
    assert found["message"] == first["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1,", b"\xff\xfe{}", b'{"inputs": ["\xff"]}', b"null", b"[]", b"3"]
)
@pytest.mark.parametrize("path", ["/v1/embed", "/v1/embeddings", "/v1/classify"])
def test_a_body_that_is_no_json_object_is_told_so(client: TestClient, path: str, body: bytes) -> None:
    response = client.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == (422 if body in (b"null", b"[]", b"3") else 400)
    error(response, response.status_code)


def test_a_lone_surrogate_in_json_is_a_400(client: TestClient) -> None:
    body = b'{"inputs": ["red \\ud800"]}'
    error(client.post("/v1/embed", content=body, headers={"Content-Type": "application/json"}), 400)


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "image/png", ""])
def test_another_content_type_is_a_415_that_names_those_allowed(
    client: TestClient, content_type: str
) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    found = error(client.post("/v1/embed", content=b"x=1", headers=headers), 415)
    assert "application/json or multipart/form-data" in found["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x\r\n",
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\nhalf of a fi',
        b"--x\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--x--\r\n",
        b"something else",
    ],
)
def test_a_broken_form_is_a_400(client: TestClient, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    error(client.post("/v1/embed", content=body, headers=headers), 400, "malformed_form")


def test_a_form_without_boundary_is_a_400(client: TestClient) -> None:
    headers = {"Content-Type": "multipart/form-data"}
    error(client.post("/v1/embed", content=b"x", headers=headers), 400, "malformed_form")


def test_an_unknown_path_names_the_closest(client: TestClient) -> None:
    assert "'/v1/collections'" in error(client.get("/v1/colections"), 404, "unknown_path")["message"]
    assert "'/v1/models'" in error(client.get("/v1/models/"), 404)["message"]


def test_another_method_names_those_allowed(client: TestClient) -> None:
    response = client.patch("/v1/collections/x")
    error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "DELETE, GET, PUT"
