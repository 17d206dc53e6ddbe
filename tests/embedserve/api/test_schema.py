"""schemathesis calls every operation of /openapi.json with what the document allows and what it does not.

EMBEDSERVE_FUZZ_EXAMPLES raises the number of examples for each operation (15).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from embedserve.app import create_app
from embedserve.config import ServeConfig
from tests.embedserve.api.requests import listening, ok, picture
from tests.embedserve.colours import BLUE, RED

EXAMPLES = int(os.environ.get("EMBEDSERVE_FUZZ_EXAMPLES", "15"))

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    unsupported_method,
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[str]:
    data = tmp_path_factory.mktemp("data")
    with (
        listening(data, tiny_folder, url_inputs=False) as url,
        httpx2.Client(base_url=url) as client,
    ):
        ok(client.put("/v1/collections/photos"), 201)
        items = [
            {"id": "holiday/beach.jpg", "image": picture(RED), "metadata": {"species": "cat"}},
            {"id": "blue", "image": picture(BLUE)},
        ]
        ok(client.post("/v1/collections/photos/items", json={"items": items}))
        assert ok(client.get("/openapi.json")) == schema.raw_schema
        yield url
        ok(client.get("/readyz"))


schema = schemathesis.openapi.from_dict(create_app(ServeConfig()).openapi())


@schemathesis.serializer("application/x-ndjson")
def lines(context: object, value: object) -> bytes:
    return value.encode("utf-8", "replace") if isinstance(value, str) else json.dumps(value).encode()


@schema.parametrize()
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_operation_keeps_what_the_document_says(case: schemathesis.Case, url: str) -> None:
    case.call_and_validate(base_url=url, checks=CHECKS)
