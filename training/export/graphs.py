"""PyTorch → ONNX: one input, named outputs, free batch and length, nothing of the machine that made it."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from embedserve.errors import EmbedServeError
from training.export.folding import fold_transposes

__all__ = ["LARGEST_FILE", "OPSET", "export_graph", "save", "weight_bytes", "write_graph"]

OPSET = 20
"""The first with Gelu; ONNX Runtime 1.17 and later."""

LARGEST_FILE = 1_800_000_000
"""Bytes of weights up to which they lie inside the ONNX file: protobuf ends at 2 GB, and the graph itself
needs room as well. Above it they lie beside, in a file of the same name with `.data` behind it."""

Shape = Sequence[int | str]


def export_graph(
    network: nn.Module,
    example: Tensor,
    name: str,
    axes: Mapping[int, tuple[str, int]],
    outputs: Mapping[str, Shape],
) -> onnx.ModelProto:
    """`network` as an ONNX graph in memory, without traces of this machine.

    Args:
        network: Takes one tensor; returns one tensor, or a tuple of as many as there are `outputs`.
        example: An input; its sizes along `axes` must be above 1, since 1 would be taken for a constant.
        name: The input's name.
        axes: Which dimensions of the input are free: their names and largest sizes.
        outputs: The outputs' names and shapes, in order.

    Raises:
        EmbedServeError: torch cannot express the network as a graph.
    """
    model: onnx.ModelProto = _program(network, example, name, axes, len(outputs)).model_proto
    fold_transposes(model)
    _anonymize(model, outputs)
    onnx.checker.check_model(model, full_check=True)
    return model


def write_graph(
    path: Path,
    network: nn.Module,
    example: Tensor,
    *,
    name: str,
    axes: Mapping[int, tuple[str, int]],
    outputs: Mapping[str, Shape],
    largest: int = LARGEST_FILE,
) -> None:
    """Writes what `export_graph` gives; weights of more than `largest` bytes go to a file beside `path`.

    Raises: as `export_graph`.
    """
    if weight_bytes(network) <= largest:
        onnx.save(export_graph(network, example, name, axes, outputs), path)
        return
    # Through the disk: neither protobuf nor memory would hold the weights a second and third time.
    _program(network, example, name, axes, len(outputs)).save(path, external_data=True)
    model = onnx.load(path, load_external_data=False)
    fold_transposes(model, path.parent)
    _anonymize(model, outputs)
    onnx.save(model, path)
    onnx.checker.check_model(path)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph with its weights; those of more than `LARGEST_FILE` bytes go to a file beside `path`."""
    large = sum(len(one.raw_data) for one in model.graph.initializer) > LARGEST_FILE
    beside = path.with_name(f"{path.name}.data")
    beside.unlink(missing_ok=True)  # it would be appended to
    if large:
        onnx.save(model, path, save_as_external_data=True, location=beside.name, size_threshold=1024)
    else:
        onnx.save(model, path)


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {id(one): one for one in (*network.parameters(), *network.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def _program(
    network: nn.Module, example: Tensor, name: str, axes: Mapping[int, tuple[str, int]], outputs: int
) -> Any:
    free = {index: torch.export.Dim(axis, min=1, max=longest) for index, (axis, longest) in axes.items()}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network.eval(),
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[name],
                # Not their own names: "embedding" is what the exporter itself calls a lookup's result.
                output_names=[f"output.{index}" for index in range(outputs)],
                dynamic_shapes=(free,),
                optimize=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = next(
            (line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__
        )
        raise EmbedServeError(
            f"torch cannot write this network as an ONNX graph with inputs of any size along "
            f"{', '.join(axis for axis, _ in axes.values())} ({reason[:300]}). Another architecture may "
            "work; code of one's own must not branch on the values of its inputs.",
            code="not_exportable",
        ) from error
    if program is None:  # only when it writes to a file itself
        raise RuntimeError("torch.onnx.export returned no program")
    return program


def _anonymize(model: onnx.ModelProto, outputs: Mapping[str, Shape]) -> None:
    """Drops what the exporter notes about its own run: stack traces with file names, scopes, shapes."""
    graph = model.graph
    graph.name, graph.doc_string = "embedserve", ""
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for index, node in enumerate(graph.node):
        # A name of its own, by which a layer can be left out where others are brought to int8.
        node.doc_string, node.name = "", f"{node.op_type}_{index}"
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    names = {found.name: name for found, name in zip(graph.output, outputs, strict=True)}
    for weight in graph.initializer:
        if weight.name in outputs:  # a lookup of constants, folded
            names[weight.name] = weight.name = f"{weight.name}.folded"
    if not _has_branches(graph):
        _number_values(graph, names)
    for found, (name, shape) in zip(graph.output, outputs.items(), strict=True):
        found.CopyFrom(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def _number_values(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Values are numbered through: the exporter's names are long, and change with its version."""
    names[""] = ""  # an input or output that is left out
    numbers = itertools.count(1)
    for node in graph.node:
        for value in node.output:
            if value not in names:
                names[value] = f"x{next(numbers)}"
        node.input[:] = [names.get(value, value) for value in node.input]
        node.output[:] = [names[value] for value in node.output]


def _has_branches(graph: onnx.GraphProto) -> bool:
    return any(one.type == onnx.AttributeProto.GRAPH for node in graph.node for one in node.attribute)


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
