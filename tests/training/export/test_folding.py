"""Weights that a graph transposed in every run are stored so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

import onnx  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from training.export.folding import fold_transposes  # noqa: E402

X = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)


def two_layers() -> onnx.ModelProto:
    """One weight is only used transposed, twice; the other as it is as well."""
    random = np.random.default_rng(1)
    nodes = [
        helper.make_node("Transpose", ["only"], ["only.t"], perm=[1, 0]),
        helper.make_node("Transpose", ["only"], ["again.t"], perm=[1, 0]),
        helper.make_node("Transpose", ["tied"], ["tied.t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "only.t"], ["hidden"]),
        helper.make_node("MatMul", ["x", "again.t"], ["same"]),
        helper.make_node("Add", ["hidden", "same"], ["sum"]),
        helper.make_node("MatMul", ["sum", "tied"], ["wide"]),
        helper.make_node("MatMul", ["wide", "tied.t"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [
            numpy_helper.from_array(random.normal(size=(4, 6)).astype(np.float32), "only"),
            numpy_helper.from_array(random.normal(size=(4, 5)).astype(np.float32), "tied"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(path: Path) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"x": X})[0]
    return found


@pytest.mark.parametrize("external", [False, True], ids=["inside", "in a file beside"])
def test_the_graph_computes_the_same_without_the_transposes(external: bool, tmp_path: Path) -> None:
    path = tmp_path / "two.onnx"
    onnx.save(two_layers(), path, save_as_external_data=external, location="two.data", size_threshold=0)
    expected = run(path)
    model = onnx.load(path, load_external_data=not external)
    fold_transposes(model, tmp_path)
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)
    np.testing.assert_allclose(run(path), expected, rtol=1e-6)
    assert [node.op_type for node in model.graph.node].count("Transpose") == 1
    assert {one.name: list(one.dims) for one in model.graph.initializer} == {"only": [6, 4], "tied": [4, 5]}
