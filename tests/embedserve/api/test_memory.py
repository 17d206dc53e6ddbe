"""Used-up memory fails the request that wanted it; the server neither hangs nor dies (infinity#544)."""

from __future__ import annotations

from pathlib import Path

from tests.embedserve.api.requests import error, ok, serving
from tests.embedserve.hungry import write_hungry_bundle

LONG = "red " * 16


def test_a_text_too_large_for_the_memory_is_a_503_and_the_server_goes_on(tmp_path: Path) -> None:
    bundle = write_hungry_bundle(tmp_path / "bundle", most_tokens=8)
    with serving(tmp_path / "data", bundle.folder) as client:
        for _ in range(3):
            answer = client.post("/v1/embeddings", json={"input": [LONG]})
            assert error(answer, 503)["code"] == "out_of_memory"
            assert answer.headers["Retry-After"]
            assert ok(client.post("/v1/embeddings", json={"input": "red green"}))
        ok(client.get("/readyz"))


def test_texts_that_fit_alone_get_their_vectors_from_a_batch_that_does_not(tmp_path: Path) -> None:
    bundle = write_hungry_bundle(tmp_path / "bundle", most_tokens=8)
    with serving(tmp_path / "data", bundle.folder) as client:
        answer = ok(client.post("/v1/embed", json={"inputs": ["red", LONG, *["green blue"] * 30]}))
        assert [index for index, one in enumerate(answer["results"]) if "error" in one] == [1]
        assert answer["results"][1]["error"]["code"] == "out_of_memory"
