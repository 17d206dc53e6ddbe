"""Weights that a graph transposes in every run are stored transposed instead.

torch's exporter does so up to a size. What is left costs ONNX Runtime time and memory on loading, and hides
from quantization that the layer has constant weights at all.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

__all__ = ["fold_transposes"]


def fold_transposes(model: onnx.ModelProto, folder: Path | None = None) -> None:
    """Changes `model`, and the file with its external weights, in place.

    A matrix that is used as it is as well, as tied embeddings are, stays with its Transpose.

    Args:
        model: A graph; its weights inside, or in a file that it names.
        folder: Where that file lies.
    """
    graph = model.graph
    weights = {one.name: one for one in graph.initializer if len(one.dims) == 2}
    uses = Counter(name for node in graph.node for name in node.input)
    found = [node for node in graph.node if _is_transpose(node) and node.input[0] in weights]
    alone = {name for name, count in Counter(node.input[0] for node in found).items() if count == uses[name]}
    folded = [node for node in found if node.input[0] in alone]
    for name in alone:
        _transpose(weights[name], folder)
    renamed = {node.output[0]: node.input[0] for node in folded}
    for node in folded:
        graph.node.remove(node)
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _is_transpose(node: onnx.NodeProto) -> bool:
    if node.op_type != "Transpose":
        return False
    order = [list(one.ints) for one in node.attribute if one.name == "perm"]
    return order in ([], [[1, 0]])


def _transpose(weight: onnx.TensorProto, folder: Path | None) -> None:
    rows, columns = weight.dims
    if weight.data_location == onnx.TensorProto.EXTERNAL:
        if folder is None:
            raise ValueError(f"'{weight.name}' lies in a file; say in which folder.")
        about = {one.key: one.value for one in weight.external_data}
        kind = onnx.helper.tensor_dtype_to_np_dtype(weight.data_type)
        stored = np.memmap(
            folder / about["location"], kind, "r+", int(about.get("offset", 0)), (rows * columns,)
        )
        stored[:] = stored.reshape(rows, columns).T.ravel()
        stored.flush()
        weight.dims[:] = [columns, rows]
    else:
        turned = np.ascontiguousarray(numpy_helper.to_array(weight).T)
        weight.CopyFrom(numpy_helper.from_array(turned, weight.name))
