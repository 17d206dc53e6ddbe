"""Encoders of runs and bundles: the features they give, and what cannot be evaluated."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from embedserve.encoder import Encoder
from embedserve.errors import BadRequest, BundleError, InvalidField, NotFound
from tests.training.evaluate.samples import coloured, source_of, tiny_encoder
from training import checkpoint
from training.augment import IMAGENET_MEAN, IMAGENET_STD, centre
from training.backbones import describe
from training.data import Source, split
from training.data.source import LIMITS
from training.evaluate.encoder import BundleEncoder, RunEncoder, baselines, open_encoder, require_network
from training.evaluate.knn import KnnSettings, evaluate_knn
from training.evaluate.network import NetworkEncoder
from training.run import build_method, encoder_prefix
from training.settings import DataFacts, resolve


def _jpeg(seed: int, size: tuple[int, int] = (40, 24)) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def _files(count: int = 6) -> Source:
    return source_of([_jpeg(seed) for seed in range(count)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as the loop writes it, of SimCLR on a small ResNet."""
    folder = tmp_path_factory.mktemp("run")
    given = {
        "size": "16",
        "stored_size": "18",
        "holdout": "0.3",
        "seed": "5",
        "batch_size": "8",
        "epochs": "1",
    }
    given |= {"cache_folder": str(folder / "cache"), "group_by": "name", "workers": "1"}
    settings = resolve(
        "simclr", "photos", given, DataFacts(images=32, heldout=8, native_size=16, on_gpu=False)
    )
    torch.manual_seed(1)
    method = build_method(settings, start="")
    path = folder / "step.pt"
    content = {
        "method": "simclr",
        "settings": settings.as_json(),
        "step": 3,
        "model": method.state_dict(),
        "encoder_prefix": encoder_prefix(method),
        "backbone": describe(method.encoder),
    }
    checkpoint.save(path, content)
    return path


# ------------------------------------------------------------------------------------------------ runs


def test_a_checkpoint_comes_back_with_what_it_was_trained_on(run: Path) -> None:
    encoder = open_encoder(str(run), device="cpu")
    assert isinstance(encoder, RunEncoder)
    assert (encoder.data, encoder.group_by, encoder.label_by) == ("photos", "name", "")
    assert (encoder.size, encoder.stored_size, encoder.holdout, encoder.seed) == (16, 18, 0.3, 5)
    assert (encoder.dim, encoder.device.type) == (512, "cpu")
    assert encoder.name == f"{run} (step 3)"


def test_features_are_those_of_the_method_on_the_centre_view(run: Path) -> None:
    encoder = open_encoder(str(run), device="cpu")
    source = _files()
    found = encoder.embed(source)
    assert found.vectors.shape == (6, 512)
    squares = np.stack(
        [np.asarray(source.read(row).resize((18, 18), Image.Resampling.BILINEAR)) for row in range(6)]
    )
    views = centre(
        torch.from_numpy(squares),
        torch.full((6,), 40 / 24),
        16,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        share=16 / 18,
    )
    with torch.no_grad():
        expected = encoder.backbone(views)
    torch.testing.assert_close(found.vectors, expected, atol=1e-4, rtol=1e-4)


def test_a_run_is_judged_on_the_images_it_did_not_train_on(run: Path) -> None:
    encoder = open_encoder(str(run), device="cpu")
    source = coloured(40)
    result = evaluate_knn(encoder, source, KnnSettings())
    assert (result.train, result.test) == tuple(len(rows) for rows in split(source, holdout=0.3, seed=5))


