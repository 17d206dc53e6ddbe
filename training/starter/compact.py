"""ONNX graphs whose weights are stored in few bits and computed with in float32.

Each stored weight is followed by the nodes that bring it back: a Cast, and for 8 bits a Mul with the scales.
ONNX Runtime folds those nodes away while it loads, so a run costs what it costs in float32, on every
processor, and a vector does not depend on what else is in its batch. (Integer arithmetic instead would take
one scale for a whole batch of activations, and saturates on processors without VNNI when its weights use all
8 bits.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

__all__ = ["Store", "store_weights"]

Store = Literal["float16", "int8 rows", "int8 blocks"]
"""int8 rows has one scale for each row (an embedding table); int8 blocks one for every `BLOCK` numbers of a
column (a matrix that inputs are multiplied with from the left). One for a whole column is not enough for
MiniLM: a few of its channels are far larger than the others; the empty text fell to a cosine of .996."""

BLOCK = 64

SMALL = 4096
"""Weights with fewer numbers stay float32: their bytes do not count, their precision does."""


def store_weights(
    model: onnx.ModelProto, stores: Mapping[str, Store], default: Store | None
) -> onnx.ModelProto:
    """A copy of `model` with its large float32 weights stored otherwise.

    A table of which rows are gathered stays as it is stored: the rows are brought back after the gathering,
    which saves the memory of the whole table.

    Args:
        model: As from `export_graph`.
        stores: Weight name → how to store it. Every name has to be in the graph.
        default: How to store large weights that are not named; None leaves them.

    Raises:
        KeyError: A name in `stores` is not a weight of the graph.
        ValueError: A weight cannot be cut into blocks.
    """
    unknown = set(stores) - {weight.name for weight in model.graph.initializer}
    if unknown:
        raise KeyError(f"no such weights: {sorted(unknown)}")
    compact = onnx.ModelProto()
    compact.CopyFrom(model)
    graph = compact.graph
    del graph.initializer[:], graph.node[:]
    nodes = list(model.graph.node)
    for weight in model.graph.initializer:
        store = stores.get(weight.name, default)
        values = numpy_helper.to_array(weight)
        if store is None or values.dtype != np.float32 or values.size < SMALL:
            graph.initializer.append(weight)
            continue
        parts = _split(weight.name, values, store)
        graph.initializer.extend(parts)
        names = [part.name for part in parts]
        readers = [node for node in nodes if weight.name in node.input]
        if store == "int8 rows" and all(node.op_type == "Gather" for node in readers):
            at = nodes.index(readers[0])
            for node in readers:
                nodes.remove(node)
                nodes[at:at] = _gather_then_restore(node, names)
        else:
            graph.node.extend(_restore(weight.name, names, blocks=store == "int8 blocks"))
    graph.node.extend(nodes)
    return compact


def _split(name: str, values: NDArray[np.float32], store: Store) -> list[onnx.TensorProto]:
    """The numbers in few bits, and for int8 their scales: [rows, 1] or [blocks, 1, columns]."""
    if store == "float16":
        return [numpy_helper.from_array(values.astype(np.float16), f"{name}.half")]
    if store == "int8 blocks":
        if values.ndim != 2 or values.shape[0] % BLOCK:
            raise ValueError(
                f"'{name}' is {list(values.shape)}; int8 blocks need rows in multiples of {BLOCK}"
            )
        values = values.reshape(-1, BLOCK, values.shape[1])
    scale = np.maximum(np.abs(values).max(axis=1, keepdims=True) / 127, 1e-12).astype(np.float32)
    whole = np.round(values / scale).astype(np.int8)
    return [numpy_helper.from_array(whole, f"{name}.int8"), numpy_helper.from_array(scale, f"{name}.scale")]


def _restore(name: str, stored: Sequence[str], *, blocks: bool = False) -> list[onnx.NodeProto]:
    """Nodes that make the float32 value `name` of what is stored."""
    if len(stored) == 1:
        return [helper.make_node("Cast", stored, [name], to=onnx.TensorProto.FLOAT)]
    product = f"{name}.blocks" if blocks else name
    nodes = [
        helper.make_node("Cast", [stored[0]], [f"{name}.whole"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}.whole", stored[1]], [product]),
    ]
    return [*nodes, helper.make_node("Flatten", [product], [name], axis=2)] if blocks else nodes


def _gather_then_restore(gather: onnx.NodeProto, stored: Sequence[str]) -> list[onnx.NodeProto]:
    result = gather.output[0]
    names = [f"{result}.{part}" for part in ("int8", "scale")]
    gathers = [
        helper.make_node("Gather", [table, gather.input[1]], [name], axis=0)
        for table, name in zip(stored, names, strict=True)
    ]
    return [*gathers, *_restore(result, names)]
