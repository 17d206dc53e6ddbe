"""The outputs of an ONNX file: read, and taken away, without the library `onnx`.

ONNX Runtime computes every output of a graph, fetched or not (microsoft/onnxruntime#16483), and every node,
used or not. So that who wants vectors only does not pay for patches and attention, those outputs and the
nodes that lead to them alone are taken off the file's bytes before a session gets them. In the protobuf
encoding that is one byte for each: an output's entry becomes one that describes an inner value, a
node's one of a number that ONNX does not use. Nothing moves, so the weights are never looked at.

Source: onnx.proto (ModelProto.graph 7; GraphProto.node 1, output 12, value_info 13, 3 reserved;
NodeProto.input 1, output 2, attribute 5; AttributeProto.g 6, graphs 11; ValueInfoProto.name 1, type 2;
TypeProto.tensor_type 1; Tensor.elem_type 1, shape 2; TensorShapeProto.dim 1; Dimension.dim_value 1) and
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Declared", "declared_outputs", "without_outputs"]

BYTES = 2
"""The wire type of strings and messages."""
GRAPH = 7
NODE, OUTPUT, VALUE_INFO, UNUSED = 1, 12, 13, 3
FLOAT = 1
"""TensorProto.FLOAT."""


@dataclass(frozen=True, slots=True)
class Declared:
    """An output as the file describes it: the form of ONNX Runtime's `NodeArg`. A free dimension is a str."""

    name: str
    type: str
    shape: list[int | str]


class _Field(NamedTuple):
    at: int
    """Where its tag lies."""
    number: int
    start: int
    end: int
    value: int
    """Of a varint."""


def declared_outputs(data: bytes) -> list[Declared]:
    """The graph's outputs in order. Raises ValueError for bytes that are no ONNX model."""
    return [_declared(data, field) for field in _outputs(data)]


def without_outputs(data: bytes, names: Collection[str]) -> bytes:
    """The model without the outputs of these names and what only they need.

    Raises ValueError as `declared_outputs`.
    """
    changed: dict[int, int] = {}  # tags below field number 16 are one byte
    for graph in _named(data, _whole(data), GRAPH):
        needed = set[str]()
        for output in _named(data, graph, OUTPUT):
            name = _declared(data, output).name
            if name in names:
                changed[output.at] = VALUE_INFO << 3 | BYTES
            else:
                needed.add(name)
        for node in reversed(_named(data, graph, NODE)):  # they come in an order in which they can be run
            reads, writes = _names(data, node)
            if needed.isdisjoint(writes):
                changed[node.at] = UNUSED << 3 | BYTES
            else:
                needed |= reads
    parts, kept = [], 0
    for at in sorted(changed):
        parts += [data[kept:at], bytes([changed[at]])]
        kept = at + 1
    return b"".join([*parts, data[kept:]])


def _names(data: bytes, node: _Field) -> tuple[set[str], set[str]]:
    """What a node reads and writes; its branches and loop bodies count with all that they read."""
    reads = {_text(data, one) for one in _named(data, node, 1)}
    writes = {_text(data, one) for one in _named(data, node, 2)}
    for attribute in _named(data, node, 5):
        for body in (*_named(data, attribute, 6), *_named(data, attribute, 11)):
            reads |= {_declared(data, one).name for one in _named(data, body, OUTPUT)}
            for inner in _named(data, body, NODE):
                reads |= _names(data, inner)[0]
    return reads, writes - {""}


def _outputs(data: bytes) -> list[_Field]:
    return [one for graph in _named(data, _whole(data), GRAPH) for one in _named(data, graph, OUTPUT)]


def _whole(data: bytes) -> _Field:
    return _Field(0, 0, 0, len(data), 0)


def _declared(data: bytes, output: _Field) -> Declared:
    name, kind, shape = "", "", list[int | str]()
    for field in _fields(data, output.start, output.end):
        if field.number == 1:
            name = _text(data, field)
        elif field.number == 2:
            for tensor in _named(data, field, 1):
                elements = [one.value for one in _named(data, tensor, 1)]
                kind = "tensor(float)" if elements == [FLOAT] else f"tensor of type {elements}"
                for dimensions in _named(data, tensor, 2):
                    shape = [_dimension(data, one) for one in _named(data, dimensions, 1)]
    return Declared(name, kind, shape)


def _dimension(data: bytes, field: _Field) -> int | str:
    values = [one.value for one in _named(data, field, 1)]
    return values[0] if values else "?"


def _text(data: bytes, field: _Field) -> str:
    return data[field.start : field.end].decode("utf-8", "replace")


def _named(data: bytes, parent: _Field, number: int) -> list[_Field]:
    return [field for field in _fields(data, parent.start, parent.end) if field.number == number]


def _fields(data: bytes, start: int, end: int) -> Iterator[_Field]:
    """The fields of the message between `start` and `end`."""
    at = start
    while at < end:
        tag, after = _varint(data, at, end)
        value = 0
        match tag & 7:
            case 0:
                value, stop = _varint(data, after, end)
            case 1:
                stop = after + 8
            case 2:
                length, after = _varint(data, after, end)
                stop = after + length
            case 5:
                stop = after + 4
            case _:
                raise ValueError(f"byte {at} begins no protobuf field")
        if stop > end:
            raise ValueError(f"the protobuf field at byte {at} ends behind its message")
        yield _Field(at, tag >> 3, after, stop, value)
        at = stop


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            break
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"the protobuf number before byte {at} does not end")
