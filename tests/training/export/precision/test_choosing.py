"""Which precision is chosen, what it keeps, and which layers stay in float."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from embedserve.errors import EmbedServeError  # noqa: E402
from training.export.graphs import write_graph  # noqa: E402
from training.export.precision import Inputs, Judged, choose, choosing, suffices  # noqa: E402
from training.export.precision.choosing import tolerated  # noqa: E402
from training.export.precision.forms import DYNAMIC, ROWS, STATIC, layers  # noqa: E402

SIZE = 32


class Tower(nn.Module):
    """uint8 [batch, 32, 32, 3] → unit vectors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.network(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1), dim=1)


class Patches(nn.Module):
    """Three linear layers over patches of 8 pixels."""

    def __init__(self, outlier: float = 0.0) -> None:
        super().__init__()
        self.widen, self.middle, self.narrow = nn.Linear(192, 128), nn.Linear(128, 128), nn.Linear(128, 64)
        with torch.no_grad():
            if outlier:  # one channel dwarfs the rest, and the next layer does not look at it
                self.widen.bias[0] = outlier
                self.middle.weight[:, 0] = 0

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, 8, stride=8).transpose(1, 2)
        hidden = F.relu(self.middle(F.relu(self.widen(patches))))
        return self.narrow(hidden.mean(1))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def graph(folder: Path, network: nn.Module, dim: int = 64) -> Path:
    path = folder / "image.onnx"
    write_graph(
        path,
        Tower(network).eval(),
        torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8),
        name="pixels",
        axes={0: ("batch", 4096)},
        outputs={"embedding": ("batch", dim)},
    )
    return path


def pictures(count: int = 24) -> Inputs:
    """Each of another colour and grain."""
    random = np.random.default_rng(0)
    rows = [
        np.clip(
            random.integers(0, 256, 3) + random.normal(0, random.uniform(1, 60), (SIZE, SIZE, 3)), 0, 255
        ).astype(np.uint8)
        for _ in range(count)
    ]
    return Inputs(rows, np.stack)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("network", [Patches, convolutional], ids=["linear layers", "convolutions"])
def test_int8_keeps_what_the_rule_asks_for(network: type[nn.Module], tmp_path: Path) -> None:
    path = graph(tmp_path, network())
    chosen = choose(path, "int8", pictures(), tmp_path)
    assert chosen.words == "int8"
    found = chosen.figures[chosen.figures["chosen"]]
    assert found["min_cosine"] >= 0.98
    assert found["top10_overlap"] >= 0.95
    assert found["per_second"] > 0
    kinds = {node.op_type for node in onnx.load(chosen.path).graph.node}
    assert kinds & {"MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear", "QLinearConv"}


def test_static_scales_leave_a_vector_independent_of_its_batch(tmp_path: Path) -> None:
    chosen = choose(graph(tmp_path, convolutional()), "int8", pictures(), tmp_path)
    assert chosen.figures["chosen"] == STATIC.name
    assert chosen.figures[STATIC.name]["batch_cosine"] > 0.999999


def test_float16_computes_the_same_vectors_to_three_digits(tmp_path: Path) -> None:
    path = graph(tmp_path, Patches())
    chosen = choose(path, "fp16", pictures(), tmp_path)
    assert chosen.words == "float16"
    assert chosen.figures["float16"]["min_cosine"] > 0.9999
    assert chosen.path.stat().st_size < 0.6 * path.stat().st_size


def test_float16_keeps_gelu_in_float32_without_which_vit_b_32_crashes_on_loading(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 64), nn.GELU(), nn.Linear(64, 64))
    chosen = choose(graph(tmp_path, network), "fp16", pictures(), tmp_path)
    gelus = [node for node in onnx.load(chosen.path).graph.node if node.op_type == "Gelu"]
    assert len(gelus) == 1
    assert "cast" in gelus[0].input[0]  # brought back to float32 just before
    assert chosen.figures["float16"]["min_cosine"] > 0.9999


def test_float32_is_left_as_it_is(tmp_path: Path) -> None:
    path = graph(tmp_path, Patches())
    assert choose(path, "fp32", pictures(), tmp_path).path == path


def test_the_layer_that_hurts_stays_in_float_and_the_others_do_not(tmp_path: Path) -> None:
    path = graph(tmp_path, Patches(outlier=3000.0))
    chosen = choose(path, "int8", pictures(), tmp_path)
    names = layers(path, DYNAMIC)
    for form in (DYNAMIC, STATIC, ROWS):
        kept = [one for one in chosen.figures[form.name]["layers_in_float"] if one in names]
        assert kept == [names[1]], form.name


def test_nothing_that_hurts_is_chosen_on_its_own_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choosing, "LEAST_COSINE", 1.1)
    path = graph(tmp_path, Patches())
    chosen = choose(path, "auto", pictures(), tmp_path)
    assert chosen.path == path
    assert "stays in float32" in chosen.notes[0]
    with pytest.raises(EmbedServeError, match="--precision int8 is refused"):
        choose(path, "int8", pictures(), tmp_path)


def test_auto_takes_the_fastest_that_is_good_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = graph(tmp_path, Patches())
    for rates, words in (
        ([100.0, 150.0, 120.0, 130.0], ROWS.name),
        ([100.0, 150.0, 180.0, 110.0], STATIC.name),
        ([100.0, 150.0, 160.0, 239.0], STATIC.name),  # dynamic is faster, but depends on the batch
        ([100.0, 150.0, 160.0, 240.0], DYNAMIC.name),
    ):
        monkeypatch.setattr(choosing, "speeds", lambda paths, inputs, rates=rates: rates)
        chosen = choose(path, "auto", pictures(), tmp_path)
        assert chosen.figures["chosen"] == words
        assert bool(chosen.notes) == (words == DYNAMIC.name)
    monkeypatch.setattr(choosing, "speeds", lambda paths, inputs: [100.0, 90.0, 99.0, 98.0])
    assert choose(path, "auto", pictures(), tmp_path).words == "float32"


def test_the_rule_needs_both_the_cosine_and_the_neighbours() -> None:
    assert suffices(Judged(0.98, 0.95, 1.0))
    assert not suffices(Judged(0.979, 1.0, 1.0))
    assert not suffices(Judged(1.0, 0.949, 1.0))


def test_halving_finds_every_layer_that_hurts_and_no_other() -> None:
    names = [f"layer {index}" for index in range(13)]
    bad = {"layer 3", "layer 8", "layer 9"}
    tried: list[int] = []

    def works(some: list[str]) -> bool:
        tried.append(len(some))
        return not bad & set(some)

    assert tolerated(names, works) == [name for name in names if name not in bad]  # type: ignore[arg-type]
    assert len(tried) < 26