def test_pictures_made_on_the_way_give_the_same_features_and_leave_nothing(tmp_path: Path) -> None:
    encoder = tiny_encoder(tmp_path)
    told: list[tuple[int, int]] = []
    fresh = encoder.embed(_files(), cached=False, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (6, 6)
    assert not any(tmp_path.iterdir())
    kept = encoder.embed(_files())
    assert any(tmp_path.iterdir())
    torch.testing.assert_close(fresh.vectors, kept.vectors, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_damaged_images_are_left_out_and_named(tmp_path: Path, cached: bool) -> None:
    images = [_jpeg(0), b"no image", _jpeg(2)]
    source = source_of(images, labels=[0, 1, 2], class_names=("a", "b", "c"))
    found = tiny_encoder(tmp_path).embed(source, cached=cached)
    assert (found.source.keys, found.source.labels.tolist()) == (("0000", "0002"), [0, 2])
    assert [one.key for one in found.skipped] == ["0001"]
    alone = tiny_encoder(tmp_path).embed(source_of(images[2:], name="alone"))
    torch.testing.assert_close(found.vectors[1:], alone.vectors, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cached", [True, False])
def test_without_a_readable_image_there_is_nothing_to_evaluate(tmp_path: Path, cached: bool) -> None:
    with pytest.raises(BadRequest):
        tiny_encoder(tmp_path).embed(source_of([b"no image"]), cached=cached)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    encoder = tiny_encoder(tmp_path)
    real = encoder.module.forward
    encoder.module.forward = lambda images: real(images) + value
    for cached in (True, False):
        with pytest.raises(InvalidField, match=r"6 of 6 images.*diverged"):
            encoder.embed(_files(), cached=cached)


def test_another_module_than_the_backbone_can_be_evaluated(tmp_path: Path) -> None:
    backbone = tiny_encoder(tmp_path).backbone
    head = nn.Sequential(backbone, nn.Linear(16, 5))
    encoder = NetworkEncoder("head", backbone, embed=head, size=16, stored_size=16, cache=tmp_path)
    assert encoder.dim == 5
    assert encoder.embed(_files()).vectors.shape == (6, 5)


# --------------------------------------------------------------------------------------------- bundles


def test_a_bundle_gives_what_serving_gives(tiny_folder: Path) -> None:
    encoder = open_encoder(str(tiny_folder))
    assert isinstance(encoder, BundleEncoder)
    source = _files()
    served = Encoder.load(tiny_folder)
    expected = served.embed_images([served.read_image(source.fetch(row), LIMITS) for row in range(6)])
    np.testing.assert_array_equal(encoder.embed(source).vectors.numpy(), expected)


def test_arrays_and_damaged_files_go_through_a_bundle_too(tiny_folder: Path) -> None:
    red = np.zeros((9, 7, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    found = BundleEncoder(str(tiny_folder)).embed(source_of([red, b"no image", red.copy()]))
    assert found.vectors.shape == (2, 8)
    assert found.vectors[0, 0] > 0.9
    assert [one.key for one in found.skipped] == ["0001"]


def test_many_images_come_in_order(tiny_folder: Path) -> None:
    source = coloured(150, size=8)
    encoder = BundleEncoder(str(tiny_folder))
    together = encoder.embed(source).vectors
    for row in (0, 63, 64, 149):
        alone = encoder.embed(source.select(np.array([row]))).vectors
        torch.testing.assert_close(together[row : row + 1], alone)


def test_an_image_without_a_direction_fails_alone(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Encoder.embed_images

    def embed_images(self, pixels):
        if any(one.max() == 0 for one in pixels):
            raise InvalidField("A vector is all zeros.", code="no_direction")
        return real(self, pixels)

    monkeypatch.setattr(Encoder, "embed_images", embed_images)
    images = [np.full((8, 8, 3), level, np.uint8) for level in (9, 90, 0)]
    found = BundleEncoder(str(tiny_folder)).embed(source_of(images))
    assert (len(found.vectors), [one.key for one in found.skipped]) == (2, ["0002"])


def test_the_starter_is_a_bundle() -> None:
    encoder = open_encoder("starter")
    assert isinstance(encoder, BundleEncoder)
    assert encoder.embed(_files(2)).vectors.shape == (2, encoder.dim)


# ------------------------------------------------------------------------------------------- bad input


def test_what_is_not_there_or_no_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="There is no 'nowhere'"):
        open_encoder("nowhere")
    with pytest.raises(InvalidField, match="holds no checkpoint"):
        open_encoder(str(tmp_path))
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(BundleError):
        open_encoder(str(tmp_path))


@pytest.mark.parametrize("device", ["gpu", "cuda:0"])
def test_an_unknown_or_missing_device_is_said(
    run: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidField, match=f"device={device}"):
        open_encoder(str(run), device=device)


def test_a_bundle_cannot_be_looked_into(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match=r"'tiny' is a bundle.*attention needs the network"):
        require_network(BundleEncoder(str(tiny_folder)), "attention")
    network = tiny_encoder(tmp_path)
    assert require_network(network, "attention") is network


# ------------------------------------------------------------------------------------------- baselines


def test_baselines_are_pixels_and_random_weights_of_the_same_network(run: Path) -> None:
    encoder = open_encoder(str(run), device="cpu")
    pixels, untrained = baselines(encoder)
    assert (pixels.name, untrained.name) == ("raw pixels", "resnet18 with random weights")
    assert (pixels.holdout, untrained.seed) == (encoder.holdout, encoder.seed)
    source = coloured(8)
    assert pixels.embed(source).vectors.shape == (8, pixels.dim) == (8, 18 * 18 * 3)
    mine, random = encoder.embed(source).vectors, untrained.embed(source).vectors
    assert random.shape == mine.shape
    assert not torch.allclose(mine, random)
    again = baselines(encoder)[1].embed(source).vectors
    torch.testing.assert_close(random, again)


def test_baselines_leave_the_global_random_numbers_alone(tiny_folder: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    pixels, untrained = baselines(BundleEncoder(str(tiny_folder)))
    assert torch.equal(torch.rand(1), expected)
    assert (pixels.dim, untrained.dim) == (32 * 32 * 3, 512)


def test_raw_pixels_are_the_pixels_around_middle_gray(run: Path) -> None:
    encoder = open_encoder(str(run), device="cpu")
    gray = replace(source_of([np.full((18, 18, 3), level, np.uint8) for level in (0, 255)]), name="gray")
    vectors = baselines(encoder)[0].embed(gray).vectors
    torch.testing.assert_close(vectors, torch.tensor([[-0.5], [0.5]]).expand_as(vectors))
