"""ONNX graphs whose weights are stored in few bits and computed with in float32.

Each stored weight is followed by the nodes that bring it back: a Cast, and for 8 bits a Mul with the scales.
ONNX Runtime folds those nodes away while it loads, so a run costs what it costs in float32, on every
processor, and a vector does not depend on what else is in its batch. (Integer arithmetic instead would take
one scale for a whole batch of activations, and saturates on processors without VNNI when its weights use all
8 bits.)
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor, nn

__all__ = ["Store", "export_graph", "store_weights"]

Store = Literal["float16", "int8 rows", "int8 blocks"]
"""int8 rows has one scale for each row (an embedding table); int8 blocks one for every `BLOCK` numbers of a
column (a matrix that inputs are multiplied with from the left). One for a whole column is not enough for
MiniLM: a few of its channels are far larger than the others; the empty text fell to a cosine of .996."""

BLOCK = 64

OPSET = 20  # the first with Gelu; ONNX Runtime 1.17 and later
SMALL = 4096
"""Weights with fewer numbers stay float32: their bytes do not count, their precision does."""


def export_graph(
    network: nn.Module,
    example: Tensor,
    name: str,
    axes: Mapping[int, tuple[str, int]],
    shape: tuple[int | str, ...],
) -> onnx.ModelProto:
    """`network` as an ONNX graph: one input `name`, one output `embedding`, no traces of this machine.

    Args:
        network: Takes one tensor, returns one tensor [batch, dim].
        example: An input; its sizes along `axes` must be above 1, since 1 would be taken for a constant.
        name: The input's name.
        axes: Which dimensions of the input are free: their names and largest sizes.
        shape: The output's shape, for the reader of the graph.
    """
    free = {index: torch.export.Dim(axis, min=1, max=longest) for index, (axis, longest) in axes.items()}
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network.eval(),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[name],
            output_names=["unit"],  # "embedding" is what the exporter itself calls a lookup's result
            dynamic_shapes=(free,),
            optimize=True,
            verbose=False,
        )
    if program is None:  # only when it writes to a file itself
        raise RuntimeError("torch.onnx.export returned no program")
    return _anonymous(program.model_proto, shape)


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


def _anonymous(model: onnx.ModelProto, shape: tuple[int | str, ...]) -> onnx.ModelProto:
    """Drops what the exporter notes about its own run: stack traces with file names, scopes, shapes."""
    graph = model.graph
    graph.name, graph.doc_string = "embedserve", ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for node in graph.node:
        node.doc_string, node.name = "", ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    # Values are numbered through: the exporter's names are long, and its own choice from version to version.
    names = {graph.output[0].name: "embedding"}
    for weight in graph.initializer:
        if weight.name == "embedding":  # a lookup of constants, folded
            names[weight.name] = weight.name = "embedding.folded"
    for node in graph.node:
        for value in node.output:
            names.setdefault(value, f"x{len(names)}")
        node.input[:] = [names.get(value, value) for value in node.input]
        node.output[:] = [names[value] for value in node.output]
    graph.output[0].CopyFrom(helper.make_tensor_value_info("embedding", onnx.TensorProto.FLOAT, shape))
    onnx.checker.check_model(model, full_check=True)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter logs its progress and warns about its own internals; neither is the user's concern."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
