"""Bundles with random weights on CLIP's architecture, written with `onnx` alone: for speed and size only.

from benchmarks.vit_bundle import VIT_B_32, write_vit_bundle
write_vit_bundle(Path("bundle"), VIT_B_32, half=True)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from embedserve.bundle import (
    Bundle,
    Description,
    ImageOutputs,
    ImageTower,
    Preprocessing,
    TextTower,
    new_bundle,
    open_bundle,
    seal,
)

__all__ = ["SMALL", "VIT_B_32", "Shape", "write_vit_bundle"]

VOCABULARY = 49408
CONTEXT = 77
PAGE = 4096
"""Bytes; weights in a file of their own begin at a multiple, so that they can be mapped into memory."""
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of both towers; `heads` of 64 numbers each."""

    name: str
    image: int
    patch: int
    width: int
    layers: int
    text_width: int
    text_layers: int
    dim: int
    vocabulary: int = VOCABULARY


VIT_B_32 = Shape("random-vit-b-32", 224, 32, 768, 12, 512, 12, 512)
SMALL = Shape("random-vit-small", 96, 32, 192, 3, 128, 2, 128, 1000)


def write_vit_bundle(
    out: Path, shape: Shape, *, half: bool = False, outputs: bool = False, external: bool = False
) -> Bundle:
    """Writes a bundle.

    Args:
        half: Compute in float16; input and output stay uint8, int64 and float32.
        outputs: The image graph also gives `patches` and `attention`.
        external: Weights lie beside each graph in one file, as for models above 2 GB.
    """
    grid = shape.image // shape.patch
    with new_bundle(out) as folder:
        for name, seed, build in (("image.onnx", 0, _image_graph), ("text.onnx", 1, _text_graph)):
            net = _Net(half, seed, folder / f"{name}.data" if external else None)
            onnx.save(build(net, shape, outputs), folder / name)
        words = {"[unk]": 0, "probe": 1} | {f"w{i}": i for i in range(2, min(shape.vocabulary, 500))}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[unk]"))  # noqa: S106 -- a token of a tokenizer
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        offers = ImageOutputs(
            rows=grid, columns=grid, patches=shape.dim, attention=shape.width // 64, text_space=True
        )
        seal(
            folder,
            Description(
                name=shape.name + ("-fp16" if half else ""),
                dim=shape.dim,
                image=ImageTower(
                    preprocessing=Preprocessing(height=shape.image, width=shape.image, resize_to=shape.image),
                    outputs=offers if outputs else None,
                ),
                text=TextTower(context_length=CONTEXT, pad_id=0),
                precision="float16" if half else "float32",
                licence="Apache-2.0",
                source="benchmarks/vit_bundle.py (random weights)",
            ),
        )
    return open_bundle(out, verify=False)


