"""Encoders: what each of them gives, stems, names. Networks are real, but tiny."""

from __future__ import annotations

import copy
import json
import math

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import Tensor  # noqa: E402

from embedserve.errors import InvalidField  # noqa: E402
from training.backbones import Backbone, build, default_backbone, describe, known, stem_for  # noqa: E402

VIT = "test_vit/8"  # timm's own test architecture: 64 wide, 6 blocks, 2 heads


def images(size: int = 32, batch: int = 2, width: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, width or size, generator=torch.Generator().manual_seed(0))


def built(name: str, size: int = 32, **options: bool) -> Backbone:
    torch.manual_seed(0)
    return build(name, size, **options).eval()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# What every encoder gives


@pytest.mark.parametrize(
    ("name", "size", "dim", "patch_dim", "side"),
    [
        ("resnet18", 32, 512, 512, 4),
        ("resnet18", 64, 512, 512, 4),
        ("resnet50", 32, 2048, 2048, 4),
        (VIT, 32, 64, 64, 4),
        ("vit_tiny/8", 32, 192, 192, 4),
        ("test_vit2", 32, 64, 64, 2),  # a register and layer scale
        ("timm:test_resnet", 64, 96, 96, 2),
        ("test_convnext", 64, 64, 64, 2),
        ("mobilenetv3_small_100", 64, 1024, 576, 2),  # a convolution behind the pooling
        ("swin_tiny_patch4_window7_224", 56, 768, 768, 2),  # channels last inside
    ],
)
def test_pooled_features_and_patch_map_have_the_promised_sizes(
    name: str, size: int, dim: int, patch_dim: int, side: int
) -> None:
    backbone = built(name, size)
    with torch.no_grad():
        pooled, patches = backbone.features(images(size))
        assert torch.equal(backbone(images(size)), pooled)
    assert (backbone.dim, backbone.patch_dim) == (dim, patch_dim)
    assert pooled.shape == (2, dim)
    assert patches.shape == (2, patch_dim, side, side)


def test_a_resnet_pools_by_the_mean_and_is_otherwise_torchvisions() -> None:
    backbone = built("resnet18", 224)
    from torchvision.models import resnet18

    reference = resnet18()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(backbone.network.state_dict())
    with torch.no_grad():
        pooled, patches = backbone.features(images(64))
        torch.testing.assert_close(pooled, reference.eval()(images(64)))
    torch.testing.assert_close(pooled, patches.mean((2, 3)))


def test_a_vision_transformer_pools_by_the_class_token_behind_the_last_norm() -> None:
    backbone = built(VIT)
    with torch.no_grad():
        pooled, patches = backbone.features(images())
        tokens = backbone.network.forward_features(images())  # timm's own forward pass
    torch.testing.assert_close(pooled, tokens[:, 0])
    torch.testing.assert_close(patches.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_training_reaches_every_weight_through_both_outputs() -> None:
    for name in ("resnet18", VIT, "test_convnext"):
        backbone = build(name, 64)
        assert all(module.training for module in backbone.modules())
        pooled, patches = backbone.features(images(64))
        (pooled.square().sum() + patches.square().sum()).backward()
        assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


def test_the_same_seed_starts_the_same_weights() -> None:
    assert same_weights(built(VIT), built(VIT))
    torch.manual_seed(1)
    assert not same_weights(built(VIT), build(VIT, 32))


@pytest.mark.parametrize("name", ["resnet18", VIT])
def test_a_deep_copy_is_equal_and_independent(name: str) -> None:
    backbone = built(name, **({"mask_token": True, "sincos_positions": True} if name == VIT else {}))
    double = copy.deepcopy(backbone)
    assert same_weights(backbone, double)
    assert [p.requires_grad for p in double.parameters()] == [p.requires_grad for p in backbone.parameters()]
    assert (double.name, double.dim, double.notes) == (backbone.name, backbone.dim, backbone.notes)
    before = backbone(images())
    with torch.no_grad():
        for parameter in double.parameters():
            parameter.add_(1)
    assert torch.equal(backbone(images()), before)
    assert not torch.equal(double(images()), before)


@pytest.mark.parametrize("name", ["resnet18", VIT])
def test_memory_format_does_not_change_the_features(name: str) -> None:
    backbone = built(name)
    with torch.no_grad():
        expected = backbone.features(images())
        backbone.to(memory_format=torch.channels_last)
        found = backbone.features(images().contiguous(memory_format=torch.channels_last))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", VIT])
def test_bfloat16_autocast_trains_and_agrees_roughly(name: str) -> None:
    backbone = built(name, **({"mask_token": True} if name == VIT else {}))
    masks = torch.zeros(2, 16, dtype=torch.bool) if name == VIT else None
    exact = backbone(images())
    with torch.autocast("cpu", torch.bfloat16):
        rough = backbone.features(images(), masks)[0]
    assert torch.cosine_similarity(rough.float(), exact).min() > 0.99
    rough.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in backbone.parameters())


