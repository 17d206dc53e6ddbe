"""A published checkpoint as a source of the export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from embedserve.errors import InvalidField  # noqa: E402
from embedserve.preprocess import preprocess  # noqa: E402
from tests.training.published import authors, haiku, literal  # noqa: E402
from training.backbones import build  # noqa: E402
from training.export.original import Choices  # noqa: E402
from training.export.sources.published import listing, original  # noqa: E402
from training.published import TABLE, find, rows  # noqa: E402

VIT = "test_vit/16"


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in (
        ("dino/vits16", VIT),
        ("swav/resnet50-800ep", "resnet14x1"),
        ("simclr/resnet50_1x", "resnet14x1-simclr"),
        ("byol/resnet50", "resnet14x1-byol"),
    ):
        monkeypatch.setitem(TABLE, name, replace(find(name), network=small))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Path]:
    torch.manual_seed(4)
    state = dict(authors.unsettled(build(VIT, 224).network).state_dict())
    path = tmp_path_factory.mktemp("dino") / "dino_deitsmall16_pretrain.pth"
    torch.save(authors.transformer_file("dino", state), path)
    return state, path


@torch.no_grad()
def test_a_transformer_offers_its_class_token_patches_and_attention(
    transformer: tuple[dict[str, torch.Tensor], Path],
) -> None:
    state, path = transformer
    found = original("dino/vits16", Choices(weights=path))
    images = torch.rand(2, 3, 224, 224)
    assert found.images is not None
    expected = literal.vision_transformer(state, images, heads=2)
    torch.testing.assert_close(found.images.network(images), expected, atol=1e-5, rtol=1e-5)
    assert found.dim == 64
    assert found.name == "dino-vits16"
    assert found.licence == "Apache-2.0"
    assert found.source.startswith("https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/")
    assert "(sha256 " in found.source
    assert found.notes[0].startswith(
        "DINO (arXiv:2104.14294), published by its authors at https://github.com/face"
    )
    assert "77.0% top-1" in found.notes[0]
    assert not any(str(path) in note for note in found.notes)
    assert not found.images.network.training
    assert not any(parameter.requires_grad for parameter in found.images.network.parameters())

    assert found.images.patches is not None
    assert found.images.attention is not None
    patches, attention = found.images.patches(images), found.images.attention(images)
    assert patches.shape == (2, 196, 64)
    assert attention.shape == (2, 2, 196)
    assert (attention.sum(-1) < 1).all()
    averaged = original("dino/vits16", Choices(weights=path, pooling="mean"))
    assert averaged.images is not None
    torch.testing.assert_close(averaged.images.network(images), patches.mean(1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_resnet_offers_pooled_features_and_a_map_of_patches(tmp_path: Path) -> None:
    torch.manual_seed(3)
    network = authors.resnet(1, 1, 1, 1)
    torch.save(authors.swav(network), tmp_path / "a.pth.tar")
    found = original("swav/resnet50-800ep", Choices(weights=tmp_path / "a.pth.tar"))
    images = torch.rand(2, 3, 224, 224)
    assert found.images is not None
    assert found.images.patches is not None
    assert found.images.attention is None
    torch.testing.assert_close(found.images.network(images), network(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.images.patches(images).mean(1), network(images), atol=1e-5, rtol=1e-5)
    assert found.images.std == (0.228, 0.224, 0.225)
    assert found.licence == "CC-BY-NC-4.0"
    assert "Its licence forbids commercial use." in found.notes


@pytest.mark.parametrize("name", ["dino/vits16", "swav/resnet50-800ep", "simclr/resnet50_1x"])
def test_servings_preprocessing_is_the_authors(name: str) -> None:
    found = original(name, Choices(random=True)).images
    assert found is not None
    assert found.reference is not None
    for size in ((300, 200), (224, 500), (90, 70)):
        coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
        image = coarse.resize(size, Image.Resampling.BICUBIC)
        ours = torch.from_numpy(preprocess(image, found.preprocessing).copy()).permute(2, 0, 1) / 255
        ours = (ours - torch.tensor(found.mean)[:, None, None]) / torch.tensor(found.std)[:, None, None]
        theirs = found.reference(image)
        assert theirs.shape == (3, 224, 224)
        assert (ours - theirs).abs().max() <= 2.01 / 255 / min(found.std)  # two of 256 levels
    if name.startswith("simclr"):
        assert theirs.min() >= 0
        assert theirs.max() <= 1


def test_random_weights_need_no_file() -> None:
    torch.manual_seed(1)
    found = original("dino/vits16", Choices(random=True))
    assert found.source == f"random weights for {VIT}, 'dino/vits16'"


def test_choices_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidField, match="exported without its projection head"):
        original("dino/vits16", Choices(random=True, projection=True))
    with pytest.raises(
        InvalidField, match="is convolutional and has no class token; choose the pooling 'mean'"
    ):
        original("swav/resnet50-800ep", Choices(random=True, pooling="class"))
    with pytest.raises(InvalidField, match="did you mean 'dino/vits16'"):
        original("dno/vits16", Choices())


def test_the_command_line_lists_the_table() -> None:
    assert listing is rows


# All the way to serving


@pytest.mark.parametrize("name", ["dino/vits16", "byol/resnet50"])
@torch.no_grad()
def test_a_bundle_serves_the_vectors_of_the_file(
    tmp_path: Path, network: nn.Module, transformer: tuple[dict[str, torch.Tensor], Path], name: str
) -> None:
    write = pytest.importorskip("training.export.write", reason="nothing here writes bundles of a source yet")
    from embedserve.encoder import Encoder
    from training.export.calibration import built_in

    state, path = transformer
    if name == "byol/resnet50":
        path = tmp_path / "pretrain_res50x1.pkl"
        params, averages = haiku.state_of(network)
        path.write_bytes(haiku.checkpoint(params, averages))
    source = original(name, Choices(weights=path))
    bundle = write.write(source, tmp_path / "bundle", calibration=built_in(images=4))
    assert bundle.description.licence == "Apache-2.0"
    assert source.images is not None

    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), np.uint8)
    mean, std = (torch.tensor(value) for value in (source.images.mean, source.images.std))
    images = ((torch.from_numpy(pixels) / 255 - mean) / std).permute(0, 3, 1, 2)
    if name == "byol/resnet50":
        expected = literal.byol_resnet(haiku.tensors(params), haiku.tensors(averages), images)
    else:
        expected = literal.vision_transformer(state, images, heads=2)
    served = torch.from_numpy(Encoder.load(bundle.folder).embed_images(pixels))
    assert nn.functional.cosine_similarity(served, expected).min() > 0.99999
