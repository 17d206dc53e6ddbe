"""Encoders of transformers, from folders that it wrote itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from embedserve.bundle import TextTower
from embedserve.errors import EmbedServeError, InvalidField, NotFound
from embedserve.preprocess import preprocess
from embedserve.tokenizer import Tokenizer
from tests.training.export.texts import NASTY, byte_pairs, sentencepiece_like
from training.export.graphs import export_graph
from training.export.original import Choices, Original, OriginalImages
from training.export.sources.hugging_face import original

import transformers  # isort: skip -- after the source, which prepares torchvision

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CROPPED = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
STRETCHED = {"size": {"height": 32, "width": 32}}
SIZES = [(64, 48), (33, 77), (40, 40), (43, 40), (20, 31), (151, 40)]


def clip(at: Path) -> None:
    text = TEXT | {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
        "pad_token_id": 49407,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)
    transformers.CLIPModel(config).save_pretrained(at)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=STRETCHED["size"]).save_pretrained(
        at
    )
    byte_pairs(at)


def siglip(at: Path) -> None:
    text = TEXT | {"hidden_size": 32, "vocab_size": 300, "max_position_embeddings": 12, "projection_size": 32}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    transformers.SiglipModel(config).save_pretrained(at)
    transformers.SiglipImageProcessor(**STRETCHED).save_pretrained(at)
    sentencepiece_like(at)


def dinov2(at: Path) -> None:
    options = VISION | {"image_size": 64}  # trained larger than it is used: positions are resampled
    transformers.Dinov2Model(transformers.Dinov2Config(**options)).save_pretrained(at)
    transformers.BitImageProcessor(**CROPPED).save_pretrained(at)


def registers(at: Path) -> None:
    config = transformers.Dinov2WithRegistersConfig(**VISION, num_register_tokens=3)
    model = transformers.Dinov2WithRegistersModel(config)
    torch.nn.init.normal_(model.embeddings.register_tokens)
    model.save_pretrained(at)
    transformers.BitImageProcessor(**CROPPED).save_pretrained(at)


def vit(at: Path) -> None:
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(at)
    transformers.ViTImageProcessor(**STRETCHED).save_pretrained(at)


def beit(at: Path) -> None:
    transformers.BeitModel(transformers.BeitConfig(**VISION)).save_pretrained(at)
    stretched = {"size": {"height": 36, "width": 36}, "do_center_crop": True, "crop_size": STRETCHED["size"]}
    transformers.BeitImageProcessor(**stretched).save_pretrained(at)


MAKERS: dict[str, Callable[[Path], None]] = {
    "clip": clip,
    "siglip": siglip,
    "dinov2": dinov2,
    "registers": registers,
    "vit": vit,
    "beit": beit,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, with random weights."""
    root = tmp_path_factory.mktemp("hugging-face")
    torch.manual_seed(0)
    for name, make in MAKERS.items():
        make(root / name)
    return root


@pytest.fixture(scope="module")
def originals(folders: Path) -> dict[str, Original]:
    return {name: original(str(folders / name), Choices()) for name in MAKERS}


