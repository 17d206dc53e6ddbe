"""Weights between a run's start and what it learned."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from embedserve.bundle import open_bundle
from embedserve.cli import main
from embedserve.errors import Conflict, InvalidField, NotFound
from tests.training.pictures import quick, write_pictures
from training.blend import blend
from training.run import begin, open_run
from training.train import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`first` from scratch; `tuned` (clip), `lora` and `byol` begin with its weights."""
    folder = tmp_path_factory.mktemp("blend")
    data = str(write_pictures(folder / "pictures"))
    cache = {"cache_folder": f"{folder}/cache"}
    vit = {"backbone": "test_vit/4", "epochs": "1"}
    train("clip", data, folder / "first", quick("clip", **vit) | cache)
    start = cache | {"start": str(folder / "first" / "checkpoints" / "last.pt")}
    train("clip", data, folder / "tuned", quick("clip", **vit, seed=5) | start)
    train("clip", data, folder / "lora", quick("clip", **vit, seed=5, image_learns="lora") | start)
    train("byol", data, folder / "byol", quick("byol", **vit) | start)
    return folder


@torch.no_grad()
def vectors(path: Path) -> torch.Tensor:
    method = open_run(path).method
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return method.encoder(pixels)


@pytest.mark.parametrize("name", ["tuned", "lora", "byol"])
def test_the_ends_are_the_start_and_the_run(runs: Path, tmp_path: Path, name: str) -> None:
    assert not torch.allclose(vectors(runs / name), vectors(runs / "first" / "checkpoints" / "last.pt"))
    begun = vectors(blend(runs / name, 0, tmp_path / "0.pt"))
    learned = vectors(blend(runs / name, 1, tmp_path / "1.pt"))
    torch.testing.assert_close(learned, vectors(runs / name), rtol=0, atol=0)
    torch.testing.assert_close(begun, vectors(runs / "first" / "checkpoints" / "last.pt"), rtol=0, atol=1e-6)


def test_in_between_each_weight_lies_on_the_line(runs: Path, tmp_path: Path) -> None:
    found = open_run(blend(runs / "tuned", 0.25, tmp_path / "some.pt"))
    tuned = open_run(runs / "tuned")
    start = begin(tuned.settings).state_dict()
    for name, one in tuned.method.state_dict().items():
        expected = 0.75 * start[name] + 0.25 * one
        torch.testing.assert_close(found.method.state_dict()[name], expected, rtol=1e-6, atol=1e-7)


def test_with_lora_the_merged_weights_lie_on_the_line(runs: Path, tmp_path: Path) -> None:
    found, tuned = open_run(blend(runs / "lora", 0.5, tmp_path / "half.pt")), open_run(runs / "lora")
    start = begin(tuned.settings)

    def matrices(method: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {
            name: module.weight.detach()
            for name, module in method.named_modules()
            if isinstance(module, torch.nn.Linear) and "backbone" in name
        }

    ends = matrices(start), matrices(tuned.method)
    moved = 0
    for name, one in matrices(found.method).items():
        torch.testing.assert_close(one, (ends[0][name] + ends[1][name]) / 2, rtol=1e-5, atol=1e-7)
        moved += not torch.equal(ends[0][name], ends[1][name])
    assert moved > 0


def test_heads_that_began_at_random_stay_as_they_were_trained(runs: Path, tmp_path: Path) -> None:
    found = open_run(blend(runs / "byol", 0.5, tmp_path / "half.pt")).method.state_dict()
    tuned = open_run(runs / "byol").method.state_dict()
    heads = [
        name for name in tuned if "backbone" not in name and name.endswith("weight") and tuned[name].ndim > 1
    ]
    assert heads
    for name in heads:
        torch.testing.assert_close(found[name], tuned[name], rtol=0, atol=0)


def test_a_blend_is_exported_like_any_checkpoint(runs: Path, tmp_path: Path) -> None:
    half, out = tmp_path / "half.pt", tmp_path / "bundle"
    assert main(["blend", str(runs / "byol"), "--alpha", "0.5", "--out", str(half)]) == 0
    assert main(["export", str(half), "--out", str(out)]) == 0
    assert open_bundle(out).description.image


def test_what_cannot_be_blended_says_why(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.pt"
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(InvalidField, match="0 \\(the start\\) to 1"):
            blend(runs / "tuned", alpha, out)
    with pytest.raises(InvalidField, match="random weights"):
        blend(runs / "first", 0.5, out)
    with pytest.raises(NotFound):
        blend(runs / "none", 0.5, out)
    out.write_text("")
    with pytest.raises(Conflict, match="exists"):
        blend(runs / "tuned", 0.5, out)


def test_a_start_that_is_gone_or_changed_is_refused(runs: Path, tmp_path: Path) -> None:
    first, aside = runs / "first" / "checkpoints" / "last.pt", tmp_path / "aside.pt"
    shutil.move(first, aside)
    try:
        with pytest.raises(NotFound, match="not found"):
            blend(runs / "tuned", 0.5, tmp_path / "a.pt")
        state = torch.load(aside, weights_only=True)
        name = next(name for name in state["model"] if name.startswith("backbone."))
        state["model"][name] = state["model"][name] + 1e-3
        torch.save(state, first)
        with pytest.raises(Conflict, match="no longer holds"):
            blend(runs / "tuned", 0.5, tmp_path / "a.pt")
    finally:
        first.unlink(missing_ok=True)
        shutil.move(aside, first)
    assert not (tmp_path / "a.pt").exists()
