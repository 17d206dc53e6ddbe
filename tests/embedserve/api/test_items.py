"""Items: written from JSON, NDJSON and forms, read, paged, deleted; their thumbnails."""

from __future__ import annotations

import io
import json
from pathlib import Path
from urllib.parse import quote

import httpx2
import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from embedserve.app import create_app
from embedserve.config import ServeConfig
from tests.embedserve.api.requests import error, ok, picture, upload
from tests.embedserve.colours import BLUE, GREEN, RED, axis

ODD_IDS = ["a/b/c.png", "/from/root.png", "a b", "ünï/cödé 猫.png", "100%", "a?b#c", "'\"\\", "…", "a+b&c=d"]


def test_items_of_all_kinds_are_written_and_read(client: TestClient, empty: str) -> None:
    items = [
        {"id": "picture", "image": picture(RED), "metadata": {"n": 1}},
        {"id": "uri", "image": "data:image/png;base64," + picture(GREEN)},
        {"id": "text", "text": "blue"},
        {"id": "vector", "vector": [0, 0, 0, 5, 0, 0, 0, 0]},
    ]
    answer = ok(client.post(f"{empty}/items", json={"items": items}))
    assert answer == {
        "upserted": 4,
        "failed": 0,
        "results": [{"id": item["id"], "status": "ok"} for item in items],
    }
    for item, word in zip(items, ("red", "green", "blue", "dark"), strict=True):
        found = ok(client.get(f"{empty}/items/{item['id']}", params={"include": ["metadata", "vector"]}))
        np.testing.assert_allclose(found["vector"], axis(word), atol=1e-3)
        assert found["metadata"] == item.get("metadata", {})
    kinds = {item["id"]: item["kind"] for item in ok(client.get(f"{empty}/items"))["items"]}
    assert kinds == {"picture": "image", "uri": "image", "text": "text", "vector": "vector"}


