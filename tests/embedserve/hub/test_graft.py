"""The nodes in front of a graph compute what their code computes: masks, pixels, types, for every opset."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedserve.hub.graft import graft_images, graft_texts
from embedserve.hub.graphs import image_face, text_face
from embedserve.hub.pixels import from_huggingface

PAD = 9
ROWS = [
    [1, 2, 3, 9, 9, 9],  # padded
    [1, 9, 3, 9, 9, 9],  # the pad id as a word
    [9, 9, 3, 4, 9, 9],  # and at the start
    [1, 2, 3, 4, 5, 6],  # full
    [1, 2, 3, 4, 5, 9],
    [9, 9, 9, 9, 9, 9],  # nothing but padding
]


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[tuple[str, int, Sequence[int | str]]],
    output: Sequence[int | str],
    *,
    constants: Sequence[onnx.TensorProto] = (),
    opset: int = 17,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "theirs",
        [helper.make_tensor_value_info(*one) for one in inputs],
        [helper.make_tensor_value_info("out", kind, list(output))],
        list(constants),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(made: onnx.ModelProto, given: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(made, full_check=True)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    [one] = session.get_inputs()
    found: np.ndarray = session.run(None, {one.name: given})[0]
    return found


def ratios(mask: np.ndarray) -> np.ndarray:
    """What the graphs below make of a mask: its rows, with a 1 in front, scaled to unit length."""
    rows = np.concatenate([np.ones((len(mask), 1)), mask], axis=1)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def text_model(mask_kind: int, opset: int = 17) -> onnx.ModelProto:
    """Gives back its mask, behind a 1."""
    nodes = [
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Gather", ["ids", "first"], ["column"], axis=1),
        helper.make_node("Sub", ["column", "column"], ["nothing"]),
        helper.make_node("Add", ["nothing", "one"], ["ones"]),
        helper.make_node("Concat", ["ones", "mask"], ["out"], axis=1),
    ]
    constants = [
        numpy_helper.from_array(np.array([0]), "first"),
        numpy_helper.from_array(np.array([1], np.float32), "one"),
    ]
    inputs = [(name, kind, ("batch", 6)) for name, kind in (("input_ids", 7), ("attention_mask", mask_kind))]
    return model(nodes, inputs, ("batch", 7), constants=constants, opset=opset)


def literal_mask(row: Sequence[int], *, ends: bool) -> list[int]:
    """Count back from the end while there is padding; the first of it ends the text, if padding does that."""
    text = len(row)
    while text and row[text - 1] == PAD:
        text -= 1
    if ends and text < len(row):
        text += 1
    return [1] * text + [0] * (len(row) - text)


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("opset", [11, 13, 17, 18, 21])
@pytest.mark.parametrize("kind", [TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.FLOAT])
def test_the_mask_covers_what_follows_the_last_word(ends: bool, opset: int, kind: int) -> None:
    made = text_model(kind, opset)
    face = text_face(made, "theirs")
    graft_texts(made, face, "out", pad_id=PAD, pad_ends_texts=ends, masked=True, class_token=False, dim=7)
    expected = np.array([literal_mask(row, ends=ends) for row in ROWS])
    np.testing.assert_allclose(run(made, np.array(ROWS)), ratios(expected), atol=1e-6)


def test_a_model_trained_without_a_mask_sees_the_padding() -> None:
    made = text_model(TensorProto.INT64)
    face = text_face(made, "theirs")
    graft_texts(made, face, "out", pad_id=PAD, pad_ends_texts=True, masked=False, class_token=False, dim=7)
    np.testing.assert_allclose(run(made, np.array(ROWS)), ratios(np.ones((6, 6))), atol=1e-6)


def test_token_types_are_zeros_and_ids_keep_their_kind() -> None:
    nodes = [
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["ids", "types"], ["out"], axis=1),
    ]
    inputs = [
        ("input_ids", TensorProto.INT32, ("batch", "length")),
        ("token_type_ids", TensorProto.INT64, ("batch", "length")),
    ]
    made = model(nodes, inputs, ("batch", 4))
    face = text_face(made, "theirs")
    graft_texts(made, face, "out", pad_id=0, pad_ends_texts=False, masked=True, class_token=False, dim=4)
    np.testing.assert_allclose(run(made, np.array([[3, 4]])), [[0.6, 0.8, 0, 0]], atol=1e-6)


PREPROCESSOR = {
    "size": {"shortest_edge": 4},
    "crop_size": {"height": 4, "width": 2},
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
}


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8])
@pytest.mark.parametrize("channels_first", [True, False])
def test_a_graph_sees_the_numbers_that_its_makers_feed(kind: int, channels_first: bool) -> None:
    rules = from_huggingface(PREPROCESSOR, "theirs")
    shape = ("batch", 3, 4, 2) if channels_first else ("batch", 4, 2, 3)
    nodes = [
        helper.make_node("Flatten", ["pixel_values"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["out"], to=TensorProto.FLOAT),
    ]
    made = model(nodes, [("pixel_values", kind, shape)], ("batch", 24))
    face = image_face(made, 4, 2, "theirs")
    assert face.channels_first == channels_first
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 2, 3), dtype=np.uint8)
    graft_images(made, face, rules, "out", class_token=False, dim=24)
    numbers = pixels if kind == TensorProto.UINT8 else np.stack([rules.their_numbers(one) for one in pixels])
    numbers = numbers.astype(np.float16 if kind == TensorProto.FLOAT16 else np.float32)
    numbers = numbers.transpose(0, 3, 1, 2) if channels_first else numbers
    flat = numbers.reshape(3, 24).astype(np.float32)
    np.testing.assert_allclose(
        run(made, pixels), flat / np.linalg.norm(flat, axis=1, keepdims=True), rtol=1e-6, atol=1e-7
    )


def test_the_class_token_is_the_first_and_half_precision_ends_at_the_door() -> None:
    tokens = np.random.default_rng(0).normal(size=(1, 5, 4)).astype(np.float16)
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values"], ["mean"], axes=[1, 2, 3], keepdims=1),
        helper.make_node("Sub", ["mean", "mean"], ["nothing"]),
        helper.make_node("Squeeze", ["nothing", "last"], ["zeros"]),
        helper.make_node("Add", ["zeros", "tokens"], ["out"]),
    ]
    constants = [numpy_helper.from_array(tokens, "tokens"), numpy_helper.from_array(np.array([3]), "last")]
    inputs = [("pixel_values", TensorProto.FLOAT16, (1, 3, "height", "width"))]
    made = model(nodes, inputs, (1, 5, 4), constants=constants, kind=TensorProto.FLOAT16)
    face = image_face(made, 4, 2, "theirs")
    assert face.single
    graft_images(made, face, from_huggingface(PREPROCESSOR, "theirs"), "out", class_token=True, dim=4)
    found = run(made, np.zeros((1, 4, 2, 3), np.uint8))
    first = tokens[0, 0].astype(np.float32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [first / np.linalg.norm(first)], rtol=1e-5)
