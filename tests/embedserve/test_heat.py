"""Patches, attention and the maps drawn from them."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from embedserve.bundle import Description, ImageOutputs, Preprocessing, open_bundle, seal
from embedserve.check import check_bundle
from embedserve.config import Limits, ServeConfig
from embedserve.encoder import Encoder
from embedserve.errors import BundleError, EmbedServeError, InvalidField
from embedserve.heat import attention_grid, overlay, require_text_space, similarity_grid
from embedserve.preprocess import preprocess, region
from embedserve.towers import Look, Towers
from tests.embedserve.colours import BLUE, GREEN, RED, axis, png, quarters
from tests.tiny_bundle import DIM, OUTPUTS, write_tiny_bundle

BLACK = (0, 0, 0)
LIMITS = Limits()


@pytest.fixture(scope="module")
def seeing(seeing_folder: Path) -> Encoder:
    return Encoder.load(seeing_folder, threads=1)


@pytest.fixture
def folder(seeing_folder: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that may be changed."""
    return Path(shutil.copytree(seeing_folder, tmp_path / "bundle"))


def reseal(folder: Path, outputs: ImageOutputs | None) -> None:
    described = open_bundle(folder, verify=False).description
    assert described.image
    image = described.image.model_copy(update={"outputs": outputs})
    seal(folder, Description.model_validate({**described.model_dump(), "image": image.model_dump()}))


def reshape_when_run(folder: Path, cells: list[int]) -> None:
    """Gives the colours of the cells another form, which ONNX Runtime learns only when it runs the graph."""
    model = onnx.load(folder / "image.onnx")
    graph = model.graph
    (constant,) = [one for one in graph.initializer if one.name == "cells"]
    constant.CopyFrom(onnx.numpy_helper.from_array(np.array(cells), "given"))
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "at_most"))
    nodes = [
        helper.make_node("Shape", ["pixels"], ["batch_size"], start=0, end=1),
        helper.make_node("Min", ["batch_size", "at_most"], ["one_when_run"]),
        helper.make_node("Mul", ["given", "one_when_run"], ["cells"]),
    ]
    others = list(graph.node)
    outputs = [graph.output[0]]
    outputs += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", name, f"{name}_length"])
        for name in ("patches", "attention")
    ]
    del graph.node[:], graph.output[:]
    graph.node.extend([*nodes, *others])
    graph.output.extend(outputs)
    onnx.save(model, folder / "image.onnx")


# ---- the outputs -------------------------------------------------------------------------------------


def test_every_cell_has_its_patch_and_its_share_of_attention(seeing: Encoder) -> None:
    data = quarters(RED, GREEN, BLUE, BLACK)
    looks = seeing.look([seeing.read_image(data, LIMITS)], ["patches", "attention"])
    np.testing.assert_allclose(
        looks.outputs["patches"][0], [axis("red"), axis("green"), axis("blue"), axis("dark")], atol=1e-6
    )
    third = 1 / 3
    np.testing.assert_allclose(
        looks.outputs["attention"][0], [[third, third, third, 0], [1, 0, 0, 0]], atol=1e-6
    )


def test_the_vector_is_the_same_with_and_without_them(seeing: Encoder) -> None:
    pixels = [seeing.read_image(quarters(RED, GREEN, BLUE, colour), LIMITS) for colour in (RED, BLACK)]
    alone = seeing.embed_images(pixels)
    for names in (["patches"], ["attention"], ["attention", "patches"]):
        looks = seeing.look(pixels, names)
        np.testing.assert_array_equal(looks.vectors, alone)
        assert sorted(looks.outputs) == names


def test_more_images_than_one_run_takes_keep_their_order(seeing: Encoder) -> None:
    colours = [RED, GREEN, BLUE] * seeing.images_per_run
    looks = seeing.look([seeing.read_image(png(colour), LIMITS) for colour in colours], ["patches"])
    wanted = np.array([[axis(("red", "green", "blue")[i % 3])] * 4 for i in range(len(colours))])
    np.testing.assert_allclose(looks.outputs["patches"], wanted, atol=1e-6)


def test_who_asks_for_vectors_only_does_not_compute_the_rest(folder: Path) -> None:
    """The part of the graph behind the patches fails when it is run: fetching the embedding alone works."""
    reshape_when_run(folder, [0, 3, 5])
    reseal(folder, OUTPUTS)
    encoder = Encoder.load(folder, threads=1)
    pixels = [encoder.read_image(png(RED), LIMITS)]
    np.testing.assert_allclose(encoder.embed_images(pixels), [axis("red")], atol=1e-6)
    with pytest.raises(Exception, match=r"reshape|Reshape"):
        encoder.look(pixels, ["patches"])


