"""Bundles whose weights lie beside the graph, as those above 2 GB do: loaded, hashed, served.

`benchmarks/large_bundle.py` does the same with more than 2 GB.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from embedserve.bundle import open_bundle, seal
from embedserve.check import check_bundle
from embedserve.cli import main
from embedserve.errors import BundleError
from tests.embedserve.api.requests import ok, picture, serving
from tests.embedserve.colours import BLUE, RED
from tests.tiny_bundle import DIM, write_tiny_bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, both of whose towers end with a matrix that lies beside them."""
    folder = write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "beside", name="beside").folder
    for name in ("image.onnx", "text.onnx"):
        with_weights_beside(folder / name, f"weights/{name}.data")
    return seal(folder, open_bundle(folder, verify=False).description).folder


def with_weights_beside(path: Path, location: str) -> None:
    """Turns the vectors by a matrix, the identity, whose numbers lie in a file of their own."""
    model = onnx.load(path)
    (last,) = [node for node in model.graph.node if node.output == ["embedding"]]
    last.output[0] = "unturned"
    model.graph.node.append(helper.make_node("MatMul", ["unturned", "matrix"], ["embedding"]))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(DIM, dtype=np.float32), "matrix"))
    (path.parent / location).parent.mkdir(exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=4 * DIM * DIM)


def test_the_weights_are_part_of_the_bundle(folder: Path) -> None:
    files = open_bundle(folder).description.files
    assert {"weights/image.onnx.data", "weights/text.onnx.data"} <= set(files)


def test_a_bundle_with_weights_beside_it_is_proven(folder: Path) -> None:
    report = check_bundle(folder, seconds=0, threads=1, device="cpu")
    assert report.files == 6
    assert report.bytes > 2 * 4 * DIM * DIM


def test_altered_or_missing_weights_are_named(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    weights = copy / "weights" / "image.onnx.data"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(BundleError, match=r"image\.onnx\.data' is not the file described"):
        check_bundle(copy, seconds=0, device="cpu")
    weights.unlink()
    with pytest.raises(BundleError, match=r"'weights/image\.onnx\.data' cannot be read"):
        check_bundle(copy, seconds=0, device="cpu")


def test_a_collection_works_with_it(folder: Path, tmp_path: Path) -> None:
    with serving(tmp_path, folder) as client:
        ok(client.put("/v1/collections/a"), 201)
        items = [{"id": "red", "image": picture(RED)}, {"id": "blue", "image": picture(BLUE)}]
        ok(client.post("/v1/collections/a/items", json={"items": items}))
        for word in ("red", "blue"):
            hits = ok(client.post("/v1/collections/a/search", json={"text": word}))["hits"]
            assert hits[0]["id"] == word
            assert hits[0]["score"] == pytest.approx(1, abs=1e-3)


def test_the_verbs_work_with_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (8, 8), name).save(photos / f"{name}.png")
    where = ["--encoder", str(folder), "--data", str(tmp_path / "data"), "--json"]
    assert main(["index", str(photos), "--collection", "a", *where]) == 0
    capsys.readouterr()
    assert main(["search", "blue", "--collection", "a", *where]) == 0
    assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == "blue.png"
    assert main(["embed", str(photos / "red.png"), *where]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["embedding"][0] == pytest.approx(1)
