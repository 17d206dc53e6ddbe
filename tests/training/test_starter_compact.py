"""Weights stored in few bits give back what they should."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed (extra 'train')")

import onnxruntime as ort  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from training.starter.compact import store_weights  # noqa: E402


def lookup_then_multiply() -> onnx.ModelProto:
    generator = np.random.default_rng(0)
    table = numpy_helper.from_array((generator.normal(size=(100, 128)) * 0.1).astype(np.float32), "table")
    matrix = numpy_helper.from_array(generator.normal(size=(128, 80)).astype(np.float32), "matrix")
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["out"]),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 80])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [table, matrix])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": np.arange(100)})[0]


def rounded(values: np.ndarray, block: int) -> np.ndarray:
    """Each run of `block` numbers in a row to 255 steps of its own, one run at a time."""
    result = values.copy()
    for row in result:
        for start in range(0, len(row), block):
            numbers = row[start : start + block]
            step = np.abs(numbers).max() / 127
            numbers[:] = np.round(numbers / step) * step
    return result


@pytest.mark.parametrize(
    ("stores", "table_as", "matrix_as"),
    [
        ({}, lambda w: w, lambda w: w),
        ({"table": "int8 rows"}, lambda w: rounded(w, 128), lambda w: w),
        ({"matrix": "int8 blocks"}, lambda w: w, lambda w: rounded(w.T, 64).T),
        (
            {"table": "float16", "matrix": "int8 rows"},
            lambda w: w.astype(np.float16),
            lambda w: rounded(w, 80),
        ),
    ],
)
def test_a_graph_computes_with_the_rounded_weights(
    stores: dict[str, str],
    table_as: Callable[[np.ndarray], np.ndarray],
    matrix_as: Callable[[np.ndarray], np.ndarray],
) -> None:
    model = lookup_then_multiply()
    table, matrix = (numpy_helper.to_array(one).astype(np.float64) for one in model.graph.initializer)
    expected = table_as(table).astype(np.float64) @ matrix_as(matrix)
    np.testing.assert_allclose(run(store_weights(model, stores, None)), expected, atol=1e-5)


def test_eight_bits_take_a_quarter_of_the_room() -> None:
    model = lookup_then_multiply()
    small = store_weights(model, {"table": "int8 rows"}, "int8 blocks")
    assert small.ByteSize() < 0.35 * model.ByteSize()
    assert model.graph.initializer[0].data_type == TensorProto.FLOAT  # the model given stays as it was


def test_a_weight_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeyError, match="no such weights"):
        store_weights(lookup_then_multiply(), {"tabel": "int8 rows"}, None)


def test_a_matrix_that_cannot_be_cut_into_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 64"):
        store_weights(lookup_then_multiply(), {"table": "int8 blocks"}, None)