def test_an_encoder_that_offers_nothing_says_so(tiny_folder: Path) -> None:
    encoder = Encoder.load(tiny_folder, threads=1)
    with pytest.raises(InvalidField, match="'tiny' gives no 'attention'") as caught:
        encoder.look([], ["attention"])
    assert caught.value.code == "no_such_output"


# ---- what the bundle promises ------------------------------------------------------------------------


def test_a_promised_output_that_is_not_there_does_not_load(folder: Path, tiny_folder: Path) -> None:
    shutil.copy(tiny_folder / "image.onnx", folder / "image.onnx")
    reseal(folder, OUTPUTS)
    with pytest.raises(BundleError, match=r"no output 'patches' behind the embedding.*there: none"):
        Encoder.load(folder, threads=1)


@pytest.mark.parametrize(
    "outputs",
    [
        ImageOutputs(rows=3, columns=2, attention=2),
        ImageOutputs(rows=2, columns=2, attention=3),
        ImageOutputs(rows=2, columns=2, patches=5),
    ],
)
def test_an_output_of_another_form_does_not_load(folder: Path, outputs: ImageOutputs) -> None:
    reseal(folder, outputs)
    with pytest.raises(BundleError, match=r"The output '(attention|patches)' of .* needed is"):
        Encoder.load(folder, threads=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patches": None, "attention": None, "text_space": False}, "name the length of 'patches'"),
        ({"patches": None}, "'text_space' speaks of 'patches'"),
        ({"patches": 7}, "need a text tower and 8 numbers"),
        ({"rows": 0}, "rows"),
    ],
)
def test_promises_that_make_no_sense_are_malformed(folder: Path, changes: dict, message: str) -> None:
    manifest = folder / "encoder.json"
    document = json.loads(manifest.read_text())
    document["image"]["outputs"].update(changes)
    manifest.write_text(json.dumps(document))
    with pytest.raises(BundleError, match=message):
        open_bundle(folder)


def test_outputs_leave_the_fingerprint_alone(folder: Path) -> None:
    before = open_bundle(folder).fingerprint
    reseal(folder, None)
    assert open_bundle(folder).fingerprint == before


def test_check_proves_the_outputs(seeing_folder: Path) -> None:
    report = check_bundle(seeing_folder, seconds=0, threads=1, device="cpu")
    patches, attention = report.outputs
    assert (patches.name, patches.shape, patches.text_space) == ("patches", (4, DIM), True)
    assert (attention.name, attention.shape) == ("attention", (2, 4))
    assert report.dims == (4, 6)


def test_check_refuses_attention_that_is_none(folder: Path) -> None:
    """The shares without the division: sums of brightness."""
    model = onnx.load(folder / "image.onnx")
    (division,) = [node for node in model.graph.node if node.output == ["attention"]]
    division.input[1] = "tiny"
    onnx.save(model, folder / "image.onnx")
    reseal(folder, OUTPUTS)
    with pytest.raises(BundleError, match="sum up to more than 1"):
        check_bundle(folder, seconds=0, threads=1, device="cpu")


def test_check_refuses_an_output_that_only_shows_its_form_when_run(folder: Path) -> None:
    reshape_when_run(folder, [0, 6, 2])
    reseal(folder, ImageOutputs(rows=2, columns=2, attention=2))
    with pytest.raises(
        BundleError, match=r"'attention' of .* is \[2, 2\], or not finite; \[2, 4\] is described"
    ):
        check_bundle(folder, seconds=0, threads=1, device="cpu")


# ---- maps --------------------------------------------------------------------------------------------


def test_attention_is_the_mean_of_the_heads_or_one_of_them() -> None:
    outputs = ImageOutputs(rows=2, columns=3, attention=4)
    weights = np.random.default_rng(0).random((4, 6), np.float32)
    mean = [
        [sum(weights[head][3 * row + column] for head in range(4)) / 4 for column in range(3)]
        for row in (0, 1)
    ]
    np.testing.assert_allclose(attention_grid(weights, outputs), mean, rtol=1e-6)
    np.testing.assert_array_equal(attention_grid(weights, outputs, 2), weights[2].reshape(2, 3))
    with pytest.raises(InvalidField, match=r"'head' is 4; this encoder has 4 heads\. Ask for 0 to 3"):
        attention_grid(weights, outputs, 4)