def pictures() -> list[Image.Image]:
    """Noise in middle tones: whether Pillow resamples rows or columns first shows where values overflow."""
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(64, 192, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


def images_of(found: Original) -> OriginalImages:
    assert found.images is not None
    return found.images


def batch() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def own(folders: Path, name: str, **options: Any) -> Any:
    """The model as transformers loads it by default."""
    return transformers.AutoModel.from_pretrained(folders / name, **options).eval()


@pytest.mark.parametrize("name", MAKERS)
def test_preprocessing_is_that_of_the_folder(name: str, originals: dict[str, Original]) -> None:
    """To one step of a pixel: only the part that is kept is resampled."""
    images = images_of(originals[name])
    assert images.reference is not None
    mean, std = torch.tensor(images.mean)[:, None, None], torch.tensor(images.std)[:, None, None]
    for picture in pictures():
        pixels = preprocess(picture, images.preprocessing)
        wanted = (images.reference(picture) * std + mean) * 255
        np.testing.assert_allclose(pixels.transpose(2, 0, 1), wanted, atol=1.01)


@pytest.mark.parametrize(
    ("name", "pooling", "vector"),
    [
        ("dinov2", "auto", lambda found: found.pooler_output),
        ("dinov2", "class", lambda found: found.last_hidden_state[:, 0]),
        ("dinov2", "mean", lambda found: found.last_hidden_state[:, 1:].mean(dim=1)),
        ("registers", "auto", lambda found: found.pooler_output),
        ("registers", "mean", lambda found: found.last_hidden_state[:, 4:].mean(dim=1)),
        ("vit", "auto", lambda found: found.last_hidden_state[:, 0]),
        ("beit", "auto", lambda found: found.pooler_output),
    ],
)
def test_vectors_are_those_of_the_model(
    name: str, pooling: Any, vector: Callable[[Any], Tensor], folders: Path
) -> None:
    found = original(str(folders / name), Choices(pooling=pooling))
    with torch.no_grad():
        expected = vector(own(folders, name)(pixel_values=batch()))
        np.testing.assert_allclose(images_of(found).network(batch()), expected, atol=1e-5)
    assert (found.name, found.dim) == (name, 32)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_both_towers_give_the_models_own_embeddings(
    name: str, folders: Path, originals: dict[str, Original], tmp_path: Path
) -> None:
    found, model = originals[name], own(folders, name)
    texts = found.texts
    assert texts is not None
    own_tokenizer = transformers.AutoTokenizer.from_pretrained(folders / name)
    padded = own_tokenizer(
        NASTY, padding="max_length", max_length=texts.context_length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        whole = model(pixel_values=batch(), input_ids=padded["input_ids"])
        np.testing.assert_allclose(
            normalize(images_of(found).network(batch()), dim=1), whole.image_embeds, atol=1e-6
        )
    (tmp_path / "tokenizer.json").write_text(texts.tokenizer, encoding="utf-8")
    tower = TextTower(context_length=texts.context_length, pad_id=texts.pad_id, padding=texts.padding)
    tokenizer = Tokenizer(tower, tmp_path / "tokenizer.json")
    with torch.no_grad():
        for text, expected in zip(NASTY, whole.text_embeds, strict=True):
            ids = torch.from_numpy(tokenizer.pad(tokenizer.encode([text])))
            np.testing.assert_allclose(normalize(texts.network(ids), dim=1)[0], expected, atol=1e-6)
    assert texts.reference_vectors is not None
    np.testing.assert_allclose(texts.reference_vectors(NASTY), whole.text_embeds, atol=1e-6)


def test_the_trained_scale_and_bias_are_taken_over(originals: dict[str, Original], folders: Path) -> None:
    """Not their initial values, which the configuration holds."""
    assert originals["clip"].scoring.activation == "softmax"
    assert originals["clip"].scoring.logit_scale == pytest.approx(
        own(folders, "clip").logit_scale.exp().item()
    )
    scoring, model = originals["siglip"].scoring, own(folders, "siglip")
    assert scoring.activation == "sigmoid"
    assert scoring.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert scoring.logit_bias == pytest.approx(model.logit_bias.item())
    assert originals["siglip"].texts is not None
    assert originals["siglip"].texts.padding == "context"


@pytest.mark.parametrize(("name", "prefix"), [("clip", 1), ("dinov2", 1), ("registers", 4), ("vit", 1)])
def test_attention_is_the_models_own(
    name: str, prefix: int, folders: Path, originals: dict[str, Original]
) -> None:
    images = images_of(originals[name])
    assert images.attention is not None
    model = own(folders, name, attn_implementation="eager")
    vision = getattr(model, "vision_model", model)
    with torch.no_grad():
        weights = vision(pixel_values=batch(), output_attentions=True).attentions[-1]
        np.testing.assert_allclose(images.attention(batch()), weights[:, :, 0, prefix:], atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_patches_lie_on_the_grid(name: str, originals: dict[str, Original]) -> None:
    patches = images_of(originals[name]).patches
    assert patches is not None
    with torch.no_grad():
        assert patches(batch()).shape == (3, 4, 32)


def test_the_graph_of_clips_texts_takes_any_batch_and_length(originals: dict[str, Original]) -> None:
    texts = originals["clip"].texts
    assert texts is not None
    generator = torch.Generator().manual_seed(0)
    axes = {0: ("batch", 1024), 1: ("length", 77)}
    graph = export_graph(
        texts.network, torch.ones(2, 5, dtype=torch.int64), "text", axes, {"embedding": ("batch", 24)}
    )
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    for count in (1, 2, 17):
        for length in (1, 2, 5, 40, 77):
            rows = torch.randint(0, 49408, (count, length), generator=generator)
            rows[:, -1] = 49407
            with torch.no_grad():
                expected = texts.network(rows)
            (found,) = session.run(None, {"text": rows.numpy()})
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_source_can_be_found_again(originals: dict[str, Original]) -> None:
    source = originals["dinov2"].source
    assert source.startswith(
        f"transformers {transformers.__version__}: the folder dinov2, model.safetensors with"
    )


def test_the_licence_of_a_folder_is_what_its_card_says(folders: Path) -> None:
    card = folders / "vit" / "README.md"
    card.write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# ViT\n")
    try:
        assert original(str(folders / "vit"), Choices(random=True)).licence == "Apache-2.0"
    finally:
        card.unlink()
    assert original(str(folders / "vit"), Choices(random=True)).licence == "unknown: see who made the folder"


# --- what is refused -----------------------------------------------------------------------------------


def test_weights_that_leave_parts_random_are_refused(folders: Path, tmp_path: Path) -> None:
    dinov2(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["layernorm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InvalidField, match=r"leave parts of the model random: layernorm\.weight"):
        original(str(tmp_path), Choices())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_rescale": False}, "does not rescale"),
        ({"resample": 0}, "resamples by Pillow's filter 0"),
        ({"do_center_crop": False}, "gives images of several sizes"),
        ({"size": {"shortest_edge": 16}}, "crops 32 × 32 out of less"),
    ],
)
def test_preprocessing_that_a_bundle_cannot_say_is_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    dinov2(tmp_path)
    transformers.BitImageProcessor(**CROPPED | options).save_pretrained(tmp_path)
    with pytest.raises(InvalidField, match=message):
        original(str(tmp_path), Choices(random=True))


def test_a_folder_without_its_tokenizer_says_so(folders: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (tmp_path / name).hardlink_to(folders / "clip" / name)
    with pytest.raises(EmbedServeError, match=r"could not load '.*it has no tokenizer .*Complete the folder"):
        original(str(tmp_path), Choices())


def test_another_kind_of_model_is_named(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(NotFound, match="is a bert model; did you mean 'beit'"):
        original(str(tmp_path), Choices())


def test_places_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"holds no config\.json"):
        original(str(tmp_path), Choices())
    with pytest.raises(NotFound, match="neither a folder nor a repository"):
        original("dinov2", Choices())


def test_pooling_of_two_towers_is_not_a_choice(folders: Path) -> None:
    with pytest.raises(InvalidField, match="pools as it was trained"):
        original(str(folders / "clip"), Choices(pooling="mean"))


def test_separate_weights_are_refused(folders: Path) -> None:
    with pytest.raises(InvalidField, match="lies in a folder"):
        original(str(folders / "vit"), Choices(weights=Path("x.safetensors")))


def test_without_a_network_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EmbedServeError, match=r"could not load 'facebook/dinov2-small': .* copy its cache"):
        original("facebook/dinov2-small@main", Choices())
