"""Every known layout becomes a bundle that gives the vectors PyTorch gives for the same weights."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest

from embedserve.check import check_bundle
from embedserve.config import Limits
from embedserve.encoder import Encoder
from embedserve.hub.proof import TEXTS, images, png
from tests.embedserve.hub import published as names
from tests.embedserve.hub.conftest import Pull
from tests.embedserve.hub.networks import Network
from tests.embedserve.hub.small_hub import SmallHub

LAYOUTS = {
    "immich, uint8 and any batch": ((names.IMMICH,), "immich"),
    "immich, float32 and a batch of one": ((names.OLD_IMMICH,), "immich"),
    "immich, SigLIP": ((names.IMMICH_SIGLIP,), "immich"),
    "transformers.js, CLIP": ((names.CLIP,), "transformers.js"),
    "transformers.js, CLIP with a mask": ((names.MASKED_CLIP,), "transformers.js"),
    "transformers.js, SigLIP": ((names.SIGLIP,), "transformers.js"),
    "DINOv2": ((names.DINOV2,), "dinov2"),
    "Qdrant, two repositories": ((names.QDRANT, names.QDRANT_TEXT), "qdrant"),
}


def image_vectors(encoder: Encoder) -> np.ndarray:
    return encoder.embed_images([encoder.read_image(png(image), Limits()) for image in images()])


def least_cosine(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float((ours * theirs).sum(axis=1).min())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_vectors_are_those_of_pytorch(pulled: Pull, published: dict[str, Network], layout: str) -> None:
    repositories, name = LAYOUTS[layout]
    network = published[repositories[0]]
    bundle = pulled(*repositories).bundle
    described = bundle.description
    encoder = Encoder.load(bundle.folder, threads=1)
    proof = encoder.prove()
    assert f"({name} layout)" in described.source
    assert (encoder.has_images, encoder.has_text) == (network.images is not None, network.texts is not None)
    if network.images is not None:
        assert least_cosine(image_vectors(encoder), network.images(images())) >= 0.9999
        assert described.parity["image"]["min_cosine"] >= 0.9999
        assert proof.image_cosine == pytest.approx(1, abs=1e-4)
    if network.texts is not None:
        assert least_cosine(encoder.embed_texts(encoder.tokenize(TEXTS)), network.texts(TEXTS)) >= 0.9999
        assert described.parity["text"]["min_cosine"] >= 0.9999
        assert proof.text_cosine == pytest.approx(1, abs=1e-4)


def test_the_vectors_that_are_compared_differ_from_one_another(published: dict[str, Network]) -> None:
    """Else a cosine of 1 would say nothing."""
    for network in published.values():
        found = [network.images(images())] if network.images else []
        found += [network.texts(TEXTS)] if network.texts else []
        for vectors in found:
            others = (vectors @ vectors.T)[~np.eye(len(vectors), dtype=bool)]
            assert np.median(others) < 0.95


@pytest.mark.parametrize(
    ("repository", "text"),
    [
        (names.CLIP, {"context_length": 77, "padding": "longest"}),
        (names.IMMICH, {"context_length": 77, "padding": "context"}),
        (names.SIGLIP, {"context_length": 64, "padding": "context"}),
        (names.IMMICH_SIGLIP, {"context_length": 64, "padding": "context"}),
    ],
)
def test_texts_are_padded_as_the_model_was_trained(
    pulled: Pull, repository: str, text: dict[str, object]
) -> None:
    described = pulled(repository).bundle.description
    assert described.text is not None
    assert described.text.model_dump(include=set(text)) == text


def test_what_the_files_do_not_say_is_assumed_and_told(pulled: Pull) -> None:
    clip = pulled(names.CLIP)
    assert clip.bundle.description.scoring.model_dump() == {
        "activation": "softmax",
        "logit_scale": 100.0,
        "logit_bias": 0.0,
    }
    [warning] = clip.warnings
    assert "--logit-scale 100 is assumed" in warning
    assert warning in (clip.bundle.folder / "README.md").read_text(encoding="utf-8")
    siglip = pulled(names.SIGLIP)
    assert siglip.bundle.description.scoring.activation == "sigmoid"
    assert "--logit-bias -12.93 are assumed" in siglip.warnings[0]
    assert pulled(names.DINOV2).warnings == ()  # no texts, no probabilities


def test_a_scale_that_is_given_is_not_guessed(from_hub: Pull) -> None:
    clip = from_hub(names.CLIP, logit_scale=42.5, activation="sigmoid", logit_bias=-3.0)
    assert clip.bundle.description.scoring.model_dump() == {
        "activation": "sigmoid",
        "logit_scale": 42.5,
        "logit_bias": -3.0,
    }
    assert clip.warnings == ()
    siglip = from_hub(names.IMMICH_SIGLIP, logit_scale=110.0, logit_bias=-11.0)
    assert siglip.bundle.description.scoring.logit_bias == -11.0
    assert not any("assumed" in warning for warning in siglip.warnings)


@pytest.mark.parametrize(("variant", "precision"), [("fp16", "float16"), ("quantized", "quantised")])
def test_a_variant_keeps_its_precision(
    from_hub: Pull, published: dict[str, Network], variant: str, precision: str
) -> None:
    network = published[names.CLIP]
    bundle = from_hub(names.CLIP, variant=variant).bundle
    encoder = Encoder.load(bundle.folder, threads=1)
    assert bundle.name == f"tiny-clip-{variant}"
    assert bundle.description.precision == precision
    assert bundle.description.parity["image"]["min_cosine"] >= 0.9999  # to their own graph of that precision
    assert network.images is not None
    assert network.texts is not None
    assert 0.97 < least_cosine(image_vectors(encoder), network.images(images())) < 1 - 1e-7
    assert 0.97 < least_cosine(encoder.embed_texts(encoder.tokenize(TEXTS)), network.texts(TEXTS)) < 1 - 1e-7


def test_weights_outside_of_a_graph_come_along(
    from_hub: Pull, small_hub: SmallHub, published: dict[str, Network]
) -> None:
    bundle = from_hub(names.LARGE).bundle
    assert f"{names.LARGE}/onnx/text_model.onnx_data" in small_hub.fetched()
    weights = {"image.onnx_data", "text.onnx_data"}
    files = {"image.onnx", "text.onnx", "tokenizer.json", "README.md", *weights}
    assert set(bundle.description.files) == files
    assert {path.name for path in bundle.folder.iterdir()} == {*files, "encoder.json"}
    for name in weights:
        assert bundle.path(name).stat().st_size > 20 * 1024
        assert not bundle.path(name).is_symlink()  # as the files in the cache are
    network = published[names.LARGE]
    assert network.images is not None
    encoder = Encoder.load(bundle.folder, threads=1)
    assert least_cosine(image_vectors(encoder), network.images(images())) >= 0.9999


def test_an_old_export_serves_batches_one_by_one(pulled: Pull) -> None:
    bundle = pulled(names.OLD_IMMICH).bundle
    session = ort.InferenceSession(bundle.path("image.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 32, 32, 3]
    report = check_bundle(bundle.folder, seconds=0.01, threads=1)
    assert report.speed.images_per_second is not None
    assert report.speed.texts_per_second is not None


def test_the_card_and_the_manifest_say_where_it_is_from(pulled: Pull, small_hub: SmallHub) -> None:
    bundle = pulled(names.QDRANT, names.QDRANT_TEXT).bundle
    commits = [small_hub.commit(name) for name in (names.QDRANT, names.QDRANT_TEXT)]
    assert bundle.name == "tiny-clip"
    assert bundle.description.licence == "mit"
    card = (bundle.folder / "README.md").read_text(encoding="utf-8")
    for name, commit in zip((names.QDRANT, names.QDRANT_TEXT), commits, strict=True):
        assert f"{name}@{commit}" in bundle.description.source
        assert f"{name}@{commit}" in card
    assert "| image | 17 | 1.0000" in card
