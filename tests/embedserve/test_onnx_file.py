"""Outputs are taken off a file's bytes as the library `onnx` would do it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedserve.config import Limits
from embedserve.encoder import Encoder
from embedserve.errors import BundleError
from embedserve.onnx_file import declared_outputs, without_outputs
from tests.embedserve.colours import GREEN, RED, axis, png
from tests.embedserve.test_external_weights import with_weights_beside
from tests.embedserve.test_heat import reseal
from tests.tiny_bundle import DIM, OUTPUTS, write_tiny_bundle

FLOAT = TensorProto.FLOAT


def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, shape)


def branching_model() -> bytes:
    """`kept` goes through a branch that reads `outer` from outside; `gone` has two nodes of its own."""
    then = helper.make_graph(
        [helper.make_node("Neg", ["outer"], ["negative"])], "then", [], [value("negative", 2)]
    )
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["same"])], "else", [], [value("same", 2)])
    nodes = [
        helper.make_node("Abs", ["x"], ["outer"]),
        helper.make_node("Exp", ["x"], ["grown"]),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "zero"], ["is_positive"]),
        helper.make_node("If", ["is_positive"], ["kept"], then_branch=then, else_branch=other),
        helper.make_node("Mul", ["grown", "outer"], ["gone"]),
    ]
    graph = helper.make_graph(
        nodes,
        "branching",
        [value("x", 2)],
        [value("kept", 2), value("gone", 2)],
        [numpy_helper.from_array(np.array(0, np.float32), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def test_outputs_are_read_as_the_library_reads_them(seeing_folder: Path) -> None:
    found = declared_outputs((seeing_folder / "image.onnx").read_bytes())
    session = ort.InferenceSession(str(seeing_folder / "image.onnx"), providers=["CPUExecutionProvider"])
    for ours, theirs in zip(found, session.get_outputs(), strict=True):
        assert (ours.name, ours.type) == (theirs.name, theirs.type)
        assert [size for size in ours.shape if isinstance(size, int)] == [
            size for size in theirs.shape if isinstance(size, int)
        ]


def test_what_only_the_output_needs_goes_and_the_rest_stays() -> None:
    before = branching_model()
    after = without_outputs(before, ["gone"])
    assert len(after) == len(before)
    model = onnx.load_from_string(after)
    onnx.checker.check_model(model, full_check=True)
    assert [output.name for output in model.graph.output] == ["kept"]
    assert [node.op_type for node in model.graph.node] == ["Abs", "ReduceSum", "Greater", "If"]
    for x in (np.array([1, 2], np.float32), np.array([-3, 1], np.float32)):
        full, less = (
            ort.InferenceSession(data, providers=["CPUExecutionProvider"]) for data in (before, after)
        )
        np.testing.assert_array_equal(less.run(None, {"x": x})[0], full.run(["kept"], {"x": x})[0])


def test_a_name_that_is_not_there_changes_nothing() -> None:
    model = branching_model()
    assert without_outputs(model, ["other"]) == model


@pytest.mark.parametrize("cut", [1, 7, 100, -1])
def test_a_file_that_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="protobuf"):
        declared_outputs(branching_model()[:cut])


def test_bytes_that_are_no_model_are_refused_by_the_encoder(tmp_path: Path) -> None:
    folder = write_tiny_bundle(tmp_path / "bundle", outputs=OUTPUTS).folder
    (folder / "image.onnx").write_bytes(b"\x0f\xff\xff no model")
    reseal(folder, OUTPUTS)
    with pytest.raises(BundleError, match="is no ONNX file"):
        Encoder.load(folder, threads=1)


def test_weights_beside_the_file_come_along(tmp_path: Path) -> None:
    """A graph with outputs is loaded from bytes, so ONNX Runtime has to be told where its weights are."""
    folder = write_tiny_bundle(tmp_path / "bundle", outputs=OUTPUTS).folder
    with_weights_beside(folder / "image.onnx", "image.onnx.data")
    assert (folder / "image.onnx.data").stat().st_size == 4 * DIM * DIM
    reseal(folder, OUTPUTS)
    encoder = Encoder.load(folder, threads=1)
    pixels = [encoder.read_image(png(colour), Limits()) for colour in (RED, GREEN)]
    np.testing.assert_allclose(encoder.embed_images(pixels), [axis("red"), axis("green")], atol=1e-6)
    looks = encoder.look(pixels, ["patches"])
    np.testing.assert_allclose(looks.outputs["patches"][1], [axis("green")] * 4, atol=1e-6)
