"""Runs that learned from captions, and the bundles made of them, are evaluated in the space they share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from embedserve.cli import main
from embedserve.errors import InvalidField
from tests.training.pictures import quick, write_pictures
from training.evaluate.encoder import BundleEncoder, RunEncoder, open_encoder, require_reader
from training.export import export
from training.export.calibration import built_in
from training.run import open_run
from training.train import train

TEXTS = ["a photo of class 1", "class 0", "a photo of class 1", "something else, said in far more words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of CLIP that tells two colours apart, a bundle of it, and what it was trained on."""
    folder = tmp_path_factory.mktemp("clip")
    data = str(write_pictures(folder / "pictures", each=60))
    given = quick("clip", epochs=4, cache_folder=folder / "cache", templates="{}|a photo of {}", lr="0.005")
    train("clip", data, folder / "run", given)
    export(str(folder / "run"), folder / "bundle", calibration=built_in(images=4, texts=6))
    return folder


def _evaluated(folder: Path, name: str, encoder: str, *more: str) -> dict:
    out = folder / "out" / encoder
    assert main(["eval", name, str(folder / encoder), "--out", str(out), *more]) == 0
    return dict(json.loads((out / f"{name}.json").read_text()))


def test_texts_and_images_of_a_run_are_compared_in_one_space(folder: Path) -> None:
    encoder = open_encoder(str(folder / "run"), device="cpu")
    assert isinstance(encoder, RunEncoder)
    vectors = require_reader(encoder, "zero_shot").embed(TEXTS)
    method = open_run(folder / "run").method
    for text, vector in zip(TEXTS, vectors, strict=True):
        ids = method.texts.rules.encode([text])
        with torch.no_grad():
            alone = method.text_vectors(torch.tensor(ids))[0]
        assert torch.allclose(vector, alone, atol=1e-5)
    assert vectors.shape == (4, encoder.dim)
    assert encoder.reader.scoring.logit_scale == pytest.approx(float(method.scale().detach()))


def test_a_bundle_gives_the_texts_of_its_run(folder: Path) -> None:
    run, bundle = (open_encoder(str(folder / name), device="cpu") for name in ("run", "bundle"))
    assert isinstance(bundle, BundleEncoder)
    assert torch.allclose(run.reader.embed(TEXTS), bundle.reader.embed(TEXTS), atol=1e-4)
    assert bundle.reader.scoring.logit_scale == pytest.approx(run.reader.scoring.logit_scale, rel=1e-5)


def test_a_run_names_the_images_that_it_held_out(folder: Path) -> None:
    found = _evaluated(folder, "zero_shot", "run")["result"]
    assert found["images"] == 24  # a fifth of 120
    assert found["top1"] > 0.9
    assert found["calibration"] is None


def test_run_and_bundle_name_the_same_images_alike(folder: Path) -> None:
    data = ("--data", str(folder / "pictures"), "--set", "images=all")
    run, bundle = (_evaluated(folder, "zero_shot", name, *data)["result"] for name in ("run", "bundle"))
    assert run["images"] == bundle["images"] == 120
    assert run["top1"] == pytest.approx(bundle["top1"], abs=0.02)


@pytest.mark.parametrize("name", ["knn", "linear"])
@pytest.mark.parametrize("encoder", ["run", "bundle"])
def test_the_image_tower_is_evaluated_like_any_other(folder: Path, name: str, encoder: str) -> None:
    found = _evaluated(folder, name, encoder, "--data", str(folder / "pictures"))["result"]
    assert found["top1"] > 0.9


def test_captions_are_found_on_what_the_run_held_out(folder: Path) -> None:
    found = _evaluated(folder, "captions", "run")
    assert found["result"]["images"] == 24
    assert found["result"]["wordings"] == 4  # of two classes, in the two sentences of the training
    assert found["result"]["text_to_image"]["recall_at_1"] > 0.9


def test_captions_of_a_bundle_are_where_one_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", str(folder / "pictures"))
    found = _evaluated(folder, "captions", "bundle", *data, "--set", "captions=label", "--set", "most=50")
    assert (found["result"]["images"], found["settings"]["most"]) == (50, 50)
    assert main(["eval", "captions", str(folder / "bundle"), *data, "--out", str(folder / "out")]) == 1
    assert "captions=label" in capsys.readouterr().err
    assert main(["eval", "knn", str(folder / "bundle"), *data, "--set", "captions=label"]) == 1
    assert "no such key" in capsys.readouterr().err


def test_a_run_without_texts_says_so(folder: Path) -> None:
    train(
        "simclr",
        str(folder / "pictures"),
        folder / "simclr",
        quick("simclr", epochs=1, cache_folder=folder / "cache"),
    )
    encoder = open_encoder(str(folder / "simclr"), device="cpu")
    with pytest.raises(InvalidField, match="no text tower"):
        require_reader(encoder, "zero_shot")
