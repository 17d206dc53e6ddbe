"""The page, the documentation and the headers they come with."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from tests.embedserve.api.requests import error, ok


def test_the_page_and_its_files_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    for path in re.findall(r'(?:src|href)="(/page/[^"]+)"', page.text):
        assert client.get(path).status_code == 200, path
    assert client.get("/page/main.js").headers["content-type"].startswith("text/javascript")
    error(client.get("/page/missing.js"), 404)
    error(client.get("/page/..%2fconfig.py"), 404)


def test_pages_run_only_our_own_files(client: TestClient) -> None:
    for path in ("/", "/docs", "/v1/models"):
        headers = client.get(path).headers
        policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_nothing_comes_from_the_internet_or_stands_inline(client: TestClient, path: str) -> None:
    text = client.get(path).text
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', text)
    assert not re.findall(r"<script(?![^>]*\bsrc=)", text)
    assert not re.findall(r"<style|\sstyle=|\son\w+=", text)


def test_the_documentation_works_offline(client: TestClient) -> None:
    text = client.get("/docs").text
    for path in re.findall(r'(?:src|href)="(docs/[^"]+)"', text):
        assert client.get(f"/{path}").status_code == 200, path
    assert "openapi.json" in client.get("/docs/start.js").text


def test_browsers_ask_whether_files_have_changed(client: TestClient) -> None:
    for path in ("/", "/page/main.js"):
        first = client.get(path)
        assert first.headers["cache-control"] == "no-cache"
        again = client.get(path, headers={"If-None-Match": first.headers["etag"]})
        assert again.status_code in (200, 304)
    assert client.head("/").status_code == 200


def test_operations_have_tidy_ids_and_documented_errors(client: TestClient) -> None:
    document = ok(client.get("/openapi.json"))
    operations = [operation for path in document["paths"].values() for method, operation in path.items()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z][A-Za-z]+", name) for name in ids)
    assert all(operation["summary"] for operation in operations)
    for operation in operations:
        for status, answer in operation["responses"].items():
            if status.startswith(("4", "5")):
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}, operation["operationId"]


def test_serving_never_imports_torch() -> None:
    code = (
        "import embedserve.app, sys; assert 'torch' not in sys.modules; assert 'training' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
