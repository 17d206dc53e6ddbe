"""Which part of a tower learns: low-rank additions, last blocks, all of it or nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from tests.training.pictures import quick, write_pictures
from tests.training.text.examples import hugging_face_folder
from tests.training.tiny import TinyConv
from training.backbones import build
from training.checkpoint import load
from training.run import open_run
from training.text import build_text
from training.train import train
from training.tuning import LowRank, add_low_rank, fill, keep_locked, merge_low_rank, merged, tune

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TOKENS = torch.tensor([[49406, 320, 49407, 0], [49406, 7, 8, 49407]])

TOWERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "timm ViT": (lambda: build("test_vit/8", 32), IMAGES),
    "open_clip ViT": (lambda: build("open_clip:ViT-S-32", 32), IMAGES),
    "open_clip text": (lambda: build_text("transformer/2x32"), TOKENS),
}


@pytest.fixture(scope="module", params=TOWERS)
def tower_and_batch(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, batch = TOWERS[request.param]
    return make().eval(), batch


def learning(tower: nn.Module) -> set[str]:
    return {name for name, one in tower.named_parameters() if one.requires_grad}


def moved(tower: nn.Module, batch: Tensor) -> nn.Module:
    """After a step that is large enough to see."""
    tower(batch).square().sum().backward()
    with torch.no_grad():
        for one in tower.parameters():
            if one.grad is not None:
                one -= 0.05 * one.grad / one.grad.abs().max().clamp(min=1e-6)
                one.grad = None
    return tower


# ------------------------------------------------------------------------------------------------ LoRA


def test_additions_start_as_nothing_learn_alone_and_merge_exactly(
    tower_and_batch: tuple[nn.Module, Tensor],
) -> None:
    plain, batch = tower_and_batch
    tower = copy.deepcopy(plain)
    tune(tower, "lora", blocks=0, rank=4, name="image_learns")
    with torch.no_grad():
        expected = plain(batch)
        assert torch.equal(tower(batch), expected), "B is 0 at first"
    assert learning(tower)
    assert all(name.endswith((".0.first", ".0.second")) for name in learning(tower))
    locked = {name: one.detach().clone() for name, one in tower.named_parameters() if not one.requires_grad}
    for _ in range(2):  # at first only B has a gradient: it stands before A
        moved(tower, batch)
    still = dict(tower.named_parameters())
    assert all(torch.equal(value, still[name]) for name, value in locked.items())
    with torch.no_grad():
        learned = tower(batch)
        assert (learned - expected).abs().max() > 1e-3
        state = merged(tower.state_dict())
        assert state.keys() == plain.state_dict().keys()
        again = copy.deepcopy(plain)
        again.load_state_dict(state)
        torch.testing.assert_close(again(batch), learned, rtol=1e-5, atol=1e-6)
        merge_low_rank(tower)
        assert tower.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(tower(batch), learned, rtol=1e-5, atol=1e-6)


def test_an_addition_is_b_times_a_over_the_root_of_the_rank() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    weight = layer.weight.detach().clone()
    assert add_low_rank(layer, 2) == 1
    step: Any = layer.parametrizations["weight"][0]  # type: ignore[index]
    with torch.no_grad():
        step.second.copy_(torch.randn(3, 2))
    expected = weight + step.second @ step.first / 2**0.5
    torch.testing.assert_close(layer.weight, expected)
    assert LowRank(torch.zeros(3, 5), 64).first.shape == (3, 5), "no rank is higher than the matrix's"


def test_weights_are_filled_in_beneath_additions() -> None:
    source, target = build_text("transformer/1x32"), build_text("transformer/1x32")
    add_low_rank(target, 2)
    fill(target, source.state_dict())
    assert torch.equal(target(TOKENS), source(TOKENS))


def test_a_tower_without_matrices_cannot_have_additions() -> None:
    with pytest.raises(InvalidField, match=r"image_learns=lora adds .*transformers.*image_learns=blocks"):
        tune(TinyConv(), "lora", blocks=0, rank=4, name="image_learns")


@pytest.mark.parametrize("how", [{"image_learns": "lora", "backbone": "test_vit/8"}, {"text_learns": "lora"}])
def test_a_run_with_additions_comes_back_merged_goes_on_and_can_be_started_from(
    how: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(tmp_path / "cache"))
    pictures = str(write_pictures(tmp_path / "pictures", each=8))
    given = quick("clip", epochs=1, **how)
    train("clip", pictures, tmp_path / "run", given)
    state = load(tmp_path / "run" / "checkpoints" / "last.pt")
    assert any("parametrizations" in name for name in state["model"])
    assert train("clip", pictures, tmp_path / "run", given).finished, "the same command again"
    found = open_run(tmp_path / "run" / "checkpoints" / "last.pt").method
    assert not any("parametrizations" in name for name in found.state_dict())
    changes = {"start": str(tmp_path / "run" / "checkpoints" / "last.pt"), "lr": "0", "holdout": "0"}
    train("clip", pictures, tmp_path / "next", given | changes)
    begun = open_run(tmp_path / "next").method
    for name, value in found.state_dict().items():
        if value.is_floating_point() and "running" not in name:
            torch.testing.assert_close(
                begun.state_dict()[name], value, msg=lambda text, of=name: f"{of}: {text}"
            )


# ---------------------------------------------------------------------------------------- last blocks


def test_of_a_resnet_the_last_stages_learn() -> None:
    tower = build("test_resnet", 32)
    tune(tower, "blocks", blocks=2, rank=0, name="image_learns")
    assert {name.split(".")[1] for name in learning(tower)} == {"layer3", "layer4"}


def test_of_timms_vit_the_last_blocks_and_the_norm_behind_them_learn() -> None:
    tower = build("test_vit/8", 32)
    count = len(tower.network.blocks)
    tune(tower, "blocks", blocks=1, rank=0, name="image_learns")
    own = {name.removeprefix("network.") for name in learning(tower)}
    assert {name.split(".")[0] for name in own} <= {"blocks", "norm", "fc_norm"}
    assert any(name.startswith(("norm.", "fc_norm.")) for name in own)
    assert {name.split(".")[1] for name in own if name.startswith("blocks.")} == {str(count - 1)}


def test_of_open_clips_vit_the_last_blocks_norm_and_projection_learn() -> None:
    tower = build("open_clip:ViT-S-32", 32)
    count = len(tower.network.transformer.resblocks)
    tune(tower, "blocks", blocks=3, rank=0, name="image_learns")
    own = {name.removeprefix("network.") for name in learning(tower)}
    blocks = {name for name in own if "resblocks" in name}
    assert {int(name.split(".")[2]) for name in blocks} == {count - 3, count - 2, count - 1}
    assert own - blocks == {"ln_post.weight", "ln_post.bias", "proj"}


def test_of_open_clips_resnet_the_attention_behind_the_stages_learns() -> None:
    tower = build("open_clip:RN50", 64)
    tune(tower, "blocks", blocks=1, rank=0, name="image_learns")
    assert {name.split(".")[1] for name in learning(tower)} == {"layer4", "attnpool"}


def test_of_text_towers_the_last_blocks_and_what_follows_learn(tmp_path: Path) -> None:
    tower = build_text("transformer/3x32")
    tune(tower, "blocks", blocks=1, rank=0, name="text_learns")
    own = {name.removeprefix("network.") for name in learning(tower)}
    blocks = {name for name in own if "resblocks" in name}
    assert {name.split(".")[2] for name in blocks} == {"2"}
    assert own - blocks == {"norm.weight", "norm.bias", "projection"}
    bert = build_text(f"hf:{hugging_face_folder(tmp_path)}")
    tune(bert, "blocks", blocks=1, rank=0, name="text_learns")
    assert {name.removeprefix("network.model.").split(".layer.")[1][0] for name in learning(bert)} == {"1"}


def test_locked_stages_keep_their_statistics_and_those_that_learn_do_not() -> None:
    tower = build("test_resnet", 32)
    tune(tower, "blocks", blocks=1, rank=0, name="image_learns")
    before = {name: value.clone() for name, value in tower.named_buffers()}
    tower.train()
    keep_locked(tower)
    tower(IMAGES.repeat(2, 1, 1, 1))
    changed = {
        name.split(".")[1] for name, value in tower.named_buffers() if not torch.equal(value, before[name])
    }
    assert changed == {"layer4"}


@pytest.mark.parametrize("how", ["all", "nothing"])
def test_a_tower_learns_as_a_whole_or_not_at_all(how: Any) -> None:
    tower = TinyConv()
    everything = learning(tower)
    tune(tower, how, blocks=0, rank=0, name="image_learns")
    assert learning(tower) == (everything if how == "all" else set())


def test_more_blocks_than_there_are_and_towers_without_are_refused() -> None:
    with pytest.raises(InvalidField, match=r"last_blocks=5, but the tower has only 4; .*image_learns=all"):
        tune(build("test_resnet", 32), "blocks", blocks=5, rank=0, name="image_learns")
    with pytest.raises(InvalidField, match=r"text_learns=blocks needs a tower that is a row of blocks"):
        tune(TinyConv(), "blocks", blocks=1, rank=0, name="text_learns")
