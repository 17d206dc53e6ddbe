"""Who may call what: keys and their scopes, other hosts' names, other origins' pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.embedserve.api.requests import error, ok, picture, serving
from tests.embedserve.colours import RED

OPEN = ["/", "/page/index.html", "/healthz", "/readyz", "/docs", "/openapi.json", "/docs/start.js"]
READS = [
    ("GET", "/v1/models", None),
    ("GET", "/v1/collections", None),
    ("GET", "/v1/collections/c", None),
    ("GET", "/v1/collections/c/items", None),
    ("GET", "/v1/labelsets", None),
    ("GET", "/metrics", None),
    ("POST", "/v1/embeddings", {"input": "red"}),
    ("POST", "/v1/embed", {"inputs": ["red"]}),
    ("POST", "/v1/classify", {"images": [picture(RED)], "labels": ["red", "blue"]}),
    ("POST", "/v1/collections/c/search", {"text": "red"}),
    ("POST", "/v1/collections/c/classify", {"images": [picture(RED)], "field": "x"}),
]
WRITES = [
    ("PUT", "/v1/collections/c", {}),
    ("POST", "/v1/collections/c/items", {"items": [{"id": "a", "text": "red"}]}),
    ("DELETE", "/v1/collections/c/items/a", None),
    ("DELETE", "/v1/collections/c/items?id=a", None),
    ("PUT", "/v1/labelsets/l", {"labels": ["red", "blue"]}),
    ("DELETE", "/v1/labelsets/l", None),
    ("DELETE", "/v1/collections/c", None),
]


def key(word: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {word}"}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[TestClient]:
    keys = ("reader:read", "writer:write", "plain")
    with serving(tmp_path_factory.mktemp("data"), tiny_folder, host="0.0.0.0", api_key=keys) as client:
        ok(client.put("/v1/collections/c", headers=key("plain")), 201)
        yield client


@pytest.mark.parametrize("path", OPEN)
def test_what_holds_no_data_needs_no_key(guarded: TestClient, path: str) -> None:
    assert guarded.get(path).status_code == 200


@pytest.mark.parametrize(("method", "path", "body"), [*READS, *WRITES])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        key("wrong"),
        key("reader:read"),
        key(""),
        {"Authorization": "reader"},
        {"Authorization": "Basic reader"},
    ],
)
def test_everything_else_needs_a_known_key(
    guarded: TestClient, method: str, path: str, body: dict | None, headers: dict
) -> None:
    response = guarded.request(method, path, json=body, headers=headers)
    error(response, 401)
    assert response.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path", "body"), READS)
@pytest.mark.parametrize("word", ["reader", "writer", "plain"])
def test_every_key_may_read(
    guarded: TestClient, method: str, path: str, body: dict | None, word: str
) -> None:
    ok_or_text = guarded.request(method, path, json=body, headers=key(word))
    assert ok_or_text.status_code == 200, ok_or_text.text


@pytest.mark.parametrize(("method", "path", "body"), WRITES)
def test_a_read_key_may_not_write(guarded: TestClient, method: str, path: str, body: dict | None) -> None:
    found = error(guarded.request(method, path, json=body, headers=key("reader")), 403, "write_scope_needed")
    assert "'write'" in found["message"]


@pytest.mark.parametrize("word", ["writer", "plain"])
def test_a_write_key_may_write(guarded: TestClient, word: str) -> None:
    for method, path, body in WRITES:
        response = guarded.request(method, path, json=body, headers=key(word))
        assert response.status_code in (200, 201, 204, 404), response.text
    ok(guarded.put("/v1/collections/c", headers=key(word)), 201)


def test_unknown_paths_and_methods_are_guarded_too(guarded: TestClient) -> None:
    error(guarded.get("/v1/secret"), 401)
    error(guarded.patch("/v1/collections/c"), 401)
    error(guarded.post("/v1/collections/c/searching", headers=key("reader")), 403)


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "app.localhost"]
)
def test_this_machine_may_be_called_by_its_names(client: TestClient, host: str) -> None:
    ok(client.get("/v1/models", headers={"Host": host}))


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "::2"]
)
def test_without_keys_another_host_name_is_refused(client: TestClient, host: str) -> None:
    for path in ("/v1/models", "/", "/healthz"):
        error(client.get(path, headers={"Host": host}), 403, "host_not_allowed")


def test_behind_a_proxy_no_auth_allows_any_host_name(tmp_path: Path, tiny_folder: Path) -> None:
    with serving(tmp_path, tiny_folder, no_auth=True) as client:
        ok(client.get("/v1/models", headers={"Host": "images.example"}))


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_pages_of_other_origins_may_not_call_a_server_without_keys(client: TestClient, headers: dict) -> None:
    for method, path, body in (("PUT", "/v1/collections/x", {}), ("POST", "/v1/embed", {"inputs": ["red"]})):
        error(client.request(method, path, json=body, headers=headers), 403, "origin_not_allowed")


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {}],
)
def test_our_own_page_and_programs_may(client: TestClient, headers: dict) -> None:
    ok(client.post("/v1/embed", json={"inputs": ["red"]}, headers=headers))


def test_allowed_origins_may_call_and_read(tmp_path: Path, tiny_folder: Path) -> None:
    shop = {"Origin": "http://shop.example", "Sec-Fetch-Site": "cross-site"}
    with serving(tmp_path, tiny_folder, cors_origin=("http://shop.example",)) as client:
        response = client.post("/v1/embed", json={"inputs": ["red"]}, headers=shop)
        ok(response)
        assert response.headers["access-control-allow-origin"] == "http://shop.example"
        asked = {"Access-Control-Request-Method": "PUT", "Access-Control-Request-Headers": "content-type"}
        preflight = client.options("/v1/collections/x", headers={**shop, **asked})
        assert preflight.status_code == 200
        assert "PUT" in preflight.headers["access-control-allow-methods"]
        evil = {"Origin": "http://evil.example"}
        refused = client.post("/v1/embed", json={"inputs": ["red"]}, headers=evil)
        error(refused, 403, "origin_not_allowed")
        assert "access-control-allow-origin" not in refused.headers


def test_no_origin_may_read_unless_allowed(client: TestClient) -> None:
    response = client.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in response.headers
