"""The starter, built from its packages once for all tests here (about 30 s), and what it promises."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")
if importlib.util.find_spec("all_minilm_l6_v2") is None:  # importing it would print a line
    pytest.skip("the starter's weights are not installed (extra 'train')", allow_module_level=True)

from embedserve.bundle import Bundle, open_bundle  # noqa: E402
from embedserve.config import Limits  # noqa: E402
from embedserve.encoder import Encoder, resolve  # noqa: E402
from embedserve.errors import BundleError  # noqa: E402
from training import torchvision_ops  # noqa: E402
from training.export import export  # noqa: E402
from training.starter import build, sources  # noqa: E402

TEXTS = [
    "",
    "a dog",
    "Ein Hund, 狗, كلب 🐕",
    "a red tractor on a green field under a blue sky",
    "word " * 400,
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export("starter", tmp_path_factory.mktemp("export") / "starter")


@pytest.fixture(scope="module")
def encoder(bundle: Bundle) -> Encoder:
    return Encoder.load(bundle.folder)


@pytest.fixture(scope="module")
def joined() -> build.Networks:
    return build.networks()


def png(seed: int, size: tuple[int, int] = (90, 60)) -> bytes:
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=1)


def test_the_bundle_is_small_and_proves_itself(bundle: Bundle, encoder: Encoder) -> None:
    sizes = {path.name: path.stat().st_size for path in bundle.folder.iterdir()}
    assert sum(sizes.values()) < 45e6
    assert max(sizes.values()) < 30e6
    assert {"README.md", "LICENSES.md", "image.onnx", "text.onnx", "tokenizer.json"} <= set(sizes)
    proof = encoder.prove()
    assert proof.image_cosine is not None
    assert proof.image_cosine >= proof.min_cosine
    assert proof.text_cosine is not None
    assert proof.text_cosine >= proof.min_cosine


def test_the_same_packages_give_the_bundle_that_is_shipped(bundle: Bundle) -> None:
    shipped = open_bundle(resolve("starter"))
    assert bundle.description.image == shipped.description.image
    assert bundle.description.text == shipped.description.text
    for name in ("tokenizer.json", "LICENSES.md"):
        assert bundle.description.files[name] == shipped.description.files[name]
    # Graphs hold numbers that were computed here, so another processor may round them otherwise.
    ours, theirs = Encoder.load(bundle.folder), Encoder.load(shipped.folder)
    pixels = [ours.read_image(png(seed), Limits()) for seed in range(6)]
    assert cosines(ours.embed_images(pixels), theirs.embed_images(pixels)).min() > 0.999
    tokens = ours.tokenize(TEXTS)
    assert cosines(ours.embed_texts(tokens), theirs.embed_texts(tokens)).min() > 0.9999


def test_images_agree_with_pytorch(encoder: Encoder, joined: build.Networks) -> None:
    pixels = [encoder.read_image(png(seed, (40 * seed + 30, 100)), Limits()) for seed in range(12)]
    assert cosines(encoder.embed_images(pixels), joined.embed_images(np.stack(pixels)).numpy()).min() > 0.999


def test_texts_agree_with_pytorch_and_its_tokens(encoder: Encoder, joined: build.Networks) -> None:
    assert encoder.tokenize(TEXTS) == joined.tokens(TEXTS)
    assert [len(ids) for ids in encoder.tokenize(TEXTS)][-1] == sources.CONTEXT_LENGTH
    found = encoder.embed_texts(encoder.tokenize(TEXTS))
    assert cosines(found, joined.embed_texts(TEXTS).numpy()).min() > 0.998


def test_texts_agree_with_hugging_faces_bert(joined: build.Networks) -> None:
    torchvision_ops.register()  # transformers imports torchvision
    from transformers import BertConfig, BertModel

    model = BertModel(
        BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536), add_pooling_layer=False
    )
    weights = sources.sentence_weights()
    known = model.state_dict()
    model.load_state_dict({name: weights[name] for name in known if name in weights}, strict=False)
    assert {name for name in known if name not in weights} <= {
        "embeddings.position_ids",
        "embeddings.token_type_ids",
    }
    for ids in joined.tokens(TEXTS):
        with torch.no_grad():
            states = model.eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
            ours = joined.text(torch.tensor([ids]))[0, :384]
        pooled = states.mean(dim=0)
        assert float(ours @ pooled / pooled.norm()) > 0.99999


def test_the_visual_part_of_a_text_is_exactly_zero(encoder: Encoder) -> None:
    vectors = encoder.embed_texts(encoder.tokenize(TEXTS))
    assert not vectors[:, 384:].any()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_an_image_is_one_quarter_meaning_and_three_quarters_looks(encoder: Encoder) -> None:
    vectors = encoder.embed_images([encoder.read_image(png(seed), Limits()) for seed in range(5)])
    np.testing.assert_allclose((vectors[:, :384] ** 2).sum(axis=1), 1 - build.LOOKS, atol=1e-5)
    np.testing.assert_allclose((vectors[:, 384:] ** 2).sum(axis=1), build.LOOKS, atol=1e-5)


def test_a_text_has_the_same_vector_alone_and_in_any_batch(encoder: Encoder) -> None:
    tokens = encoder.tokenize(TEXTS)
    alone = np.concatenate([encoder.embed_texts([ids]) for ids in tokens])
    np.testing.assert_allclose(encoder.embed_texts(tokens), alone, atol=2e-6)
    np.testing.assert_allclose(encoder.embed_texts(tokens[::-1])[::-1], alone, atol=2e-6)


def test_an_image_has_the_same_vector_alone_and_in_any_batch(encoder: Encoder) -> None:
    pixels = [encoder.read_image(png(seed), Limits()) for seed in range(5)]
    alone = np.concatenate([encoder.embed_images([one]) for one in pixels])
    np.testing.assert_allclose(encoder.embed_images(pixels), alone, atol=1e-5)


def test_blank_pictures_have_a_direction(encoder: Encoder) -> None:
    pixels = [np.full((224, 224, 3), value, np.uint8) for value in (0, 128, 255)]
    np.testing.assert_allclose(np.linalg.norm(encoder.embed_images(pixels), axis=1), 1, atol=1e-5)


def test_exporting_the_graphs_twice_gives_the_same_bytes(bundle: Bundle, joined: build.Networks) -> None:
    image, text = build.graphs(joined)
    assert image.SerializeToString() == (bundle.folder / "image.onnx").read_bytes()
    assert text.SerializeToString() == (bundle.folder / "text.onnx").read_bytes()


def test_a_folder_that_is_no_bundle_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(BundleError, match="is not an encoder bundle"):
        export("starter", tmp_path)
    assert (tmp_path / "photo.jpg").read_bytes() == b"precious"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SENTENCES", ("no_such_package", "no-such-package"))
    with pytest.raises(BundleError, match="needs the package no-such-package"):
        sources.tokenizer_json()