class _Net:
    """Nodes and weights as they are written down, layer by layer."""

    def __init__(self, half: bool, seed: int, beside: Path | None = None) -> None:
        """`beside`: the file that large constants are written to at once, so that memory never holds all."""
        self.beside = beside
        self.element = TensorProto.FLOAT16 if half else TensorProto.FLOAT
        self.kind = np.float16 if half else np.float32
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)
        self._count = 0

    def add(self, op: str, *inputs: str, name: str = "", **attributes: object) -> str:
        self._count += 1
        output = name or f"{op.lower()}_{self._count}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, value: NDArray[np.generic]) -> str:
        self._count += 1
        name = f"constant_{self._count}"
        if self.beside is not None and value.nbytes >= PAGE:
            self.constants.append(self._written(name, value, self.beside))
        else:
            self.constants.append(numpy_helper.from_array(value, name))
        return name

    def _written(self, name: str, value: NDArray[np.generic], file: Path) -> onnx.TensorProto:
        tensor = TensorProto(
            name=name,
            dims=value.shape,
            data_type=helper.np_dtype_to_tensor_dtype(value.dtype),
            data_location=TensorProto.EXTERNAL,
        )
        with file.open("ab") as data:
            data.write(b"\0" * (-data.tell() % PAGE))
            place = {"location": file.name, "offset": data.tell(), "length": value.nbytes}
            data.write(value.tobytes())
        for key, entry in place.items():
            tensor.external_data.add(key=key, value=str(entry))
        return tensor

    def numbers(self, *values: float) -> str:
        return self.constant(np.array(values, self.kind))

    def whole(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def weight(self, *shape: int, scale: float = 0.02) -> str:
        return self.constant((self._random.standard_normal(shape, np.float32) * scale).astype(self.kind))

    def linear(self, x: str, inside: int, outside: int) -> str:
        scale = inside**-0.5
        product = self.add("MatMul", x, self.weight(inside, outside, scale=scale))
        return self.add("Add", product, self.weight(outside))

    def norm(self, x: str, width: int) -> str:
        one, zero = (self.constant(np.full(width, value, self.kind)) for value in (1, 0))
        return self.add("LayerNormalization", x, one, zero, axis=-1, epsilon=1e-5)

    def attention(self, x: str, width: int, mask: str | None) -> tuple[str, str]:
        """Of 64 numbers a head; returns the output and the weights [batch, heads, tokens, tokens]."""
        heads = width // 64
        parts = []
        for _ in range(3):
            split = self.add("Reshape", self.linear(x, width, width), self.whole(0, 0, heads, 64))
            parts.append(self.add("Transpose", split, perm=[0, 2, 1, 3]))
        query, key, value = parts
        query = self.add("Mul", query, self.numbers(0.125))
        scores = self.add("MatMul", query, self.add("Transpose", key, perm=[0, 1, 3, 2]))
        if mask:
            scores = self.add("Add", scores, mask)
        weights = self.add("Softmax", scores, axis=-1)
        mixed = self.add("Transpose", self.add("MatMul", weights, value), perm=[0, 2, 1, 3])
        joined = self.add("Reshape", mixed, self.whole(0, 0, width))
        return self.linear(joined, width, width), weights

    def block(self, x: str, width: int, mask: str | None = None) -> tuple[str, str]:
        mixed, weights = self.attention(self.norm(x, width), width, mask)
        x = self.add("Add", x, mixed)
        inner = self.linear(self.norm(x, width), width, 4 * width)
        gate = self.add("Sigmoid", self.add("Mul", inner, self.numbers(1.702)))
        outer = self.linear(self.add("Mul", inner, gate), 4 * width, width)
        return self.add("Add", x, outer), weights

    def unit(self, x: str, name: str) -> None:
        full = self.add("Cast", x, to=TensorProto.FLOAT)
        length = self.add("ReduceL2", full, self.whole(-1), keepdims=1)
        self.add("Div", full, length, name=name)

    def model(self, source: onnx.ValueInfoProto, outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "vit", [source], outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _image_graph(net: _Net, shape: Shape, outputs: bool) -> onnx.ModelProto:
    width, cells = shape.width, (shape.image // shape.patch) ** 2
    x = net.add("Cast", "pixels", to=net.element)
    scale, shift = np.array(STD) * 255, np.array(MEAN) * 255
    x = net.add("Div", net.add("Sub", x, net.numbers(*shift)), net.numbers(*scale))
    x = net.add("Transpose", x, perm=[0, 3, 1, 2])
    kernel = net.weight(width, 3, shape.patch, shape.patch, scale=(3 * shape.patch**2) ** -0.5)
    x = net.add("Conv", x, kernel, strides=[shape.patch] * 2)
    x = net.add("Transpose", net.add("Reshape", x, net.whole(0, width, cells)), perm=[0, 2, 1])
    batch = net.add("Shape", x, start=0, end=1)
    first = net.add("Expand", net.weight(1, 1, width), net.add("Concat", batch, net.whole(1, width), axis=0))
    x = net.add("Add", net.add("Concat", first, x, axis=1), net.weight(1, cells + 1, width))
    x = net.norm(x, width)
    weights = ""
    for _ in range(shape.layers):
        x, weights = net.block(x, width)
    x = net.norm(x, width)
    projection = net.weight(width, shape.dim, scale=width**-0.5)
    token = net.add("Gather", x, net.constant(np.array(0)), axis=1)
    net.unit(net.add("MatMul", token, projection), "embedding")
    found = [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", shape.dim])]
    if outputs:
        behind = [net.whole(1), net.whole(cells + 1)]
        net.unit(net.add("MatMul", net.add("Slice", x, *behind, net.whole(1)), projection), "patches")
        row = net.add("Gather", weights, net.constant(np.array(0)), axis=2)
        row = net.add("Slice", row, *behind, net.whole(2))
        net.add("Cast", row, name="attention", to=TensorProto.FLOAT)
        found += [
            helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["batch", cells, shape.dim]),
            helper.make_tensor_value_info("attention", TensorProto.FLOAT, ["batch", width // 64, cells]),
        ]
    pixels = helper.make_tensor_value_info(
        "pixels", TensorProto.UINT8, ["batch", shape.image, shape.image, 3]
    )
    return net.model(pixels, found)


def _text_graph(net: _Net, shape: Shape, outputs: bool) -> onnx.ModelProto:
    width = shape.text_width
    length = net.add("Shape", "tokens", start=1, end=2)
    zero, one = net.whole(0), net.whole(1)
    x = net.add("Gather", net.weight(shape.vocabulary, width), "tokens", axis=0)
    x = net.add("Add", x, net.add("Slice", net.weight(CONTEXT, width), zero, length, zero))
    causal = np.triu(np.full((CONTEXT, CONTEXT), -10000, net.kind), 1)
    mask = net.add("Slice", net.constant(causal), net.whole(0, 0), net.add("Concat", length, length, axis=0))
    for _ in range(shape.text_layers):
        x, _ = net.block(x, width, mask)
    x = net.norm(x, width)
    # The last token is the one with the largest id, as CLIP's end-of-text is.
    last = net.add("ArgMax", "tokens", axis=1, keepdims=0)
    chosen = net.add("OneHot", last, length, net.numbers(0, 1))
    x = net.add("MatMul", net.add("Unsqueeze", chosen, one), x)
    x = net.add("Squeeze", x, one)
    net.unit(net.add("MatMul", x, net.weight(width, shape.dim, scale=width**-0.5)), "embedding")
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])
    found = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", shape.dim])
    return net.model(tokens, [found])
