"""Search, the vote of neighbours and near-duplicates over HTTP."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.embedserve.api.requests import error, ok, picture, upload
from tests.embedserve.colours import BLUE, GREEN, RED, axis


def search(client: TestClient, collection: str, **request: Any) -> list[str]:
    answer = ok(client.post(f"{collection}/search", json=request))
    assert answer["took_ms"] > 0
    return [hit["id"] for hit in answer["hits"]]


@pytest.mark.parametrize(
    "query",
    [{"text": "green"}, {"image": picture(GREEN)}, {"vector": axis("green").tolist()}],
    ids=["text", "image", "vector"],
)
def test_green_is_found_by_anything_green(client: TestClient, colours: str, query: dict) -> None:
    assert search(client, colours, **query, k=1) == ["green.png"]


def test_hits_have_scores_metadata_and_thumbnails(client: TestClient, colours: str) -> None:
    best, second, *_ = ok(client.post(f"{colours}/search", json={"text": "red"}))["hits"]
    assert best["id"] == "red.png"
    assert best["score"] == pytest.approx(1, abs=1e-3)
    assert best["metadata"] == {"colour": "red", "n": 1}
    assert client.get(best["thumbnail"]).headers["content-type"] == "image/webp"
    assert second["id"] == "words"
    assert second["score"] == pytest.approx(0.5**0.5, abs=1e-3)
    assert second["thumbnail"] is None
    assert "vector" not in best


def test_vectors_come_when_asked_for(client: TestClient, colours: str) -> None:
    (hit,) = ok(client.post(f"{colours}/search", json={"text": "red", "k": 1, "include": ["vector"]}))["hits"]
    assert hit["vector"] == pytest.approx(axis("red").tolist(), abs=1e-3)
    assert "metadata" not in hit


def test_a_search_by_id_leaves_that_item_out(client: TestClient, colours: str) -> None:
    assert search(client, colours, id="red.png")[0] == "words"
    assert "red.png" not in search(client, colours, id="red.png")
    assert error(client.post(f"{colours}/search", json={"id": "unknown"}), 404)["param"] == "id"


def test_negative_weights_push_away(client: TestClient, colours: str) -> None:
    query = [{"text": "red"}, {"text": "round", "weight": -0.9}]
    assert search(client, colours, query=query)[0] == "red.png"
    assert search(client, colours, query=query)[-1] in ("words", "green.png", "blue.png")
    mixed = [{"image": picture(RED)}, {"text": "blue", "weight": 2}, {"id": "green.png", "weight": 0.1}]
    assert search(client, colours, query=mixed)[:2] == ["blue.png", "red.png"]


def test_filters_and_scores_limit_the_hits(client: TestClient, colours: str) -> None:
    assert search(client, colours, text="red", filter={"n": {"$in": [2, 3]}}) == ["blue.png", "green.png"]
    assert search(client, colours, text="red", min_score=0.9) == ["red.png"]
    assert search(client, colours, text="red", k=2) == ["red.png", "words"]


def test_groups_show_their_best_only(client: TestClient, colours: str) -> None:
    assert search(client, colours, text="red", group_by="colour") == ["red.png", "blue.png", "green.png"]


def test_diversity_prefers_what_differs(client: TestClient, empty: str) -> None:
    items = [
        {"id": "best", "vector": axis("red", "green", 0.1).tolist()},
        {"id": "twin", "vector": axis("red", "green", 0.11).tolist()},
        {"id": "other", "vector": axis("red", "blue", 0.3).tolist()},
    ]
    ok(client.post(f"{empty}/items", json={"items": items}))
    assert search(client, empty, text="red", k=2) == ["best", "twin"]
    assert search(client, empty, text="red", k=2, diversity=0.7) == ["best", "other"]


def test_curl_can_search_with_a_form(client: TestClient, colours: str) -> None:
    form = {"k": "2", "filter": '{"colour": "red"}', "min_score": "0.1", "include": '["metadata"]'}
    answer = ok(client.post(f"{colours}/search", files=[upload(RED, part="image")], data=form))
    assert [hit["id"] for hit in answer["hits"]] == ["red.png", "words"]
    files = [("text", (None, "blue")), ("k", (None, "1"))]
    assert ok(client.post(f"{colours}/search", files=files))["hits"][0]["id"] == "blue.png"


@pytest.mark.parametrize(
    ("request_body", "param"),
    [
        ({}, "query"),
        ({"text": "red", "id": "red.png"}, "id"),
        ({"text": " "}, "text"),
        ({"text": "red", "k": 0}, "k"),
        ({"text": "red", "k": 1001}, "k"),
        ({"text": "red", "k": "5"}, "k"),
        ({"text": "red", "filters": {}}, "filters"),
        ({"text": "red", "filter": {"n": {"$near": 1}}}, "filter"),
        ({"text": "red", "diversity": 1.5}, "diversity"),
        ({"text": "red", "include": ["image"]}, "include[0]"),
        ({"vector": [1, 2, 3]}, "vector"),
        ({"query": []}, "query"),
        ({"query": [{"text": "red"}, {"weight": 1}]}, "query[1]"),
        ({"query": [{"text": "red"}, {"text": ""}]}, "query[1].text"),
        ({"query": [{"text": "red"}, {"text": "red", "weight": -1}]}, "query"),
        ({"query": [{"text": "red", "image": "x"}]}, "query[0]"),
    ],
)
def test_searches_that_make_no_sense_say_why(
    client: TestClient, colours: str, request_body: dict, param: str
) -> None:
    response = client.post(f"{colours}/search", json=request_body)
    assert 400 <= response.status_code < 500
    found = error(response, response.status_code)
    assert (found["param"] or "").startswith(param)


def test_a_bad_image_in_a_query_is_named(client: TestClient, colours: str) -> None:
    query = [{"text": "red"}, {"image": "bm8gaW1hZ2U="}]
    assert error(client.post(f"{colours}/search", json={"query": query}), 415)["param"] == "query[1].image"


def test_a_filter_with_a_typo_names_the_closest_field(client: TestClient, colours: str) -> None:
    found = error(client.post(f"{colours}/search", json={"text": "red", "filters": {}}), 422, "unknown_field")
    assert "did you mean 'filter'" in found["message"]


def test_neighbours_vote_for_labels(client: TestClient, colours: str) -> None:
    request = {"images": [picture(RED), picture(BLUE)], "ids": ["words"], "field": "colour", "k": 2}
    answer = ok(client.post(f"{colours}/classify", json=request))
    first, second, third = answer["results"]
    assert first["labels"][0]["label"] == "red"
    assert first["labels"][0]["neighbours"] == 2
    assert first["labels"][0]["probability"] == pytest.approx(1)
    assert second["labels"][0]["label"] == "blue"
    assert second["labels"][0]["probability"] > 0.99
    assert third["labels"][0]["label"] == "red"
    assert "words" not in [neighbour["id"] for neighbour in third["nearest"]]


def test_curl_can_ask_for_a_vote(client: TestClient, colours: str) -> None:
    form = {"field": "colour", "k": "1", "filter": '{"n": {"$lt": 4}}'}
    answer = ok(client.post(f"{colours}/classify", files=[upload(GREEN, part="image")], data=form))
    assert answer["results"][0]["labels"] == [{"label": "green", "probability": 1.0, "neighbours": 1}]


def test_a_vote_without_voters_has_no_labels(client: TestClient, colours: str) -> None:
    request = {"images": [picture(RED)], "field": "species"}
    assert ok(client.post(f"{colours}/classify", json=request))["results"][0]["labels"] == []


def test_bad_images_fail_alone_in_a_vote(client: TestClient, colours: str) -> None:
    request = {"images": ["bm8gaW1hZ2U=", picture(RED)], "ids": ["unknown", "red.png"], "field": "colour"}
    results = ok(client.post(f"{colours}/classify", json=request))["results"]
    assert [("error" in result) for result in results] == [True, False, True, False]
    assert results[0]["error"]["param"] == "images[0]"
    assert results[2]["error"]["param"] == "ids[0]"


def test_duplicates_are_grouped(client: TestClient, colours: str) -> None:
    twins = [{"id": "red again.png", "image": picture((254, 0, 0))}, {"id": "blue again", "text": "blue"}]
    ok(client.post(f"{colours}/items", json={"items": twins}))
    answer = ok(client.get(f"{colours}/duplicates", params={"threshold": 0.99}))
    assert sorted(sorted(group["ids"]) for group in answer["groups"]) == [
        ["blue again", "blue.png"],
        ["red again.png", "red.png"],
    ]
    assert (answer["total_groups"], answer["total_items"], answer["scanned"]) == (2, 4, 6)
    assert error(client.get(f"{colours}/duplicates", params={"threshold": 2}), 422)["param"] == "threshold"


def test_an_empty_collection_has_no_hits(client: TestClient, empty: str) -> None:
    assert search(client, empty, image=picture(BLUE)) == []
