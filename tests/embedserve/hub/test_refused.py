"""What cannot become a bundle is refused with the reason, and nothing of it stays."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from embedserve.bundle import open_bundle
from embedserve.errors import BundleError, EmbedServeError, InvalidField, NotFound
from embedserve.hub.fetching import Hub
from embedserve.hub.pull import Wishes, pull
from tests.embedserve.hub.conftest import Pull
from tests.embedserve.hub.published import CLIP, DINOV2, IMMICH, QDRANT, QDRANT_TEXT
from tests.tiny_bundle import write_tiny_bundle

Copy = Callable[[str], Path]


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Any:
    yield
    assert not list(tmp_path.glob("bundle*"))
    assert not list(tmp_path.glob(".bundle*"))


def change(path: Path, **settings: object) -> None:
    content = json.loads(path.read_text())
    content.update(settings)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def graph(
    path: Path,
    inputs: Sequence[tuple[str, int, Sequence[int | str]]],
    outputs: Sequence[tuple[str, Sequence[int | str]]],
    *,
    opset: int = 17,
    value: float = 1,
) -> None:
    """A graph that always gives the same; enough for what is read from it before it runs."""
    constants = [
        numpy_helper.from_array(np.full((1, 24), value, np.float32), f"same_{name}") for name, _ in outputs
    ]
    nodes = [helper.make_node("Identity", [f"same_{name}"], [name]) for name, _ in outputs]
    made = helper.make_graph(
        nodes,
        "other",
        [helper.make_tensor_value_info(name, kind, dims) for name, kind, dims in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in outputs],
        constants,
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)


PIXELS = ("pixel_values", TensorProto.FLOAT, ("batch", 3, "height", "width"))
IDS = ("input_ids", TensorProto.INT64, ("batch", "length"))
IMAGE_EMBEDS, TEXT_EMBEDS = ("image_embeds", ("batch", 24)), ("text_embeds", ("batch", 24))


# ---- layouts ---------------------------------------------------------------------------------------------


def test_an_unknown_layout_says_what_was_looked_for_and_found(tmp_path: Path, from_folder: Pull) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("detector.onnx", "config.json"):
        (folder / name).write_text("{}")
    with pytest.raises(BundleError, match="no layout that is known") as raised:
        from_folder(folder)
    for part in ("visual/model.onnx", "onnx/vision_model", "onnx/model", "Found 2 files: detector.onnx"):
        assert part in str(raised.value)


def test_a_repository_without_graphs_says_so(tmp_path: Path, from_folder: Pull) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(BundleError, match=r"Found 1 files and no \.onnx: model\.safetensors"):
        from_folder(folder)


def test_an_unknown_variant_is_answered_with_the_closest(
    from_folder: Pull, root: Path, published: Any
) -> None:
    with pytest.raises(InvalidField, match="no variant 'quantised'; did you mean 'quantized'"):
        from_folder(root / CLIP, variant="quantised")


def test_a_variant_that_is_missing_is_answered_with_those_there(
    from_folder: Pull, root: Path, published: Any
) -> None:
    with pytest.raises(NotFound, match=r"vision_model_q4\.onnx'\. .* there: fp32, fp16, quantized"):
        from_folder(root / CLIP, variant="q4")
    with pytest.raises(NotFound, match="no variant 'fp16'; leave --variant out"):
        from_folder(root / IMMICH, variant="fp16")


def test_two_image_towers_are_too_many(from_folder: Pull, root: Path, published: Any) -> None:
    with pytest.raises(BundleError, match="both hold an image tower; pull them one by one"):
        from_folder(root / QDRANT, root / DINOV2)


def test_towers_of_two_models_are_refused(copy_of: Copy, from_folder: Pull) -> None:
    images, texts = copy_of(DINOV2), copy_of(QDRANT_TEXT)
    with pytest.raises(BundleError, match=r"vectors of different lengths \(24, 32\)"):
        from_folder(images, texts)


def test_a_vision_transformer_of_an_unknown_type_is_refused(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(DINOV2)
    change(folder / "config.json", model_type="dinov22")
    with pytest.raises(BundleError, match=r"of the type 'dinov22', .* did you mean 'dinov2'"):
        from_folder(folder)


# ---- graphs ----------------------------------------------------------------------------------------------


def test_a_file_that_is_no_graph_is_named(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(DINOV2)
    (folder / "onnx/model.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(BundleError, match="is not an ONNX file"):
        from_folder(folder)


GRAPHS = {
    "logits": (
        [PIXELS],
        [("logits", ("batch", 1000))],
        r"has the outputs logits; looked for was image_embeds",
    ),
    "two inputs": (
        [PIXELS, ("pixel_mask", TensorProto.INT64, ("batch", "height", "width"))],
        [IMAGE_EMBEDS],
        r"takes 'pixel_values' float \['batch', 3, .*, 'pixel_mask' int64 .*; needed is one input of images",
    ),
    "patches": (
        [("pixel_values", TensorProto.FLOAT, ("batch", "patches", 768))],
        [IMAGE_EMBEDS],
        r"needed is one input of images",
    ),
    "another size": (
        [("pixel_values", TensorProto.FLOAT, ("batch", 3, 64, 64))],
        [IMAGE_EMBEDS],
        r"64, 64\], but the preprocessing beside it gives 32 × 32",
    ),
    "batches of four": (
        [("pixel_values", TensorProto.FLOAT, (4, 3, 32, 32))],
        [IMAGE_EMBEDS],
        r"batches of 4 only",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_vision_graph_of_another_form_is_refused(copy_of: Copy, from_folder: Pull, name: str) -> None:
    inputs, outputs, message = GRAPHS[name]
    folder = copy_of(CLIP)
    graph(folder / "onnx/vision_model.onnx", inputs, outputs)
    with pytest.raises(BundleError, match=message):
        from_folder(folder)


def test_a_text_graph_that_wants_more_than_ids_is_refused(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(CLIP)
    positions = ("position_ids", TensorProto.INT64, ("batch", "length"))
    graph(folder / "onnx/text_model.onnx", [IDS, positions], [TEXT_EMBEDS])
    with pytest.raises(BundleError, match=r"'position_ids' int64 .*; needed is one input of token ids"):
        from_folder(folder)


def test_a_text_graph_of_another_length_than_its_files_say_is_refused(
    copy_of: Copy, from_folder: Pull
) -> None:
    folder = copy_of(IMMICH)
    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", text_cfg={**config["text_cfg"], "context_length": 64})
    with pytest.raises(BundleError, match="takes texts of 77 tokens, but the files beside it say 64"):
        from_folder(folder)


def test_an_output_of_patches_is_refused_where_no_rule_pools_them(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(DINOV2)
    (folder / "onnx/model.onnx").rename(folder / "model.onnx")
    with pytest.raises(BundleError, match=r"has the form \[1, 17, 32\]; needed is one vector"):
        from_folder(folder)


def test_an_opset_from_the_past_is_refused(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(CLIP)
    graph(folder / "onnx/vision_model.onnx", [PIXELS], [IMAGE_EMBEDS], opset=9)
    with pytest.raises(BundleError, match="opset 9; 11 is the oldest"):
        from_folder(folder)


# ---- what the files beside the graph say ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": None, "do_center_crop": False}, "images keep different sizes"),
        ({"size": None}, "does not resize images to one size"),
        ({"do_resize": False}, "does not resize images to one size"),
        ({"size": {"longest_edge": 32}}, r"gives the size as \{'longest_edge': 32\}"),
        ({"resample": 0}, "says resample=0; known are 1"),
        (
            {"size": {"height": 40, "width": 80}},
            r"stretches images to \(40, 80\) and crops them to \(32, 32\)",
        ),
    ],
)
def test_preprocessing_that_cannot_be_served_is_refused(
    copy_of: Copy, from_folder: Pull, settings: dict[str, Any], message: str
) -> None:
    folder = copy_of(DINOV2)
    change(folder / "preprocessor_config.json", **settings)
    with pytest.raises(BundleError, match=message):
        from_folder(folder)


def test_a_resize_mode_that_open_clip_does_not_have_is_refused(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(IMMICH)
    change(folder / "visual/preprocess_cfg.json", resize_mode="cover")
    with pytest.raises(BundleError, match="resize_mode='cover' for 32 × 32"):
        from_folder(folder)


@pytest.mark.parametrize(
    "settings", [{"mean": None}, {"std": "0.5"}, {"mean": [0.5]}, {"size": [-3, -3]}, {"size": "large"}]
)
def test_settings_that_make_no_sense_are_refused(
    copy_of: Copy, from_folder: Pull, settings: dict[str, Any]
) -> None:
    folder = copy_of(IMMICH)
    change(folder / "visual/preprocess_cfg.json", **settings)
    with pytest.raises(BundleError, match=r"is not as the immich layout has it|gives the size as"):
        from_folder(folder)


def test_a_tokenizer_that_does_not_say_how_it_pads_is_refused(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(CLIP)
    change(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(BundleError, match="does not say which token pads"):
        from_folder(folder)
    change(folder / "tokenizer_config.json", pad_token="<nothing>")
    with pytest.raises(BundleError, match="pads with '<nothing>', which is no token"):
        from_folder(folder)


def test_a_damaged_tokenizer_is_named(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(CLIP)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="is not in the Hugging Face tokenizers format"):
        from_folder(folder)


# ---- proof -----------------------------------------------------------------------------------------------


def brightness(path: Path, *, over: Sequence[int]) -> None:
    """A vision graph with free batch: the mean colour, and beside it the brightness over the axes `over`."""
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values"], ["colour"], axes=[2, 3], keepdims=0),
        helper.make_node("ReduceMean", ["pixel_values"], ["light"], axes=list(over), keepdims=1),
        helper.make_node("Squeeze", ["light", "flat"], ["line"]),
        helper.make_node("MatMul", ["colour", "weights"], ["spread"]),
        helper.make_node("Add", ["spread", "line"], ["image_embeds"]),
    ]
    weights = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)
    made = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info(*PIXELS)],
        [helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ("batch", 24))],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(np.array([2, 3]), "flat")],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def test_a_graph_that_is_wrong_for_batches_is_refused(copy_of: Copy, from_folder: Pull) -> None:
    """It declares any batch, but what it gives an image depends on the others."""
    folder = copy_of(CLIP)
    brightness(folder / "onnx/vision_model.onnx", over=[0, 1, 2, 3])
    with pytest.raises(BundleError, match="another vector in a batch than alone"):
        from_folder(folder)


def test_a_graph_that_gives_no_direction_is_refused(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(CLIP)
    graph(folder / "onnx/vision_model.onnx", [PIXELS], [IMAGE_EMBEDS], value=0)
    with pytest.raises(BundleError, match="a vector of length 0 for input 0"):
        from_folder(folder)


# ---- weights outside -------------------------------------------------------------------------------------


def outside(folder: Path, location: str) -> None:
    path = folder / "onnx/model.onnx"
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=64)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, path)


@pytest.mark.parametrize("location", ["../../../../etc/passwd", "/etc/passwd"])
def test_weights_that_lie_outside_of_the_repository_are_refused(
    copy_of: Copy, from_folder: Pull, location: str
) -> None:
    folder = copy_of(DINOV2)
    outside(folder, location)
    with pytest.raises(BundleError, match="names weights outside of it"):
        from_folder(folder)


def test_weights_that_were_not_copied_are_named(copy_of: Copy, from_folder: Pull) -> None:
    folder = copy_of(DINOV2)
    outside(folder, "model.onnx_data")
    with pytest.raises(NotFound, match=r"has no file 'onnx/model\.onnx_data'"):
        from_folder(folder)


# ---- where it goes ---------------------------------------------------------------------------------------


def test_a_folder_with_something_else_is_left_alone(root: Path, published: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="exists and is not an encoder bundle"):
        pull([str(root / DINOV2)], tmp_path / "mine", Wishes(), Hub())
    assert (tmp_path / "mine/thesis.txt").read_text() == "mine"


def test_a_bundle_is_replaced_only_by_a_proven_one(
    root: Path, published: Any, copy_of: Copy, tmp_path: Path
) -> None:
    before = write_tiny_bundle(tmp_path / "old").fingerprint
    broken = copy_of(DINOV2)
    (broken / "onnx/model.onnx").write_bytes(b"")
    with pytest.raises(EmbedServeError):
        pull([str(broken)], tmp_path / "old", Wishes(), Hub())
    assert open_bundle(tmp_path / "old").fingerprint == before
    pull([str(root / DINOV2)], tmp_path / "old", Wishes(), Hub())
    assert open_bundle(tmp_path / "old").name == "tiny-dinov2"
