"""Training from a published checkpoint, by its name and by its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import nn  # noqa: E402

from embedserve.errors import InvalidField, NotFound  # noqa: E402
from tests.training.pictures import QUICK, write_pictures  # noqa: E402
from tests.training.published import authors, haiku  # noqa: E402
from tests.training.weights import assert_same  # noqa: E402
from training.backbones import build, describe, kind_of  # noqa: E402
from training.published import TABLE, find  # noqa: E402
from training.train import train  # noqa: E402

SMALL = "resnet14x1"


@pytest.fixture(autouse=True)
def small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of the table's checkpoints, as if of a smaller network."""
    for name, small in (
        ("moco_v2/resnet50-800ep", SMALL),
        ("swav/resnet50-800ep", SMALL),
        ("simclr/resnet50_1x", f"{SMALL}-simclr"),
        ("simclr_v2/r50_1x_sk1", f"{SMALL}-simclr-sk"),
        ("byol/resnet50", f"{SMALL}-byol"),
    ):
        monkeypatch.setitem(TABLE, name, replace(find(name), network=small))


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def test_a_name_and_a_file_say_network_and_weights(tmp_path: Path, network: nn.Module) -> None:
    path = saved(tmp_path / "a.pth.tar", authors.RESNETS["MoCo v2"][1](network))
    start = f"published:moco_v2/resnet50-800ep@{path}"
    assert kind_of("", start) == "conv"
    for asked, size in (("", 224), (SMALL, 64)):
        found = build(asked, size, start=start)
        assert found.name == SMALL
        assert describe(found)["stem"] == "large"  # the authors', whatever the size
        assert_same(found.network, without_fc(network))
    assert found.notes[0] == f"Starts from 'moco_v2/resnet50-800ep' ('{path}')."
    assert "Its licence forbids commercial use." in found.notes


def without_fc(network: nn.Module) -> nn.Module:
    assert isinstance(network.fc, nn.Identity)
    return network


def test_another_backbone_than_the_published_one_is_refused(tmp_path: Path, network: nn.Module) -> None:
    path = saved(tmp_path / "a.pth.tar", authors.RESNETS["MoCo v2"][1](network))
    with pytest.raises(InvalidField, match=rf"holds the weights of '{SMALL}', not of 'resnet18'"):
        build("resnet18", 64, start=f"published:moco_v2/resnet50-800ep@{path}")


def test_a_name_that_is_not_published_is_answered_with_the_closest() -> None:
    with pytest.raises(InvalidField, match="'moco_v2/resnet50-80ep' not found; known of moco_v2: moco_v2/"):
        build("", 64, start="published:moco_v2/resnet50-80ep")


def test_a_file_that_does_not_exist_is_named() -> None:
    with pytest.raises(
        NotFound, match=r"'nowhere\.pth' not found; give the file of 'moco_v2/resnet50-800ep'"
    ):
        build("", 64, start="published:moco_v2/resnet50-800ep@nowhere.pth")
    with pytest.raises(NotFound, match=r"or 'published:' with a name of docs/published\.md"):
        build("", 64, start="nowhere.pth")


# Training normalises images with ImageNet's mean and std; not all authors do.


@pytest.mark.parametrize("method", ["simclr", "simclr_v2", "swav"])
@torch.no_grad()
def test_the_first_layer_is_scaled_for_images_as_training_normalises_them(
    tmp_path: Path, network: nn.Module, method: str
) -> None:
    mean, std = ([0.0] * 3, [1.0] * 3) if method != "swav" else ([0.485, 0.456, 0.406], [0.228, 0.224, 0.225])
    if method == "simclr_v2":
        torch.manual_seed(8)
        original = build(f"{SMALL}-simclr-sk", 224).eval().network
        authors.unsettled(original)
        content = authors.converted_simclr_v2(dict(original.state_dict()), selective=True)
        name, stem = "simclr_v2/r50_1x_sk1", original.conv1[:2]
    else:
        name, stem = ("swav/resnet50-800ep" if method == "swav" else "simclr/resnet50_1x"), None
        content = authors.swav(network) if method == "swav" else authors.converted_simclr(network)
        stem = nn.Sequential(network.conv1, network.bn1)
    path = saved(tmp_path / "a.pth", content)
    found = build("", 224, start=f"published:{name}@{path}").eval()
    ours = (
        found.network.conv1[:2]
        if method == "simclr_v2"
        else nn.Sequential(found.network.conv1, found.network.bn1)
    )

    colours = torch.rand(2, 3, 64, 64)
    expected = stem((colours - shaped(mean)) / shaped(std))
    inside = ours((colours - shaped([0.485, 0.456, 0.406])) / shaped([0.229, 0.224, 0.225]))
    border = slice(None) if method == "swav" else slice(2, -2)  # zeros are their black and our mean colour
    torch.testing.assert_close(
        inside[..., border, border], expected[..., border, border], atol=1e-5, rtol=1e-5
    )
    assert any("first layer was scaled" in note for note in found.notes)


def shaped(colour: list[float]) -> torch.Tensor:
    return torch.tensor(colour)[:, None, None]


# The same files without their names


@torch.no_grad()
def test_byols_pickle_is_recognised_by_its_content(tmp_path: Path, network: nn.Module) -> None:
    path = tmp_path / "pretrain.pkl"
    path.write_bytes(haiku.checkpoint(*haiku.state_of(network)))
    named = build("", 64, start=f"published:byol/resnet50@{path}")
    assert named.name == f"{SMALL}-byol"
    counted = {name for name in network.state_dict() if "num_batches" in name}
    for found in (named, build(f"{SMALL}-byol", 64, start=str(path))):
        ours, theirs = found.network.state_dict(), network.state_dict()
        assert [
            name for name in theirs if name not in counted and not torch.equal(ours[name], theirs[name])
        ] == []


def test_simclrv2s_converted_file_is_recognised_by_its_content(tmp_path: Path, network: nn.Module) -> None:
    path = saved(tmp_path / "a.pth", authors.converted_simclr_v2(dict(network.state_dict()), selective=False))
    found = build(f"{SMALL}-simclr", 64, start=str(path))
    assert torch.equal(found.network.layer4[0].conv3.weight, network.layer4[0].conv3.weight)
    assert any("first layer was scaled" in note for note in found.notes)


def test_a_run_starts_from_a_published_checkpoint(
    tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(tmp_path / "cache"))
    path = saved(tmp_path / "a.pth.tar", authors.RESNETS["MoCo v2"][1](network))
    start = f"published:moco_v2/resnet50-800ep@{path}"
    given = {key: value for key, value in QUICK.items() if key != "backbone"}
    given |= {"start": start, "projection_dim": "32", "hidden_dim": "32"}
    run = tmp_path / "run"
    train("simclr", str(write_pictures(tmp_path / "pictures", each=10)), run, given | {"epochs": "1"})
    described = json.loads((run / "config.json").read_text())
    assert described["encoder"]["name"] == SMALL
    assert "Its licence forbids commercial use." in described["encoder"]["notes"]
    again = build("", 32, start=str(run))
    assert again.name == SMALL
    # trained a little, from there
    before, after = (net.state_dict()["layer4.0.conv3.weight"] for net in (network, again.network))
    assert not torch.equal(before, after)
    assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.9
