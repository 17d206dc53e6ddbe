"""int8 with a scale for each row of what goes into a layer: a vector that no other input can change.

A linear layer sees rows, one for each token or patch. Each is brought to 8 bits by its own largest value,
found in the run, so its result depends on nothing else in the batch, padding included, to the last bit.

    x [..., k] → q = round(127 x / m) + 128, m = max |x| over the row → int32 q W → float32 · m · scale / 127
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["write_rows"]

LARGEST_WEIGHT = 63
"""7 bits: with 8, processors without VNNI add up pairs of products that no longer fit 16 bits."""
MIDDLE, LARGEST_INPUT = 128, 127

_CONSTANTS = {
    "rows.last_axis": np.array([-1], np.int64),
    "rows.least": np.float32(1e-12),  # of a row of zeros
    "rows.largest": np.float32(LARGEST_INPUT),
    "rows.one": np.float32(1),
    "rows.middle": np.uint8(MIDDLE),
}


def write_rows(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Changes the layers `names` of a graph, its weights in memory, in place.

    Args:
        names: Of MatMul and Gemm nodes whose second input is a matrix of weights.
    """
    graph = model.graph
    weights = {one.name: one for one in graph.initializer}
    wanted, nodes = set(names), list(graph.node)
    added = {name: numpy_helper.from_array(np.asarray(value), name) for name, value in _CONSTANTS.items()}
    quantized: set[str] = set()
    del graph.node[:]
    for node in nodes:
        if node.name not in wanted:
            graph.node.append(node)
            continue
        rows, weight = node.input[0], node.input[1]
        turned = node.op_type == "Gemm" and _attribute(node, "transB", 0) == 1
        name = f"{weight}.turned" if turned else weight
        if f"{name}.int8" not in added:
            matrix, scale = _quantized(numpy_helper.to_array(weights[weight]), turned)
            added[f"{name}.int8"] = numpy_helper.from_array(matrix, f"{name}.int8")
            added[f"{name}.scale"] = numpy_helper.from_array(scale, f"{name}.scale")
        if rows not in quantized:  # a query, key and value of one input share it
            quantized.add(rows)
            graph.node.extend(_quantize(rows))
        graph.node.extend(_multiply(node, name))
    used = {name for node in graph.node for name in node.input}
    kept = [one for one in (*graph.initializer, *added.values()) if one.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _quantized(weight: NDArray[np.float32], turned: bool) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """A matrix as int8 [k, n] and what a column's integers are to be multiplied by, float32 [n]."""
    matrix = weight.T if turned else weight
    largest = np.maximum(np.abs(matrix).max(axis=0), 1e-12)
    integers = np.round(matrix * (LARGEST_WEIGHT / largest)).astype(np.int8)
    return np.ascontiguousarray(integers), (largest / LARGEST_WEIGHT / LARGEST_INPUT).astype(np.float32)


def _quantize(rows: str) -> list[onnx.NodeProto]:
    absolute, most, largest, factor, scaled = (
        f"{rows}.{what}" for what in ("absolute", "most", "largest", "factor", "scaled")
    )
    return [
        helper.make_node("Abs", [rows], [absolute]),
        helper.make_node("ReduceMax", [absolute, "rows.last_axis"], [most], keepdims=1),
        helper.make_node("Max", [most, "rows.least"], [largest]),
        helper.make_node("Div", ["rows.largest", largest], [factor]),
        helper.make_node("Mul", [rows, factor], [scaled]),
        helper.make_node("QuantizeLinear", [scaled, "rows.one", "rows.middle"], [f"{rows}.int8"]),
    ]


def _multiply(node: onnx.NodeProto, weight: str) -> list[onnx.NodeProto]:
    rows, out = node.input[0], node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    product = f"{out}.product" if bias else out
    # By one scale after the other: ONNX Runtime (1.31.1) fuses a multiplication by their product into a
    # kernel that takes the first row's scale for all.
    nodes = [
        helper.make_node(
            "MatMulInteger", [f"{rows}.int8", f"{weight}.int8", "rows.middle"], [f"{out}.int32"], node.name
        ),
        helper.make_node("Cast", [f"{out}.int32"], [f"{out}.cast"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{out}.cast", f"{weight}.scale"], [f"{out}.scaled"]),
        helper.make_node("Mul", [f"{out}.scaled", f"{rows}.largest"], [product]),
    ]
    return [*nodes, helper.make_node("Add", [product, bias], [out])] if bias else nodes


def _attribute(node: onnx.NodeProto, name: str, default: float) -> float:
    return next((helper.get_attribute_value(one) for one in node.attribute if one.name == name), default)
