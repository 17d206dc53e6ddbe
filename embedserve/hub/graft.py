"""Nodes in front of and behind a graph, so that it keeps the contract of `embedserve.bundle`.

The arithmetic is that of their code, in its order and in float32, so that their graph sees the very numbers
it was made for. Only operators are used whose meaning has not changed since opset 11.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from embedserve.errors import BundleError
from embedserve.hub.graphs import ImageFace, TextFace, Value
from embedserve.hub.pixels import PixelRules

__all__ = ["graft_images", "graft_texts"]

PREFIX = "embedserve."
OLDEST_OPSET = 11
AXES_AS_INPUT = 18
"""The opset from which reductions take their axes as an input."""
SHORTEST = 1e-12
"""A vector shorter than this stays what it is instead of becoming NaN; serving then says so."""


def graft_images(
    model: onnx.ModelProto, face: ImageFace, rules: PixelRules, output: str, *, class_token: bool, dim: int
) -> None:
    """Changes `model` to: uint8 [batch, height, width, 3] → float32 [batch, dim], unit length."""
    graft = _Graft(model)
    size = (rules.preprocessing.height, rules.preprocessing.width, 3)
    found = graft.input("pixels", TensorProto.UINT8, ["batch", *size], single=face.single)
    if not face.normalises:
        found = graft.before("Cast", found, to=TensorProto.FLOAT)
        found = graft.before("Mul", found, np.float32(rules.scale))
        found = graft.before("Sub", found, np.asarray(rules.mean, np.float32))
        found = graft.before("Div", found, np.asarray(rules.std, np.float32))
    if face.channels_first:
        found = graft.before("Transpose", found, perm=[0, 3, 1, 2])
    graft.feed(face.pixels, graft.before("Cast", found, to=face.pixels.kind))
    graft.finish(output, class_token=class_token, dim=dim, single=face.single)


def graft_texts(
    model: onnx.ModelProto,
    face: TextFace,
    output: str,
    *,
    pad_id: int,
    pad_ends_texts: bool,
    masked: bool,
    class_token: bool,
    dim: int,
) -> None:
    """Changes `model` to: int64 [batch, length] → float32 [batch, dim], unit length.

    Args:
        model: Their graph.
        face: How it takes texts.
        output: Its output with the vectors.
        pad_id: What fills a row up, at its end.
        pad_ends_texts: Padding is the id that ends every text as well (CLIP's and SigLIP's do), so the first
            one at the end of a row belongs to the text.
        masked: A mask says where padding is; else it says that there is none.
        class_token: The output is [batch, tokens, dim].
        dim: Length of the vectors.
    """
    graft = _Graft(model)
    ids = graft.input("tokens", TensorProto.INT64, ["batch", face.length or "length"], single=face.single)
    graft.feed(face.ids, graft.before("Cast", ids, to=face.ids.kind))
    if face.mask is not None:
        if masked:
            # Padding is what no other id follows: the same id inside a text is a word.
            real = graft.before("Not", graft.before("Equal", ids, np.int64(pad_id)))
            following = graft.before(
                "CumSum", graft.before("Cast", real, to=TensorProto.INT32), np.int64(1), reverse=1
            )
            padding = graft.before("Less", following, np.int32(1))
            nth = graft.before("CumSum", graft.before("Cast", padding, to=TensorProto.INT32), np.int64(1))
            seen = graft.before("Less", nth, np.int32(2 if pad_ends_texts else 1))
        else:
            seen = graft.before("Equal", ids, ids)
        graft.feed(face.mask, graft.before("Cast", seen, to=face.mask.kind))
    if face.types is not None:
        zeros = graft.before("Mul", ids, np.int64(0))
        graft.feed(face.types, graft.before("Cast", zeros, to=face.types.kind))
    graft.finish(output, class_token=class_token, dim=dim, single=face.single)


class _Graft:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._opset = next((one.version for one in model.opset_import if one.domain in {"", "ai.onnx"}), 0)
        if self._opset < OLDEST_OPSET:
            raise BundleError(
                f"The graph is written in ONNX opset {self._opset}; {OLDEST_OPSET} is the oldest that can be "
                "pulled. Export it again with a newer one."
            )
        self._front: list[onnx.NodeProto] = []
        self._input: onnx.ValueInfoProto | None = None
        self._count = 0

    def input(self, name: str, kind: int, dims: list[int | str], *, single: bool) -> str:
        name = PREFIX + name
        self._input = helper.make_tensor_value_info(name, kind, [1 if single else dims[0], *dims[1:]])
        return name

    def before(self, op: str, *inputs: str | NDArray[np.generic] | np.generic, **attributes: Any) -> str:
        """A node in front of theirs; returns its output's name."""
        return self._node(self._front, op, *inputs, **attributes)

    def feed(self, theirs: Value, ours: str) -> None:
        self._front.append(helper.make_node("Identity", [ours], [theirs.name]))

    def finish(self, output: str, *, class_token: bool, dim: int, single: bool) -> None:
        behind: list[onnx.NodeProto] = []
        found = output
        if class_token:
            found = self._node(behind, "Gather", found, np.int64(0), axis=1)
        found = self._node(behind, "Cast", found, to=TensorProto.FLOAT)
        if self._opset >= AXES_AS_INPUT:
            length = self._node(behind, "ReduceL2", found, np.array([1], np.int64), keepdims=1)
        else:
            length = self._node(behind, "ReduceL2", found, axes=[1], keepdims=1)
        length = self._node(behind, "Max", length, np.array([SHORTEST], np.float32))
        embedding = f"{PREFIX}embedding"
        behind.append(helper.make_node("Div", [found, length], [embedding], name=embedding))
        theirs = list(self._graph.node)
        weights = {tensor.name for tensor in self._graph.initializer}
        listed = [one for one in self._graph.input if one.name in weights]
        del self._graph.node[:], self._graph.input[:], self._graph.output[:]
        self._graph.node.extend([*self._front, *theirs, *behind])
        self._graph.input.extend([*([self._input] if self._input else []), *listed])
        self._graph.output.append(
            helper.make_tensor_value_info(embedding, TensorProto.FLOAT, [1 if single else "batch", dim])
        )

    def _node(
        self,
        nodes: list[onnx.NodeProto],
        op: str,
        *inputs: str | NDArray[np.generic] | np.generic,
        **attributes: Any,
    ) -> str:
        names = [one if isinstance(one, str) else self._constant(np.asarray(one)) for one in inputs]
        name = self._name(op)
        nodes.append(helper.make_node(op, names, [name], name=name, **attributes))
        return name

    def _constant(self, value: NDArray[np.generic]) -> str:
        name = self._name("constant")
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{PREFIX}{what}.{self._count}"
