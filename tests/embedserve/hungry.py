"""A text tower that asks for more memory than there is, so that running out of it can be tested for real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from embedserve.bundle import Bundle, open_bundle, seal
from tests.tiny_bundle import DIM, write_tiny_bundle

MUCH = 1 << 46
"""Bytes: 64 TiB, which no allocator gives."""


def write_hungry_graph(path: Path, *, most_tokens: int) -> None:
    """A graph that asks for MUCH on the way to its vectors when a batch has more tokens, padding included.

    The vector of a text is the axis that its first token numbers.
    """
    constants = {
        "most": np.array(most_tokens),
        "much": np.array(MUCH),
        "little": np.array(8),
        "list": np.array([1]),
        "axis_0": np.array([0]),
        "byte": np.array(0, np.uint8),
        "depth": np.array([DIM]),
        "zero_one": np.array([0, 1], np.float32),
        "first": np.array(0),
    }
    nodes = [
        helper.make_node("Size", ["tokens"], ["size"]),
        helper.make_node("Greater", ["size", "most"], ["too_many"]),
        helper.make_node("Where", ["too_many", "much", "little"], ["count"]),
        helper.make_node("Reshape", ["count", "list"], ["shape"]),
        helper.make_node("Expand", ["byte", "shape"], ["bytes"]),
        helper.make_node("ReduceMax", ["bytes", "axis_0"], ["nothing"], keepdims=0),
        helper.make_node("Cast", ["nothing"], ["nothing_float"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["tokens", "first"], ["words"], axis=1),
        helper.make_node("OneHot", ["words", "depth", "zero_one"], ["axis"]),
        helper.make_node("Add", ["axis", "nothing_float"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hungry",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def write_hungry_bundle(out: Path, *, most_tokens: int) -> Bundle:
    """The tiny bundle with that graph as its text tower."""
    folder = write_tiny_bundle(out, name="hungry").folder
    write_hungry_graph(folder / "text.onnx", most_tokens=most_tokens)
    return seal(folder, open_bundle(folder, verify=False).description)
