"""open_clip's encoders, with what surrounds them, as open_clip has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_model
from torch import Tensor
from torch.nn.functional import normalize

from embedserve.bundle import TextTower
from embedserve.errors import EmbedServeError, InvalidField, NotFound
from embedserve.preprocess import preprocess
from embedserve.tokenizer import Tokenizer
from tests.training.export.texts import NASTY, sentencepiece_like
from training.export.original import Choices, Original, OriginalImages
from training.export.sources.open_clip import original

import open_clip  # isort: skip -- after the source, which prepares torchvision

RANDOM = Choices(random=True)
IMAGES = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
TEXTS = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 24, "vision_cfg": IMAGES, "text_cfg": TEXTS}
SIZES = [(64, 48), (33, 77), (32, 32), (20, 31), (151, 40)]


def folder(at: Path, config: dict[str, Any], *, weights: bool = True, **preprocessing: Any) -> str:
    """A folder as open_clip's `local-dir:` takes it; its name as a source."""
    at.mkdir(parents=True, exist_ok=True)
    described = {"model_cfg": config, "preprocess_cfg": preprocessing}
    (at / "open_clip_config.json").write_text(json.dumps(described))
    if weights:
        torch.manual_seed(0)
        save_model(
            open_clip.create_model(f"local-dir:{at}", load_weights=False), at / "open_clip_model.safetensors"
        )
    return f"local-dir:{at}"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return original(folder(tmp_path_factory.mktemp("clip") / "small", CLIP), Choices())


@pytest.fixture(scope="module")
def sigmoid(tmp_path_factory: pytest.TempPathFactory) -> Original:
    """As SigLIP: a timm tower, texts that see their padding, a bias."""
    at = sentencepiece_like(tmp_path_factory.mktemp("siglip") / "tiny-siglip")
    vision = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    text = {
        "context_length": 10,
        "vocab_size": 300,
        "hf_tokenizer_name": "tiny",
        "tokenizer_kwargs": {"clean": "canonicalize"},
        "width": 64,
        "heads": 2,
        "layers": 1,
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
    }
    config = {
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision,
        "text_cfg": text,
    }
    return original(folder(at, config, mean=[0.5] * 3, std=[0.5] * 3, resize_mode="squash"), Choices())


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


def served(images: OriginalImages, picture: Image.Image) -> Tensor:
    """What serving computes, normalised as the graph will."""
    pixels = torch.from_numpy(preprocess(picture, images.preprocessing).copy()).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(images.mean)[:, None, None]) / torch.tensor(images.std)[:, None, None]


def test_a_folder_becomes_both_towers(small: Original) -> None:
    assert (small.name, small.dim) == ("small", 24)
    assert small.source.startswith(f"open_clip {open_clip.__version__}: the folder small")
    assert small.licence == "unknown: see who made the folder"
    assert (small.scoring.activation, small.scoring.logit_bias) == ("softmax", 0)
    assert small.scoring.logit_scale == pytest.approx(1 / 0.07)
    assert small.texts is not None
    assert small.images is not None
    assert (small.texts.context_length, small.texts.pad_id, small.texts.cleaning) == (12, 0, "lower")
    assert small.images.network(torch.zeros(2, 3, 32, 32)).shape == (2, 24)


def test_sigmoid_scoring_and_whole_context_are_taken_over(sigmoid: Original) -> None:
    assert (sigmoid.scoring.activation, sigmoid.scoring.logit_bias) == ("sigmoid", -10)
    assert sigmoid.scoring.logit_scale == pytest.approx(1 / 0.07)
    assert sigmoid.texts is not None
    assert (sigmoid.texts.padding, sigmoid.texts.pad_id, sigmoid.texts.cleaning) == (
        "context",
        1,
        "canonicalize",
    )


