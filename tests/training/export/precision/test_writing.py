"""A bundle in another precision: what it says of itself, and that it serves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import nn  # noqa: E402

from embedserve.bundle import Preprocessing, open_bundle  # noqa: E402
from embedserve.config import Limits  # noqa: E402
from embedserve.encoder import Encoder  # noqa: E402
from tests.training.export.precision.test_choosing import Patches, convolutional  # noqa: E402
from training.export import graphs  # noqa: E402
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


class Pixels(nn.Module):
    """Patches of 8 pixels, [batch, 16, 192]."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2)


class Attention(nn.Module):
    """Two heads over the same patches, [batch, 2, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.heads = Pixels(), nn.Linear(192, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.heads(self.pixels(images)).transpose(1, 2).softmax(dim=2)


@pytest.mark.parametrize("wanted", ["int8", "fp16"])
def test_what_is_offered_beside_the_vector_is_kept_and_measured(wanted: Wanted, tmp_path: Path) -> None:
    plain = original(Patches())
    assert plain.images is not None
    seen = nn.Sequential(Pixels(), nn.Linear(192, 24))
    images = replace(plain.images, patches=ready(seen), attention=ready(Attention()))
    few = built_in(images=20, texts=1)
    described = {}
    for precision in ("fp32", wanted):
        out = tmp_path / precision
        write(replace(plain, images=images), out, calibration=few, precision=precision)
        described[precision] = Encoder.load(out)
    outputs = described[wanted].require_output("patches")
    assert (outputs.rows, outputs.columns, outputs.patches, outputs.attention) == (4, 4, 24, 2)
    found = described[wanted].bundle.description.parity["precision"]["image"]["outputs"]
    assert found["patches"]["min_cosine"] > 0.99
    assert found["attention"]["min_cosine"] > 0.99
    pixels = [described[wanted].read_image(one.data, Limits()) for one in few.pictures[-4:]]
    ours = described[wanted].look(pixels, ["patches", "attention"])
    theirs = described["fp32"].look(pixels, ["patches", "attention"])
    for name in ("patches", "attention"):
        np.testing.assert_allclose(
            ours.outputs[name], theirs.outputs[name], atol=0.05 * np.abs(theirs.outputs[name]).max()
        )


@pytest.mark.parametrize("wanted", ["int8", "fp16"])
def test_weights_in_a_file_beside_the_graph_stay_there(
    wanted: Wanted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The limit is lowered; with the real one the network would need 2 GB.
    monkeypatch.setattr(graphs, "LARGEST_FILE", 10_000)
    monkeypatch.setattr(graphs.write_graph, "__kwdefaults__", {"largest": 10_000})
    out = tmp_path / "bundle"
    write(original(Patches()), out, calibration=built_in(images=20, texts=1), precision=wanted)
    (beside,) = out.glob("*.onnx.data")
    assert sorted(one.name for one in out.iterdir() if one != beside) == [
        "README.md",
        "encoder.json",
        "image.onnx",
    ]
    assert Encoder.load(out).prove().image_cosine == pytest.approx(1, abs=1e-3)
    floats = sum(one.numel() * 4 for one in Patches().parameters())
    assert beside.stat().st_size < 0.6 * floats
    found = open_bundle(out).description.parity["precision"]["image"]
    assert found[found["chosen"]]["min_cosine"] > 0.99
    assert [one.name for one in tmp_path.iterdir()] == ["bundle"]


def test_auto_writes_a_bundle_whatever_it_chooses(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    write(original(convolutional()), out, calibration=built_in(), precision="auto")
    assert Encoder.load(out).bundle.description.precision in {"float32", "int8"}
