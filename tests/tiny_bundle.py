"""A real bundle whose vectors can be computed by eye.

Eight dimensions, named: red, green, blue, dark, and four more words. An image's vector is its mean colour
(r, g, b, 1 − brightest channel, 0, 0, 0, 0) in 0..1; a text's is the sum of its words' axes. Both are scaled
to unit length. So the text "red" and an all-red picture have cosine 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from embedserve.bundle import (
    Bundle,
    Description,
    ImageOutputs,
    ImageTower,
    Preprocessing,
    Scoring,
    TextTower,
    new_bundle,
    open_bundle,
    seal,
)

WORDS = ("red", "green", "blue", "dark", "round", "square", "small", "large")
DIM = len(WORDS)
PAD, UNKNOWN = 0, 1
OUTPUTS = ImageOutputs(rows=2, columns=2, patches=DIM, attention=2, text_space=True)


def write_tiny_bundle(
    out: Path,
    *,
    name: str = "tiny",
    size: int = 8,
    rotate: int = 0,
    outputs: ImageOutputs | None = None,
    dims: tuple[int, ...] = (),
) -> Bundle:
    """Writes the bundle to `out`. `rotate` shifts the text axes, which makes another encoder of it.

    With `outputs` (see OUTPUTS) the image graph also gives, for each quarter of the picture, row by row:
    `patches`, its mean colour as the embedding is made (not of unit length), and `attention`, the quarter's
    share of the brightness (head 0) and of the red (head 1).
    """
    with new_bundle(out) as folder:
        onnx.save(_image_graph(size // 2 if outputs else 0), folder / "image.onnx")
        onnx.save(_text_graph(rotate), folder / "text.onnx")
        vocabulary = {"[pad]": PAD, "[unk]": UNKNOWN} | {word: i + 2 for i, word in enumerate(WORDS)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "README.md").write_text("# tiny\n\nMean colour and words, for tests.\n")
        seal(
            folder,
            Description(
                name=name,
                dim=DIM,
                image=ImageTower(
                    preprocessing=Preprocessing(height=size, width=size, resize_to=size), outputs=outputs
                ),
                text=TextTower(context_length=16, pad_id=PAD),
                scoring=Scoring(logit_scale=10.0),
                dims=dims,
                licence="Apache-2.0",
                source="tests/tiny_bundle.py",
            ),
        )
    return open_bundle(out)


def _constant(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)


def _unit(source: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("ReduceL2", [source, "axis_1"], ["norm"], keepdims=1),
        helper.make_node("Max", ["norm", "tiny"], ["safe_norm"]),
        helper.make_node("Div", [source, "safe_norm"], ["embedding"]),
    ]


def _model(
    nodes: list[onnx.NodeProto], inputs: list, constants: list, more: Sequence[onnx.ValueInfoProto] = ()
) -> onnx.ModelProto:
    output = helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", DIM])
    shared = [_constant("axis_1", np.array([1])), _constant("tiny", np.array(1e-6, np.float32))]
    graph = helper.make_graph(nodes, "tiny", inputs, [output, *more], constants + shared)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model


def _image_graph(quarter: int = 0) -> onnx.ModelProto:
    """`quarter`: the side of the cells that `patches` and `attention` are about; 0 leaves both out."""
    nodes = [
        helper.make_node("Cast", ["pixels"], ["float_pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["float_pixels", "axes_12"], ["mean_255"], keepdims=0),
        helper.make_node("Div", ["mean_255", "scale"], ["mean"]),
        helper.make_node("ReduceMax", ["mean", "axis_1"], ["brightest"], keepdims=1),
        helper.make_node("Sub", ["one", "brightest"], ["dark"]),
        helper.make_node("Concat", ["mean", "dark"], ["four"], axis=1),
        helper.make_node("Pad", ["four", "padding"], ["sum"]),
        *_unit("sum"),
    ]
    pixels = helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["batch", "height", "width", 3])
    constants = [
        _constant("axes_12", np.array([1, 2])),
        _constant("scale", np.array(255, np.float32)),
        _constant("one", np.array(1, np.float32)),
        _constant("padding", np.array([0, 0, 0, DIM - 4])),
    ]
    if not quarter:
        return _model(nodes, [pixels], constants)
    nodes += [
        helper.make_node("Transpose", ["float_pixels"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node(
            "AveragePool", ["planes"], ["pooled"], kernel_shape=[quarter] * 2, strides=[quarter] * 2
        ),
        helper.make_node("Reshape", ["pooled", "cells"], ["cells_255"]),
        helper.make_node("Div", ["cells_255", "scale"], ["colours"]),  # [batch, 3, 4]
        helper.make_node("Transpose", ["colours"], ["by_cell"], perm=[0, 2, 1]),
        helper.make_node("ReduceMax", ["by_cell", "axis_2"], ["cell_brightest"], keepdims=1),
        helper.make_node("Sub", ["one", "cell_brightest"], ["cell_dark"]),
        helper.make_node("Concat", ["by_cell", "cell_dark"], ["cell_four"], axis=2),
        helper.make_node("Pad", ["cell_four", "cell_padding"], ["patches"]),
        helper.make_node("ReduceSum", ["colours", "axis_1"], ["bright"], keepdims=1),
        helper.make_node("Gather", ["colours", "first"], ["red"], axis=1),
        helper.make_node("Concat", ["bright", "red"], ["heads"], axis=1),
        helper.make_node("ReduceSum", ["heads", "axis_2"], ["total"], keepdims=1),
        helper.make_node("Max", ["total", "tiny"], ["safe_total"]),
        helper.make_node("Div", ["heads", "safe_total"], ["attention"]),
    ]
    constants += [
        _constant("cells", np.array([0, 3, 4])),
        _constant("axis_2", np.array([2])),
        _constant("first", np.array([0])),
        _constant("cell_padding", np.array([0, 0, 0, 0, 0, DIM - 4])),
    ]
    more = [
        helper.make_tensor_value_info("patches", TensorProto.FLOAT, ["batch", 4, DIM]),
        helper.make_tensor_value_info("attention", TensorProto.FLOAT, ["batch", 2, 4]),
    ]
    return _model(nodes, [pixels], constants, more)


def _text_graph(rotate: int) -> onnx.ModelProto:
    table = np.zeros((DIM + 2, DIM), np.float32)
    table[2:] = np.roll(np.eye(DIM, dtype=np.float32), rotate, axis=1)
    table[UNKNOWN] = 0.01  # a text without known words still has a direction; padding adds nothing
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["vectors"]),
        helper.make_node("ReduceSum", ["vectors", "axis_1"], ["sum"], keepdims=0),
        *_unit("sum"),
    ]
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", "length"])
    return _model(nodes, [tokens], [_constant("table", table)])
