"""ONNX files as others wrote them: what they take and give, their weights outside, their precision."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import onnx
from onnx import TensorProto

from embedserve.errors import BundleError
from embedserve.hub.fetching import Repository

__all__ = ["ImageFace", "TextFace", "Value", "bring_weights", "image_face", "load", "precision", "text_face"]

INTEGERS = (TensorProto.INT64, TensorProto.INT32)
PIXELS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8)
QUANTISED = ("DynamicQuantizeLinear", "DequantizeLinear", "MatMulNBits", "MatMulBnb4", "QLinearMatMul")
EXTRA_INPUTS = ("attention_mask", "token_type_ids")


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output: its name, ONNX element type and dimensions (a free one is a name or None)."""

    name: str
    kind: int
    dims: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"'{self.name}' {TensorProto.DataType.Name(self.kind).lower()} {list(self.dims)}"


@dataclass(frozen=True, slots=True)
class ImageFace:
    """How a graph takes images."""

    pixels: Value
    channels_first: bool
    single: bool
    """The batch is fixed at 1."""

    @property
    def normalises(self) -> bool:
        """It takes the pixels themselves, uint8."""
        return self.pixels.kind == TensorProto.UINT8


@dataclass(frozen=True, slots=True)
class TextFace:
    """How a graph takes texts."""

    ids: Value
    mask: Value | None
    types: Value | None
    single: bool
    length: int | None
    """Tokens, where it takes no other number of them."""


def load(path: Path) -> onnx.ModelProto:
    """The graph without weights that lie outside of it. Raises BundleError."""
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # noqa: BLE001 -- protobuf's errors share no base class
        raise BundleError(f"'{path}' is not an ONNX file ({error}); fetch or copy it again.") from None


def image_face(model: onnx.ModelProto, height: int, width: int, label: str) -> ImageFace:
    """Raises BundleError: not one image input of that size."""
    inputs = _inputs(model)
    if len(inputs) != 1 or len(inputs[0].dims) != 4 or inputs[0].kind not in PIXELS:
        raise BundleError(
            f"'{label}' takes {_listed(inputs)}; needed is one input of images [batch, 3, height, width] or "
            "[batch, height, width, 3] in float32, float16 or uint8."
        )
    pixels = inputs[0]
    channels_first = pixels.dims[1] == 3 or (pixels.dims[3] != 3 and pixels.kind != TensorProto.UINT8)
    sides = pixels.dims[2:] if channels_first else pixels.dims[1:3]
    if any(
        isinstance(side, int) and side != wanted for side, wanted in zip(sides, (height, width), strict=True)
    ):
        raise BundleError(
            f"'{label}' takes {pixels}, but the preprocessing beside it gives {height} × {width} pixels; "
            "the two files do not belong together."
        )
    return ImageFace(pixels, channels_first, _single(pixels, label))


def text_face(model: onnx.ModelProto, label: str) -> TextFace:
    """Raises BundleError: an input that is neither token ids nor what follows from them."""
    inputs = _inputs(model)
    extras = {value.name: value for value in inputs if value.name in EXTRA_INPUTS}
    ids = [value for value in inputs if value.name not in extras]
    if len(ids) != 1 or len(ids[0].dims) != 2 or ids[0].kind not in INTEGERS:
        raise BundleError(
            f"'{label}' takes {_listed(inputs)}; needed is one input of token ids [batch, length] in int64 "
            f"or int32, beside it at most {' and '.join(EXTRA_INPUTS)}."
        )
    length = ids[0].dims[1]
    return TextFace(
        ids[0],
        extras.get("attention_mask"),
        extras.get("token_type_ids"),
        _single(ids[0], label),
        length if isinstance(length, int) else None,
    )


def precision(model: onnx.ModelProto) -> Literal["float32", "float16", "quantised"]:
    """Of the weights: told by the graph itself, whatever the file is called."""
    if any(node.op_type in QUANTISED for node in _nodes(model.graph)):
        return "quantised"
    kinds = [tensor.data_type for tensor in _tensors(model.graph) if tensor.dims]
    halves = kinds.count(TensorProto.FLOAT16)
    return "float16" if halves > kinds.count(TensorProto.FLOAT) else "float32"


def bring_weights(
    model: onnx.ModelProto, repository: Repository, label: str, folder: Path, stem: str
) -> list[str]:
    """Copies the files with a graph's outside weights to `folder` and points the graph at the copies.

    They are copied from file to file, never read into memory.

    Args:
        model: Its tensors are changed.
        repository: Where the graph is from.
        label: The graph's name there; the weights' names are relative to it.
        folder: Of the bundle.
        stem: The copies are called `stem.onnx_data`, with a number where there are several.

    Returns:
        The copies' names.

    Raises:
        BundleError: A name leads out of the repository.
        NotFound: The repository lacks one of the files.
    """
    copies: dict[str, str] = {}
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        place = next(entry for entry in tensor.external_data if entry.key == "location")
        if place.value not in copies:
            path = PurePosixPath(label).parent / place.value
            if path.is_absolute() or ".." in path.parts:
                raise BundleError(
                    f"'{label}' of {repository.at} names weights outside of it: '{place.value}'."
                )
            copies[place.value] = f"{stem}.onnx_data" + (f".{len(copies)}" if copies else "")
            shutil.copyfile(repository.path(path.as_posix()), folder / copies[place.value])
        place.value = copies[place.value]
    return list(copies.values())


def _inputs(model: onnx.ModelProto) -> list[Value]:
    """Old exporters list the weights among the inputs."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [_value(one) for one in model.graph.input if one.name not in weights]


def _value(info: onnx.ValueInfoProto) -> Value:
    tensor = info.type.tensor_type
    dims = (dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim)
    return Value(info.name, tensor.elem_type, tuple(dims))


def _single(value: Value, label: str) -> bool:
    batch = value.dims[0]
    if isinstance(batch, int) and batch != 1:
        raise BundleError(f"'{label}' takes {value}: batches of {batch} only; needed is any size, or 1.")
    return batch == 1


def _listed(values: list[Value]) -> str:
    return ", ".join(map(str, values)) or "nothing"


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for one in _graphs(graph):
        yield from one.node


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for one in _graphs(graph):
        yield from one.initializer
    for node in _nodes(graph):
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