def test_similarity_is_the_cosine_of_every_cell() -> None:
    outputs = ImageOutputs(rows=2, columns=2, patches=5, text_space=True)
    random = np.random.default_rng(1)
    patches = random.normal(size=(4, 5)).astype(np.float32)
    patches[3] = 0
    vector = random.normal(size=5).astype(np.float32)
    vector /= np.linalg.norm(vector)
    grid = similarity_grid(patches, outputs, vector)
    for cell in range(3):
        expected = sum(float(a) * float(b) for a, b in zip(patches[cell], vector, strict=True))
        expected /= sum(float(a) ** 2 for a in patches[cell]) ** 0.5
        assert grid[divmod(cell, 2)] == pytest.approx(expected, abs=1e-5)
    assert grid[1, 1] == 0


def test_patches_of_another_space_are_not_compared_with_texts() -> None:
    with pytest.raises(InvalidField, match="do not lie in the space of its texts"):
        require_text_space(ImageOutputs(rows=1, columns=1, patches=4))


def test_the_overlay_is_bright_where_the_map_is_high() -> None:
    pixels = np.full((40, 60, 3), 128, np.uint8)
    grid = np.array([[0, 0, 0], [0, 0, 9]], np.float32)
    picture = Image.open(io.BytesIO(overlay(pixels, grid)))
    assert picture.size == (60, 40)
    bright = np.asarray(picture.convert("L")).astype(int)
    assert bright[35, 55] > bright[5, 5] + 80
    corner = [bright[35, 55], bright[20, 40], bright[5, 5]]
    assert corner == sorted(corner, reverse=True)


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_a_flat_map_has_no_contrast(value: float) -> None:
    pixels = np.full((16, 16, 3), 200, np.uint8)
    picture = np.asarray(Image.open(io.BytesIO(overlay(pixels, np.full((2, 2), value, np.float32)))))
    assert (picture == picture[0, 0]).all()


# ---- which part of the image -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "size", "expected"),
    [
        (Preprocessing(height=8, width=8, resize_to=8), (32, 8), (0.375, 0, 0.25, 1)),
        (Preprocessing(height=8, width=8, resize_to=16), (16, 16), (0.25, 0.25, 0.5, 0.5)),
        (Preprocessing(height=8, width=8, resize_to=8, resize="squash"), (90, 30), (0, 0, 1, 1)),
        (Preprocessing(height=8, width=8, resize_to=8, resize="longest"), (32, 16), (0, -0.5, 1, 2)),
    ],
)
def test_the_region_is_the_part_that_survives_the_crop(
    spec: Preprocessing, size: tuple[int, int], expected: tuple[float, ...]
) -> None:
    found = region(*size, spec)
    assert (found.left, found.top, found.width, found.height) == pytest.approx(expected)


def test_the_region_and_the_pixels_agree() -> None:
    """A ramp from left to right: the first and the last pixel show where they come from."""
    spec = Preprocessing(height=10, width=10, resize_to=10, interpolation="bilinear")
    ramp = np.tile(np.linspace(0, 255, 400), (100, 1)).astype(np.uint8)
    image = Image.fromarray(np.stack([ramp] * 3, axis=2))
    pixels, seen = preprocess(image, spec), region(400, 100, spec)
    step = seen.width / 10
    assert pixels[5, 0, 0] / 255 == pytest.approx(seen.left + step / 2, abs=0.02)
    assert pixels[5, 9, 0] / 255 == pytest.approx(seen.left + seen.width - step / 2, abs=0.02)


# ---- through the queue -------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_looks_come_in_order_and_a_bad_image_fails_alone(seeing: Encoder) -> None:
    towers = Towers(seeing, ServeConfig(threads=1))
    await towers.start()
    try:
        data = [png(RED), b"no image", *[png(GREEN)] * 20, quarters(BLUE, BLUE, RED, RED)]
        looks = await towers.looks(data, ["attention"])
        vectors = await towers.images(data)
    finally:
        await towers.close()
    assert [isinstance(one, EmbedServeError) for one in looks] == [i == 1 for i in range(len(data))]
    for look, vector in zip(looks, vectors, strict=True):
        if isinstance(look, Look):
            np.testing.assert_array_equal(look.vector, vector)
            assert list(look.outputs) == ["attention"]
            assert look.pixels.shape == (8, 8, 3)
    assert isinstance(looks[-1], Look)
    np.testing.assert_allclose(looks[-1].outputs["attention"][1], [0, 0, 0.5, 0.5], atol=1e-6)


def test_a_bundle_written_with_outputs_serves_vectors_as_one_without(
    tmp_path: Path, tiny_folder: Path
) -> None:
    plain = Encoder.load(tiny_folder, threads=1)
    seeing = Encoder(write_tiny_bundle(tmp_path / "b", outputs=OUTPUTS), threads=1)
    pixels = [plain.read_image(quarters(RED, RED, BLUE, BLACK), LIMITS)]
    np.testing.assert_array_equal(plain.embed_images(pixels), seeing.embed_images(pixels))