def test_a_bad_item_fails_alone_and_says_where(client: TestClient, empty: str) -> None:
    items = [
        {"id": "good", "text": "red"},
        {"id": "no image", "image": "bm8gaW1hZ2U="},
        {"id": "nothing"},
        {"id": "both", "text": "red", "vector": [1] * 8},
        {"id": "short", "vector": [1, 2, 3]},
        {"id": "zero", "vector": [0] * 8},
        {"id": "reserved", "text": "red", "metadata": {"_kind": "x"}},
        {"id": "", "text": "red"},
        {"id": "typo", "txt": "red"},
        "no object",
        {"text": ""},
        {"id": "also good", "image": picture(BLUE)},
    ]
    answer = ok(client.post(f"{empty}/items", json={"items": items}))
    assert (answer["upserted"], answer["failed"]) == (2, 10)
    params = [result.get("error", {}).get("param") for result in answer["results"]]
    assert params[0] is None
    assert params[11] is None
    assert params[1] == "items[1].image"
    assert params[4] == "items[4].vector"
    assert params[5] == "items[5].vector"
    assert params[6] == "items[6].metadata"
    assert params[7] == "items[7].id"
    assert params[8] == "items[8].txt"
    assert params[9] == "items[9]"
    assert params[10] == "items[10].text"
    assert all(param.startswith(f"items[{i}]") for i, param in enumerate(params) if param)
    stored = [item["id"] for item in ok(client.get(f"{empty}/items"))["items"]]
    assert stored == ["also good", "good"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_vectors_hold_finite_numbers(client: TestClient, empty: str, number: str) -> None:
    body = '{"items": [{"id": "a", "vector": [1,1,1,1,1,1,1,%s]}]}' % number  # noqa: UP031 - braces of JSON
    response = client.post(f"{empty}/items", content=body, headers={"Content-Type": "application/json"})
    found = error(response, 422)
    assert found["param"] == "items[0].vector"
    assert "finite" in found["message"]


def test_an_id_that_comes_twice_fails_the_second_time(client: TestClient, empty: str) -> None:
    items = [{"id": "a", "text": "red"}, {"id": "a", "text": "blue"}, {"id": "b", "text": "blue"}]
    results = ok(client.post(f"{empty}/items", json={"items": items}))["results"]
    assert [result["status"] for result in results] == ["ok", "error", "ok"]
    assert results[1]["error"]["code"] == "duplicate_id"
    assert results[1]["error"]["param"] == "items[1].id"
    vector = ok(client.get(f"{empty}/items/a", params={"include": "vector"}))["vector"]
    np.testing.assert_allclose(vector, axis("red"), atol=1e-3)


def test_the_same_content_without_an_id_is_one_item(client: TestClient, empty: str) -> None:
    for _ in range(2):
        ok(client.post(f"{empty}/items", json={"items": [{"text": "red"}, {"image": picture(RED)}]}))
    assert len(ok(client.get(f"{empty}/items"))["items"]) == 2


def test_a_known_id_is_replaced(client: TestClient, colours: str) -> None:
    ok(client.post(f"{colours}/items", json={"items": [{"id": "red.png", "image": picture(BLUE)}]}))
    found = ok(client.get(f"{colours}/items/red.png", params={"include": ["metadata", "vector"]}))
    np.testing.assert_allclose(found["vector"], axis("blue"), atol=1e-3)
    assert found["metadata"] == {}


@pytest.mark.parametrize("name", ODD_IDS)
def test_any_id_goes_through_a_url_and_back(client: TestClient, empty: str, name: str) -> None:
    ok(client.post(f"{empty}/items", json={"items": [{"id": name, "image": picture(GREEN)}]}))
    for safe in ("", "/"):
        found = ok(client.get(f"{empty}/items/{quote(name, safe=safe)}"))
        assert found["id"] == name
    assert ok(client.get(f"{empty}/items"))["items"][0]["id"] == name
    (hit,) = ok(client.post(f"{empty}/search", json={"text": "green"}))["hits"]
    assert hit["id"] == name
    assert client.get(hit["thumbnail"]).status_code == 200
    ok(client.delete(f"{empty}/items/{quote(name, safe='')}"), 204)
    error(client.get(f"{empty}/items/{quote(name, safe='')}"), 404, "item_not_found")


def test_ndjson_is_written_line_by_line(client: TestClient, empty: str) -> None:
    lines = [json.dumps({"id": str(n), "text": "red", "metadata": {"n": n}}) for n in range(600)]
    lines[3] = "{broken"
    lines[5] = json.dumps({"id": "1", "text": "blue"})
    body = "\n".join([*lines[:4], "", *lines[4:]]).encode() + b"\n"

    def chunks():
        for start in range(0, len(body), 777):
            yield body[start : start + 777]

    headers = {"Content-Type": "application/x-ndjson"}
    answer = ok(client.post(f"{empty}/items", content=chunks(), headers=headers))
    assert (answer["upserted"], answer["failed"]) == (598, 2)
    assert len(answer["results"]) == 600
    assert answer["results"][3]["error"]["param"] == "line[4]"
    assert answer["results"][3]["error"]["code"] == "invalid_json"
    assert answer["results"][5]["error"]["param"] == "line[7].id"
    assert ok(client.get(empty))["items"] == 598


def test_ndjson_without_lines_is_refused(client: TestClient, empty: str) -> None:
    response = client.post(
        f"{empty}/items", content=b"\n\n", headers={"Content-Type": "application/x-ndjson"}
    )
    error(response, 422)


def test_a_form_takes_ids_from_file_names(client: TestClient, empty: str) -> None:
    answer = ok(client.post(f"{empty}/items", files=[upload(RED, "r.png"), upload(BLUE, "ü b.png")]))
    assert [result["id"] for result in answer["results"]] == ["r.png", "ü b.png"]


def test_a_form_may_say_ids_and_metadata(client: TestClient, empty: str) -> None:
    notes = [{"id": "first", "metadata": {"n": 1}}, {"metadata": {"n": 2}}]
    files = [upload(RED), upload(BLUE, "b.png"), ("items", (None, json.dumps(notes)))]
    assert ok(client.post(f"{empty}/items", files=files))["upserted"] == 2
    page = ok(client.get(f"{empty}/items"))["items"]
    assert [(item["id"], item["metadata"]) for item in page] == [("b.png", {"n": 2}), ("first", {"n": 1})]


def test_a_picture_may_come_with_a_text_in_every_form_of_body(client: TestClient, empty: str) -> None:
    """`text_weight` 1 makes a vector halfway between the two, and 0.5 is what is meant without."""
    ball = {"image": picture(RED), "text": "round"}
    ok(client.post(f"{empty}/items", json={"items": [{"id": "json", **ball, "text_weight": 1}]}))
    line = json.dumps({"id": "line", **ball, "text_weight": 1}).encode()
    ok(client.post(f"{empty}/items", content=line, headers={"Content-Type": "application/x-ndjson"}))
    notes = [{"id": "form", "text": "round", "text_weight": 1}, {"id": "half", "text": "round"}, {}]
    files = [upload(RED), upload(RED), upload(RED, "plain"), ("items", (None, json.dumps(notes)))]
    ok(client.post(f"{empty}/items", files=files))
    items = ok(client.get(f"{empty}/items", params={"include": ["metadata", "vector"]}))["items"]
    found = {item["id"]: item["vector"] for item in items}
    for name in ("json", "line", "form"):
        np.testing.assert_allclose(found[name], (axis("red") + axis("round")) / 2**0.5, atol=1e-3)
    np.testing.assert_allclose(found["half"], (axis("red") + axis("round") / 2) / 1.25**0.5, atol=1e-3)
    np.testing.assert_allclose(found["plain"], axis("red"), atol=1e-3)
    assert {(item["kind"], str(item["metadata"])) for item in items} == {("image", "{}")}
    assert all(item["thumbnail"] for item in items)


def test_a_bad_picture_text_or_weight_fails_alone(client: TestClient, empty: str) -> None:
    items = [
        {"id": "good", "image": picture(RED), "text": "round"},
        {"image": "bm8gaW1hZ2U=", "text": "round"},
        {"image": picture(RED), "text": ""},
        {"image": picture(RED), "text": "x" * 1_000_000},
        {"image": picture(RED), "text": "round", "text_weight": 11},
        {"image": picture(RED), "text": "round", "text_weight": -1},
        {"image": picture(RED), "text": "round", "text_weight": "1"},
        {"image": picture(RED), "text": "round", "text_weight": None},
        {"image": picture(RED), "vector": [1] * 8},
    ]
    answer = ok(client.post(f"{empty}/items", json={"items": items}))
    assert (answer["upserted"], answer["failed"]) == (1, 8)
    fields = ["image", "text", "text", *["text_weight"] * 4, "vector"]
    params = [result["error"]["param"] for result in answer["results"][1:]]
    assert params == [f"items[{i}].{field}" for i, field in enumerate(fields, 1)]
    assert "10" in answer["results"][4]["error"]["message"]


def test_a_bad_text_for_a_file_fails_alone(client: TestClient, empty: str) -> None:
    notes = [{"text": " "}, {"text_weight": 11}, {"txt": "round"}, {"text": "round"}]
    files = [*(upload(RED, str(n)) for n in range(4)), ("items", (None, json.dumps(notes)))]
    results = ok(client.post(f"{empty}/items", files=files))["results"]
    assert [result.get("error", {}).get("param") for result in results] == [
        "file[0].text",
        "items[1].text_weight",
        "items[2].txt",
        None,
    ]


def test_the_document_tells_of_texts_and_their_weight(client: TestClient) -> None:
    document = ok(client.get("/openapi.json"))
    weight = document["components"]["schemas"]["ItemsBody"]["properties"]["items"]["items"]["properties"][
        "text_weight"
    ]
    assert (weight["minimum"], weight["maximum"], weight["default"]) == (0, 10, 0.5)
    content = document["paths"]["/v1/collections/{name}/items"]["post"]["requestBody"]["content"]
    parts = content["multipart/form-data"]["schema"]["properties"]
    assert "text_weight" in parts["items"]["description"]


@pytest.mark.parametrize("notes", ["[{}]", "{}", "[{}, {}, {}]", "{"])
def test_notes_must_match_the_files(client: TestClient, empty: str, notes: str) -> None:
    files = [upload(RED), upload(BLUE, "b.png"), ("items", (None, notes))]
    assert error(client.post(f"{empty}/items", files=files), 422)["param"] == "items"


def test_a_bad_file_fails_alone(client: TestClient, empty: str) -> None:
    files = [upload(RED, "r.png"), ("file", ("page.jpg", b"<html>no picture</html>", "image/jpeg"))]
    answer = ok(client.post(f"{empty}/items", files=files))
    assert answer["upserted"] == 1
    failed = answer["results"][1]
    assert failed["id"] == "page.jpg"
    assert failed["error"]["param"] == "file[1]"
    assert "HTML" in failed["error"]["message"]


def test_pages_follow_the_id_order(client: TestClient, colours: str) -> None:
    first = ok(client.get(f"{colours}/items", params={"limit": 3}))
    assert [item["id"] for item in first["items"]] == ["blue.png", "green.png", "red.png"]
    assert first["next"] == "red.png"
    second = ok(client.get(f"{colours}/items", params={"limit": 3, "after": first["next"]}))
    assert [item["id"] for item in second["items"]] == ["words"]
    assert second["next"] is None
    assert ok(client.get(f"{colours}/items", params={"limit": 4}))["next"] is None


def test_pages_can_be_filtered(client: TestClient, colours: str) -> None:
    params = {"filter": json.dumps({"colour": "red", "n": {"$gt": 1}})}
    assert [item["id"] for item in ok(client.get(f"{colours}/items", params=params))["items"]] == ["words"]
    for wrong in ("{", "[]", '{"n": {"$near": 1}}'):
        found = error(client.get(f"{colours}/items", params={"filter": wrong}), 422)
        assert "filter" in (found["param"] or found["message"])


def test_items_are_deleted_one_by_one_by_ids_or_by_filter(client: TestClient, colours: str) -> None:
    ok(client.delete(f"{colours}/items/red.png"), 204)
    error(client.delete(f"{colours}/items/red.png"), 404, "item_not_found")
    assert ok(client.delete(f"{colours}/items", params={"id": ["blue.png", "unknown"]})) == {"deleted": 1}
    assert ok(client.delete(f"{colours}/items", params={"filter": '{"n": 4}'})) == {"deleted": 1}
    assert [item["id"] for item in ok(client.get(f"{colours}/items"))["items"]] == ["green.png"]
    error(client.delete(f"{colours}/items"), 422)
    error(client.delete(f"{colours}/items", params={"filter": "{}", "id": "x"}), 422)
    assert ok(client.delete(f"{colours}/items", params={"filter": "{}"})) == {"deleted": 1}


def test_a_thumbnail_is_a_small_webp_that_browsers_keep(client: TestClient, colours: str) -> None:
    url = ok(client.get(f"{colours}/items/red.png"))["thumbnail"]
    response = client.get(url)
    assert response.headers["content-type"] == "image/webp"
    assert "immutable" in response.headers["cache-control"]
    assert "private" in response.headers["cache-control"]
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.format == "WEBP"
        assert image.convert("RGB").getpixel((0, 0))[0] > 240
    etag = response.headers["etag"]
    plain = client.get(f"{colours}/thumbnails/red.png", headers={"If-None-Match": etag})
    assert plain.status_code == 304
    assert not plain.content
    assert plain.headers["cache-control"] == "private, no-cache"


def test_a_new_picture_gets_a_new_thumbnail_path(client: TestClient, colours: str) -> None:
    before = ok(client.get(f"{colours}/items/red.png"))["thumbnail"]
    ok(client.post(f"{colours}/items", json={"items": [{"id": "red.png", "image": picture(BLUE)}]}))
    after = ok(client.get(f"{colours}/items/red.png"))["thumbnail"]
    assert before != after
    assert "immutable" not in client.get(before).headers["cache-control"]


def test_what_was_not_made_from_an_image_has_no_thumbnail(client: TestClient, colours: str) -> None:
    assert ok(client.get(f"{colours}/items/words"))["thumbnail"] is None
    error(client.get(f"{colours}/thumbnails/words"), 404)
    error(client.get(f"{colours}/thumbnails/unknown"), 404)


@pytest.mark.anyio
async def test_an_id_that_looks_escaped_is_not_unescaped_twice(tmp_path: Path, tiny_folder: Path) -> None:
    app = create_app(ServeConfig(data=tmp_path, encoder=str(tiny_folder), threads=1))
    transport = httpx2.ASGITransport(app)  # starlette's test client unescapes paths twice itself
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://localhost/v1/collections") as client,
    ):
        ok(await client.put("/c"), 201)
        ok(await client.post("/c/items", json={"items": [{"id": "a%2Fb", "text": "red"}]}))
        assert ok(await client.get("/c/items/a%252Fb"))["id"] == "a%2Fb"
        error(await client.get("/c/items/a%2Fb"), 404)