@pytest.mark.parametrize("name", ["small", "sigmoid"])
def test_texts_through_serving_have_open_clips_vectors(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    texts = request.getfixturevalue(name).texts
    (tmp_path / "tokenizer.json").write_text(texts.tokenizer, encoding="utf-8")
    tower = TextTower(
        context_length=texts.context_length,
        pad_id=texts.pad_id,
        padding=texts.padding,
        cleaning=texts.cleaning,
    )
    tokenizer = Tokenizer(tower, tmp_path / "tokenizer.json")
    ids = tokenizer.encode(NASTY)
    assert ids == texts.reference_tokens(NASTY)
    expected = texts.reference_vectors(NASTY)
    with torch.no_grad():
        for rows, wanted in zip(ids, expected, strict=True):
            alone = normalize(texts.network(torch.from_numpy(tokenizer.pad([rows]))), dim=1)[0]
            np.testing.assert_allclose(alone, wanted, rtol=0, atol=1e-6)
        together = normalize(texts.network(torch.from_numpy(tokenizer.pad(ids))), dim=1)
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_preprocessing_is_open_clips(mode: str, interpolation: str, tmp_path: Path) -> None:
    options = {"resize_mode": mode, "interpolation": interpolation, "mean": [0.1, 0.2, 0.3], "std": [0.5] * 3}
    images = original(folder(tmp_path / "x", CLIP, weights=False, **options), RANDOM).images
    assert images is not None
    assert images.reference is not None
    for picture in pictures():
        np.testing.assert_allclose(served(images, picture), images.reference(picture), atol=2.01 / 255 / 0.5)


def test_patches_are_the_tokens_that_open_clip_gives(small: Original) -> None:
    assert small.images is not None
    assert small.images.patches is not None
    batch = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    visual: Any = small.images.network
    visual.output_tokens = True
    with torch.no_grad():
        _, tokens = visual(batch)
        visual.output_tokens = False
        assert torch.equal(small.images.patches(batch), tokens)
    assert tokens.shape == (3, 4, 32)


def test_attention_is_that_of_the_class_token_in_the_last_block(small: Original) -> None:
    """Computed by hand from the weights of that block."""
    assert small.images is not None
    assert small.images.attention is not None
    batch = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    visual: Any = small.images.network
    first, last = visual.transformer.resblocks
    with torch.no_grad():
        tokens = last.ln_1(first(visual._embeds(batch)))
        query, key, _ = torch.nn.functional.linear(
            tokens, last.attn.in_proj_weight, last.attn.in_proj_bias
        ).chunk(3, dim=2)
        query, key = (part.unflatten(2, (2, 16)).transpose(1, 2) for part in (query, key))
        expected = (query @ key.transpose(2, 3) / 16**0.5).softmax(dim=3)[:, :, 0, 1:]
        found = small.images.attention(batch)
    assert found.shape == (3, 2, 4)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_tower_without_class_token_offers_patches_only(sigmoid: Original) -> None:
    assert sigmoid.images is not None
    assert sigmoid.images.attention is None
    assert sigmoid.images.patches is not None
    side = sigmoid.images.preprocessing.height
    assert sigmoid.images.patches(torch.zeros(2, 3, side, side)).ndim == 3


def test_a_coca_folder_gives_vectors_and_not_tokens(tmp_path: Path) -> None:
    config = CLIP | {
        "custom_text": True,
        "vision_cfg": IMAGES | {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2},
        "text_cfg": TEXTS | {"embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    found = original(folder(tmp_path / "coca", config, weights=False), RANDOM)
    assert found.images is not None
    assert found.texts is not None
    assert found.texts.reference_vectors is not None
    assert found.images.network(torch.zeros(2, 3, 32, 32)).shape == (2, 24)
    assert found.texts.reference_vectors(["a cat"]).shape == (1, 24)
    assert found.name == "coca-random"


# --- architectures, tags and files ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A small one under a name of its own."""
    file = tmp_path_factory.mktemp("configs") / "tiny-CLIP.json"
    file.write_text(json.dumps(CLIP))
    open_clip.add_model_config(file)
    yield "tiny-CLIP"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(file)
    open_clip.factory._MODEL_CONFIGS.pop("tiny-CLIP")


@pytest.fixture(scope="module")
def checkpoint(architecture: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    file = tmp_path_factory.mktemp("weights") / "mine.pt"
    torch.save({"state_dict": open_clip.create_model(architecture).state_dict()}, file)
    return file


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that is not asked and a cache that is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


def test_a_file_can_be_the_tag_or_the_weights(architecture: str, checkpoint: Path) -> None:
    by_tag = original(f"{architecture}/{checkpoint}", Choices())
    by_choice = original(architecture, Choices(weights=checkpoint))
    assert by_tag.name == by_choice.name == "tiny-CLIP-mine"
    assert "tiny-CLIP with mine.pt, sha256 " in by_tag.source
    state = torch.load(checkpoint)["state_dict"]
    assert by_tag.images is not None
    assert torch.equal(by_tag.images.network.state_dict()["proj"], state["visual.proj"])


def test_weights_of_another_architecture_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = CLIP | {"vision_cfg": IMAGES | {"width": 48}}
    with pytest.raises(InvalidField, match=r"do not fit the architecture .* size mismatch"):
        original(folder(tmp_path / "other", other, weights=False), Choices(weights=checkpoint))


def test_a_file_that_is_no_checkpoint_is_refused(architecture: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InvalidField, match=r"x\.pt' cannot be read as a checkpoint"):
        original(architecture, Choices(weights=tmp_path / "x.pt"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ViT-B-32x/openai", "no architecture 'ViT-B-32x'; did you mean 'ViT-B-32'?"),
        ("ViT-B-32/laion2b_s34b_b79", "no weights 'laion2b_s34b_b79' for ViT-B-32.*mean 'laion2b_s34b_b79k'"),
        ("local-dir:/nowhere", "'/nowhere' holds no open_clip_config.json"),
    ],
)
def test_what_does_not_exist_is_named_with_the_closest(source: str, message: str) -> None:
    with pytest.raises(NotFound, match=message):
        original(source, Choices())


def test_missing_weights_are_named(architecture: str) -> None:
    with pytest.raises(NotFound, match=r"'nowhere\.pt' do not exist"):
        original(architecture, Choices(weights=Path("nowhere.pt")))
    with pytest.raises(InvalidField, match=r"'open_clip:ViT-B-32' says no weights.*known: 'commonpool"):
        original("ViT-B-32", Choices())


def test_another_pooling_is_refused() -> None:
    with pytest.raises(InvalidField, match="pool as they were trained"):
        original("ViT-B-32/openai", Choices(pooling="mean"))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("ViT-B-32/laion2b_s34b_b79k", "the weights of ViT-B-32/laion2b_s34b_b79k"),
        ("hf-hub:laion/none", "the tokenizer of hf-hub:laion/none"),
    ],
)
def test_without_a_network_the_error_says_what_to_do(source: str, missing: str) -> None:
    with pytest.raises(EmbedServeError, match=f"{missing}: .* copy its cache .HF_HOME., or use"):
        original(source, Choices())
