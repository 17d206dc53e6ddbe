"""A bundle in another precision: what it says of itself, and that it serves."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import nn  # noqa: E402

from embedserve.bundle import Preprocessing, open_bundle  # noqa: E402
from embedserve.encoder import Encoder  # noqa: E402
from tests.training.export.precision.test_choosing import Patches, convolutional  # noqa: E402
from training.export.calibration import built_in  # noqa: E402
from training.export.original import Original, OriginalImages, ready  # noqa: E402
from training.export.precision import Wanted, choosing  # noqa: E402
from training.export.write import write  # noqa: E402


def original(network: nn.Module) -> Original:
    images = OriginalImages(
        network=ready(network),
        preprocessing=Preprocessing(height=32, width=32, resize_to=32),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    return Original(name="small", dim=64, images=images, licence="CC0-1.0", source="this test")


@pytest.fixture(autouse=True)
def forgiving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights make nearly one vector of plain colours and noise: neighbours are an accident."""
    torch.manual_seed(0)
    monkeypatch.setattr(choosing, "LEAST_OVERLAP", 0.5)
    monkeypatch.setattr(choosing, "LEAST_COSINE", 0.9)


@pytest.mark.parametrize(("wanted", "words"), [("int8", "int8"), ("fp16", "float16")])
def test_a_bundle_names_its_precision_and_serves(wanted: Wanted, words: str, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    bundle = write(original(Patches()), out, calibration=built_in(), precision=wanted)
    described = open_bundle(out).description
    assert described.precision == words
    assert described.parity["precision"]["image"]["float32_per_second"] > 0
    assert described.probe.min_cosine == (0.98 if wanted == "int8" else 0.999)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "encoder.json", "image.onnx"]
    assert Encoder.load(bundle.folder).prove().image_cosine == pytest.approx(1, abs=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_auto_writes_a_bundle_whatever_it_chooses(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(original(convolutional()), out, calibration=built_in(), precision="auto")
    assert Encoder.load(out).bundle.description.precision in {"float32", "int8"}