def test_compiling_finds_no_graph_break() -> None:
    backbone = built(VIT, mask_token=True)
    compiled = torch.compile(backbone, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images()), backbone(images()))


# Stems


def test_the_stem_follows_the_size_alone() -> None:
    assert [stem_for(size) for size in (28, 32, 40)] == ["small"] * 3
    assert [stem_for(size) for size in (41, 64, 96, 112)] == ["medium"] * 4
    assert [stem_for(size) for size in (113, 224)] == ["large"] * 2


@pytest.mark.parametrize(
    ("size", "stem", "kernel", "stride", "pools", "side"),
    [(32, "small", 3, 1, False, 4), (96, "medium", 3, 2, False, 6), (224, "large", 7, 2, True, 7)],
)
def test_stems_by_size(size: int, stem: str, kernel: int, stride: int, pools: bool, side: int) -> None:
    backbone = built("resnet18", size)
    network = backbone.network
    assert describe(backbone)["stem"] == stem
    assert (network.conv1.kernel_size, network.conv1.stride) == ((kernel, kernel), (stride, stride))
    assert isinstance(network.maxpool, torch.nn.MaxPool2d) == pools
    assert network.conv1.bias is None
    with torch.no_grad():
        assert backbone.features(images(size))[1].shape[2:] == (side, side)


def test_a_new_stem_starts_as_torchvision_starts_convolutions() -> None:
    weight = built("resnet50", 32).network.conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)


def test_residual_branches_of_a_resnet_start_at_zero() -> None:
    for name, last in (("resnet18", "bn2"), ("resnet50", "bn3")):
        block = built(name).network.layer2[1]
        assert getattr(block, last).weight.count_nonzero() == 0
        # So the block is the identity (behind its ReLU, which non-negative values pass).
        x = images(8, 1).abs().mean(1, keepdim=True).expand(-1, block.conv1.in_channels, -1, -1)
        torch.testing.assert_close(block(x), x)


def test_a_network_without_a_stem_for_small_images_says_so() -> None:
    assert "32 pixels become a map of 1×1" in built("test_resnet").notes[0]
    assert built("test_resnet", 160).notes == ()


# Names


def test_an_unknown_name_gets_the_closest_known_one() -> None:
    for name, closest in (
        ("resnet19", "resnet18"),
        ("vit_smal/16", "vit_small/16"),
        ("convnext_tinny", "convnext_tiny"),
    ):
        with pytest.raises(InvalidField, match=f"Backbone '{name}' not found; did you mean '{closest}'"):
            build(name, 32)


def test_a_patch_size_is_asked_for_and_checked() -> None:
    with pytest.raises(InvalidField, match="'vit_tiny' needs a patch size, such as 'vit_tiny/8'"):
        build("vit_tiny", 32)
    for name in ("convnext_tiny/4", "vit_tiny/0", "vit_tiny/x", "vit_tiny/"):
        with pytest.raises(InvalidField, match="a vision transformer's patch size"):
            build(name, 32)


def test_a_network_that_gives_tokens_is_refused() -> None:
    with pytest.raises(InvalidField, match="gives tokens instead of a feature map"):
        build("test_vit_relpos", 160)


def test_a_network_that_cannot_take_the_size_is_refused() -> None:
    with pytest.raises(InvalidField, match="'swin_tiny_patch4_window7_224' cannot"):
        build("swin_tiny_patch4_window7_224", 2)


def test_every_suggested_name_exists() -> None:
    import timm

    from training.backbones.building import SHORT
    from training.backbones.convolutional import RESNETS

    for name in known():
        architecture = name.partition("/")[0]
        assert name in RESNETS or timm.is_model(SHORT.get(architecture, architecture))


def test_the_default_suits_size_kind_and_machine() -> None:
    assert [default_backbone(size) for size in (32, 64, 65, 224)] == ["resnet18"] * 2 + ["resnet50"] * 2
    assert [default_backbone(size, "vit") for size in (32, 96, 224)] == [
        "vit_tiny/4",
        "vit_tiny/8",
        "vit_tiny/16",
    ]
    assert default_backbone(32, "vit", on_gpu=True) == "vit_tiny/4"
    assert default_backbone(96, "vit", on_gpu=True) == "vit_small/8"
    assert default_backbone(100, "vit") == "vit_tiny/4"  # 8 does not tile 100


def test_a_description_is_plain_data() -> None:
    described = describe(built(VIT, sincos_positions=True))
    assert json.loads(json.dumps(described)) == described
    assert described["name"] == VIT
    assert described["patch"] == 8
    assert described["parameters"] - described["trained_parameters"] == 17 * 64
    assert describe(built("resnet18"))["parameters"] == 11_168_832
