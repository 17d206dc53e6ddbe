"""Runs of every method as bundles: what was trained is what serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from embedserve.bundle import Bundle, open_bundle  # noqa: E402
from embedserve.check import check_bundle  # noqa: E402
from embedserve.config import Limits  # noqa: E402
from embedserve.encoder import Encoder  # noqa: E402
from embedserve.errors import EmbedServeError, InvalidField, NotFound  # noqa: E402
from tests.training.pictures import quick, write_pictures  # noqa: E402
from training.augment import IMAGENET_MEAN, IMAGENET_STD  # noqa: E402
from training.export import export  # noqa: E402
from training.export.calibration import built_in  # noqa: E402
from training.export.original import Choices  # noqa: E402
from training.export.sources import runs  # noqa: E402
from training.methods import METHODS  # noqa: E402
from training.run import open_run  # noqa: E402
from training.train import train  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_pictures(folder / "pictures")
    return folder


def trained(folder: Path, method: str) -> Path:
    """A run of one epoch, made once for each method."""
    out = folder / method
    if not out.exists():
        given = quick(method, epochs=1, cache_folder=folder / "cache")
        train(method, str(folder / "pictures"), out, given)
    return out


def exported(folder: Path, method: str) -> Bundle:
    """The bundle of that run, made once for each method."""
    out = folder / f"{method}-bundle"
    if not out.exists():
        export(str(trained(folder, method)), out, calibration=built_in(images=6, texts=12))
    return open_bundle(out)


def torch_vectors(run: Path, pixels: list[np.ndarray]) -> np.ndarray:
    """What the method's own `embed` gives for pixels as they are served."""
    method = open_run(str(run)).method.eval()
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        vectors = method.embed((images - mean) / std)
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_exported_checked_and_serves_the_vectors_of_its_network(method: str, folder: Path) -> None:
    run = trained(folder, method)
    bundle = exported(folder, method)
    assert check_bundle(bundle.folder, seconds=0.01).proof.image_cosine == pytest.approx(1, abs=1e-5)
    encoder = Encoder.load(bundle.folder)
    files = sorted((folder / "pictures").rglob("*.png"))[::9]
    pixels = [encoder.read_image(file.read_bytes(), Limits()) for file in files]
    cosines = (encoder.embed_images(pixels) * torch_vectors(run, pixels)).sum(axis=1)
    assert cosines.min() >= 0.9999
    assert bundle.description.parity["image"]["min_cosine"] >= 0.9999


def test_what_learned_from_captions_serves_its_texts_and_scale_as_well(folder: Path) -> None:
    run = trained(folder, "lit")
    bundle = exported(folder, "lit")
    encoder, method = Encoder.load(bundle.folder), open_run(str(run)).method.eval()
    assert method.texts is not None
    texts = ["a red square", "two words", "", "Ein Hund, 狗"]
    ids = encoder.tokenize(texts)
    assert ids == method.texts.rules.encode(texts)
    with torch.no_grad():
        expected = torch.cat([method.text_vectors(torch.tensor([one])) for one in ids]).numpy()
    assert (encoder.embed_texts(ids) * expected).sum(axis=1).min() >= 0.9999
    assert bundle.description.scoring.logit_scale == pytest.approx(1 / 0.07, rel=0.2)


def test_a_projection_is_exported_where_it_was_asked_for(folder: Path) -> None:
    run = trained(folder, "simclr")
    plain = runs.original(str(run), Choices())
    projected = runs.original(str(run), Choices(projection=True))
    assert (plain.dim, projected.dim) != (projected.dim, plain.dim)
    assert projected.dim == 32


def test_what_is_no_run_is_refused_and_leaves_no_bundle(folder: Path, tmp_path: Path) -> None:
    for source in (str(folder / "pictures"), f"run:{tmp_path / 'nowhere'}"):
        with pytest.raises((InvalidField, NotFound, EmbedServeError)):
            export(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
