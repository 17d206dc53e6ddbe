"""int8 with a scale for each row: what it computes, and that no other input changes a vector."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from training.export.precision.rows import write_rows

WIDTH, OUT = 48, 20


def layer(kind: str, weight: NDArray[np.float32], bias: NDArray[np.float32]) -> onnx.ModelProto:
    """x → x W + b, as MatMul and Add for [batch, rows, width], as Gemm for [rows, width]."""
    if kind == "MatMul":
        nodes = [
            helper.make_node("MatMul", ["x", "weight"], ["product"], "layer"),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ]
        stored, shape = weight, ["batch", "rows"]
    else:
        nodes = [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"], "layer", transB=1)]
        stored, shape = weight.T.copy(), ["rows"]
    graph = helper.make_graph(
        nodes,
        kind,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [*shape, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, OUT])],
        [numpy_helper.from_array(stored, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return found


def literal(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row by row and column by column, in whole numbers."""
    out = np.zeros((len(x), OUT))
    for i, row in enumerate(x.astype(np.float64)):
        most = max(abs(row).max(), 1e-12)
        for j, column in enumerate(weight.T.astype(np.float64)):
            largest = abs(column).max()
            out[i, j] = np.round(row * 127 / most) @ np.round(column * 63 / largest)
            out[i, j] *= most * largest / 127 / 63
    return out


@pytest.mark.parametrize("kind", ["MatMul", "Gemm"])
def test_a_layer_is_the_literal_one_with_all_optimizations_on(kind: str) -> None:
    # Of each row another size: a kernel that took one scale for all would show.
    random = np.random.default_rng(0)
    x = (random.normal(size=(6, WIDTH)) * 10.0 ** np.arange(-3, 3)[:, None]).astype(np.float32)
    x[4] = 0
    weight = random.normal(size=(WIDTH, OUT)).astype(np.float32)
    bias = random.normal(size=OUT).astype(np.float32)
    model = layer(kind, weight, bias)
    shaped = x.reshape(2, 3, WIDTH) if kind == "MatMul" else x
    exact = run(model, shaped).reshape(6, OUT)
    write_rows(model, ["layer"])
    onnx.checker.check_model(model, full_check=True)
    found = run(model, shaped).reshape(6, OUT)
    expected = literal(x, weight)
    sizes = np.abs(expected).max(axis=1, keepdims=True) + 1e-9
    assert (np.abs(found - bias - expected) / sizes).max() < 2e-3
    assert (np.abs(found - exact) / sizes).max() < 0.05
    kinds = {one.name: one.data_type for one in model.graph.initializer}
    name = "weight" if kind == "MatMul" else "weight.turned"
    assert kinds[f"{name}.int8"] == TensorProto.INT8
    assert "weight" not in kinds


def test_a_row_does_not_depend_on_the_others_to_the_last_bit() -> None:
    random = np.random.default_rng(1)
    x = random.normal(size=(9, 5, WIDTH)).astype(np.float32)
    model = layer("MatMul", random.normal(size=(WIDTH, OUT)).astype(np.float32), np.zeros(OUT, np.float32))
    write_rows(model, ["layer"])
    together = run(model, x)
    x[1:] *= 1000
    np.testing.assert_array_equal(run(model, x)[0], together[0])
    np.testing.assert_array_equal(run(model, x[:1])[0], together[0])


def test_layers_of_one_input_share_what_was_found_of_it() -> None:
    random = np.random.default_rng(2)
    model = layer("MatMul", random.normal(size=(WIDTH, OUT)).astype(np.float32), np.zeros(OUT, np.float32))
    model.graph.node.insert(0, helper.make_node("MatMul", ["x", "weight"], ["other"], "second"))
    model.graph.output.append(
        helper.make_tensor_value_info("other", TensorProto.FLOAT, ["batch", "rows", OUT])
    )
    write_rows(model, ["layer", "second"])
    kinds = [node.op_type for node in model.graph.node]
    assert (kinds.count("QuantizeLinear"), kinds.count("MatMulInteger")) == (1, 2)
    assert sum(one.name == "weight.int8" for one in model.graph.initializer) == 1
