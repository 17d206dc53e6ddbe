"""Vectors are right to the eye, whatever they run with; a bundle that is not as promised fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from embedserve import encoder as module
from embedserve.bundle import Description, open_bundle, pack_vector, seal
from embedserve.check import check_bundle, measure
from embedserve.config import Limits
from embedserve.encoder import Encoder, resolve
from embedserve.errors import BadRequest, BundleError, EmbedServeError, InvalidField
from embedserve.graph import available_cores
from tests.embedserve.colours import BLUE, GREEN, RED, axis, png
from tests.tiny_bundle import DIM, WORDS, write_tiny_bundle

LIMITS = Limits()


@pytest.fixture(scope="module")
def encoder(tiny_folder: Path) -> Encoder:
    return Encoder.load(tiny_folder, threads=1)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle that may be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "bundle"))


def reseal(folder: Path, **changes: object) -> None:
    """Writes the manifest for the files as they are now."""
    described = open_bundle(folder, verify=False).description
    seal(folder, Description.model_validate({**described.model_dump(), **changes}))


def write_graph(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    *,
    inputs: Sequence[tuple[str, int, Sequence[int | str]]] = (
        ("tokens", TensorProto.INT64, ("batch", "length")),
    ),
    output: tuple[int, Sequence[int | str]] = (TensorProto.FLOAT, ("batch", DIM)),
    constants: Sequence[onnx.TensorProto] = (),
) -> None:
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, kind, shape in inputs],
        [helper.make_tensor_value_info("out", output[0], list(output[1]))],
        list(constants),
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def test_a_picture_and_its_word_are_alike(encoder: Encoder) -> None:
    image = encoder.embed_images([encoder.read_image(png(RED), LIMITS)])
    text = encoder.embed_texts(encoder.tokenize(["red"]))
    np.testing.assert_allclose(image, [axis("red")], atol=1e-6)
    np.testing.assert_allclose(text, [axis("red")], atol=1e-6)
    assert image.dtype == text.dtype == np.float32


def test_the_order_is_kept_over_more_images_than_one_run_takes(encoder: Encoder) -> None:
    colours = [(RED, "red"), (GREEN, "green"), (BLUE, "blue")] * encoder.images_per_run
    vectors = encoder.embed_images([encoder.read_image(png(colour), LIMITS) for colour, _ in colours])
    np.testing.assert_allclose(vectors, [axis(word) for _, word in colours], atol=1e-6)


def test_the_order_is_kept_over_texts_of_all_lengths(encoder: Encoder) -> None:
    random = np.random.default_rng(1)
    texts = [
        f"{random.choice(WORDS)} " * int(random.integers(1, 17))
        for _ in range(3 * encoder.tokens_per_run // 8)
    ]
    vectors = encoder.embed_texts(encoder.tokenize(texts))
    np.testing.assert_allclose(vectors, [axis(text.split()[0]) for text in texts], atol=1e-6)


def test_padding_does_not_change_a_vector(encoder: Encoder) -> None:
    short, long = encoder.tokenize(["red round", "blue " * 16])
    np.testing.assert_array_equal(encoder.embed_texts([short])[0], encoder.embed_texts([short, long])[0])


def test_runs_stay_within_the_token_limit(encoder: Encoder) -> None:
    pieces = list(encoder._text_pieces(encoder.tokenizer, [[1] * n for n in range(1, 17) for _ in range(40)]))
    assert sum(len(piece) for piece in pieces) == 640
    assert max(piece.size for piece in pieces) <= encoder.tokens_per_run


def test_no_inputs_give_no_vectors(encoder: Encoder) -> None:
    assert encoder.embed_images([]).shape == encoder.embed_texts([]).shape == (0, DIM)


def test_one_file_gives_one_vector_with_and_without_thumbnail(encoder: Encoder) -> None:
    data = png(GREEN, size=700)
    pixels, thumbnail = encoder.read_picture(data, LIMITS)
    np.testing.assert_array_equal(pixels, encoder.read_image(data, LIMITS))
    assert thumbnail[8:12] == b"WEBP"


def test_a_bad_image_is_the_senders_fault(encoder: Encoder) -> None:
    with pytest.raises(BadRequest):
        encoder.read_image(png(RED)[:40], LIMITS)


def test_pixels_of_another_size_are_named(encoder: Encoder) -> None:
    good = encoder.read_image(png(RED), LIMITS)
    with pytest.raises(InvalidField, match=r"Image 1 is uint8 \[4, 4, 3\]; .* takes uint8 \[8, 8, 3\]"):
        encoder.embed_images([good, good[::2, ::2]])


def test_a_vector_without_direction_is_an_error(encoder: Encoder) -> None:
    with pytest.raises(EmbedServeError, match="length 0 instead of 1 for input 1") as raised:
        encoder.embed_texts([[2], [0]])  # padding alone
    assert raised.value.code == "no_direction"


def test_a_vector_that_is_not_finite_is_an_error(folder: Path) -> None:
    table = np.eye(10, DIM, dtype=np.float32)
    table[3] = np.nan
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["rows"]),
        helper.make_node("ReduceMax", ["rows", "axis"], ["out"], keepdims=0),
    ]
    constants = [
        onnx.numpy_helper.from_array(table, "table"),
        onnx.numpy_helper.from_array(np.array([1]), "axis"),
    ]
    write_graph(folder / "text.onnx", nodes, constants=constants)
    reseal(folder)
    encoder = Encoder.load(folder, threads=1)
    np.testing.assert_array_equal(encoder.embed_texts([[0]]), table[:1])
    with pytest.raises(EmbedServeError, match="length nan"):
        encoder.embed_texts([[0], [3]])


def test_a_missing_tower_is_named(folder: Path) -> None:
    image = open_bundle(folder).description.image
    assert image is not None
    reseal(folder, image=None)
    words = Encoder.load(folder, threads=1)
    assert (words.has_images, words.has_text) == (False, True)
    with pytest.raises(InvalidField, match="'tiny' has no image tower"):
        words.read_image(png(RED), LIMITS)
    with pytest.raises(InvalidField, match="no image tower"):
        words.embed_images([])
    reseal(folder, image=image.model_dump(), text=None)
    looks = Encoder.load(folder, threads=1)
    with pytest.raises(InvalidField, match="'tiny' has no text tower"):
        looks.tokenize(["red"])
    with pytest.raises(InvalidField, match="no text tower"):
        looks.embed_texts([[2]])
    looks.prove()


def test_graphs_with_a_batch_of_one_give_the_same_vectors(folder: Path) -> None:
    whole = Encoder.load(folder, threads=1)
    for name in ("image.onnx", "text.onnx"):
        model = onnx.load(folder / name)
        for value in (model.graph.input[0], model.graph.output[0]):
            value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(model, folder / name)
    reseal(folder)
    single = Encoder.load(folder, threads=1)
    pixels = [whole.read_image(png(colour), LIMITS) for colour in (RED, GREEN, BLUE)]
    tokens = whole.tokenize(["red", "blue round small", "dark green"])
    for count in range(4):
        images, texts = pixels[:count], tokens[:count]
        np.testing.assert_array_equal(single.embed_images(images), whole.embed_images(images))
        np.testing.assert_array_equal(single.embed_texts(texts), whole.embed_texts(texts))


GRAPHS = {
    "two inputs": (
        {
            "inputs": [
                ("tokens", TensorProto.INT64, ("batch", "length")),
                ("mask", TensorProto.INT64, ("batch", "length")),
            ]
        },
        r"has 2 inputs \('tokens', 'mask'\)",
    ),
    "int32 ids": (
        {"inputs": [("tokens", TensorProto.INT32, ("batch", "length"))]},
        r"input 'tokens' .* is tensor\(int32\) .* needed is tensor\(int64\) \[batch, length\]",
    ),
    "a batch of two": (
        {"inputs": [("tokens", TensorProto.INT64, (2, "length"))]},
        r"input 'tokens' .* \[2, 'length'\]; needed is",
    ),
    "a fixed length": (
        {"inputs": [("tokens", TensorProto.INT64, ("batch", 77))]},
        r"\['batch', 77\]; needed is",
    ),
    "another dimension": (
        {"output": (TensorProto.FLOAT, ("batch", 5))},
        r"output 'out' .* 5\]; needed is .* 8\]",
    ),
    "half precision out": (
        {"output": (TensorProto.FLOAT16, ("batch", DIM))},
        r"output 'out' .* tensor\(float16\)",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_of_another_form_does_not_load(folder: Path, name: str) -> None:
    changes, message = GRAPHS[name]
    kind, shape = changes.get("output", (TensorProto.FLOAT, ("batch", DIM)))
    dim = shape[1]
    nodes = [
        helper.make_node("Cast", ["tokens"], ["numbers"], to=kind),
        helper.make_node("ReduceSum", ["numbers", "axis"], ["sum"], keepdims=1),
        helper.make_node("Expand", ["sum", "shape"], ["out"]),
    ]
    constants = [
        onnx.numpy_helper.from_array(np.array([1]), "axis"),
        onnx.numpy_helper.from_array(np.array([1, dim]), "shape"),
    ]
    write_graph(folder / "text.onnx", nodes, constants=constants, **changes)
    reseal(folder)
    with pytest.raises(BundleError, match=message):
        Encoder.load(folder, threads=1)


def test_an_output_dimension_that_only_shows_when_run_is_checked(folder: Path) -> None:
    nodes = [helper.make_node("Cast", ["tokens"], ["out"], to=TensorProto.FLOAT)]
    write_graph(folder / "text.onnx", nodes, output=(TensorProto.FLOAT, ("batch", "dim")))
    reseal(folder)
    with pytest.raises(BundleError, match=r"form \[1, 3\] for 1 inputs; .* promises \[1, 8\]"):
        Encoder.load(folder, threads=1).embed_texts([[1, 0, 0]])


def test_a_damaged_graph_is_one_error_and_no_noise(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "image.onnx").write_bytes(b"not a graph")
    reseal(folder)
    with pytest.raises(BundleError, match=r"image\.onnx' cannot be loaded by ONNX Runtime"):
        Encoder.load(folder, threads=1)
    assert capfd.readouterr() == ("", "")


def test_an_altered_file_does_not_load(folder: Path, tmp_path: Path) -> None:
    shutil.copy(write_tiny_bundle(tmp_path / "other", rotate=1).path("text.onnx"), folder / "text.onnx")
    with pytest.raises(BundleError, match="is not the file described"):
        Encoder.load(folder, threads=1)


def with_probe(folder: Path) -> Encoder:
    reseal(folder, probe=Encoder.load(folder, threads=1).make_probe(png(BLUE), "round red").model_dump())
    return Encoder.load(folder, threads=1)


def test_a_probe_proves_the_encoder_that_made_it(folder: Path) -> None:
    proof = with_probe(folder).prove()
    assert proof.image_cosine == pytest.approx(1, abs=1e-6)
    assert proof.text_cosine == pytest.approx(1, abs=1e-6)
    assert 0 < proof.seconds < 10


def test_a_bundle_without_golden_vectors_is_run_all_the_same(folder: Path) -> None:
    proof = Encoder.load(folder, threads=1).prove()
    assert (proof.image_cosine, proof.text_cosine) == (None, None)
    reseal(folder, probe={"text": ""})  # no token, so no direction
    with pytest.raises(BundleError, match=r"text probe .* failed: .* length 0"):
        Encoder.load(folder, threads=1).prove()


def test_the_probe_finds_other_weights_under_right_hashes(folder: Path, tmp_path: Path) -> None:
    with_probe(folder)
    shutil.copy(write_tiny_bundle(tmp_path / "other", rotate=1).path("text.onnx"), folder / "text.onnx")
    reseal(folder)
    with pytest.raises(BundleError, match=r"text probe .* cosine 0\.0000 .* at least 0\.999"):
        Encoder.load(folder, threads=1).prove()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_vector": pack_vector(axis("dark"))}, r"image probe .* cosine 0\.0000"),
        ({"text_vector": pack_vector(np.array([1], np.float32))}, "has 1 values; the encoder gives 8"),
        ({"text_vector": pack_vector(np.full(8, np.nan, np.float32))}, "length nan instead of 1"),
        ({"image_vector": "no base64"}, "not base64"),
        ({"image": "no base64"}, "image is not base64"),
        ({"image": "AAAA"}, "image probe .* failed"),
    ],
)
def test_a_wrong_probe_is_named(folder: Path, change: dict[str, str], message: str) -> None:
    probe = with_probe(folder).bundle.description.probe
    reseal(folder, probe={**probe.model_dump(), **change})
    with pytest.raises(BundleError, match=message):
        Encoder.load(folder, threads=1).prove()


def test_starter_is_the_bundle_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("./starter") == Path("starter")
    monkeypatch.setattr(module.resources, "files", lambda package: tmp_path)
    with pytest.raises(BundleError, match="lacks the starter encoder"):
        resolve("starter")
    write_tiny_bundle(tmp_path / "starter")
    assert Encoder.load("starter", threads=1).name == "tiny"


def test_threads_follow_what_the_process_may_use(encoder: Encoder, tiny_folder: Path) -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
    assert encoder.threads == 1
    assert Encoder.load(tiny_folder).threads == available_cores()


def test_check_reports_what_it_proved(folder: Path) -> None:
    with_probe(folder)
    report = check_bundle(folder, seconds=0.01, threads=1)
    assert report.towers == ("image", "text")
    assert report.files == 4
    assert report.proof.text_cosine == pytest.approx(1, abs=1e-6)
    assert report.speed.resident_bytes > 10_000_000
    assert report.fingerprint == open_bundle(folder).fingerprint


def test_speed_is_measured_for_the_towers_there_are(encoder: Encoder, folder: Path) -> None:
    speed = measure(encoder, 0.01)
    assert speed.images_per_second is not None
    assert speed.images_per_second > 10
    reseal(folder, text=None)
    assert measure(Encoder.load(folder, threads=1), 0).texts_per_second is None


def test_loading_an_encoder_never_imports_torch() -> None:
    command = "import sys, embedserve.towers, embedserve.check; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", command], check=True)
