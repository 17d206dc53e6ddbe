"""Encoders: sizes, stems, masks, attention and positions. Networks are real, but tiny."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
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
    for name in ("resnet18", VIT):
        backbone = build(name, 32)
        assert backbone.training
        pooled, patches = backbone.features(images())
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


# Vision transformers: sizes


def test_images_of_other_sizes_take_resampled_positions() -> None:
    backbone = built(VIT, 32)
    with torch.no_grad():
        for height, width in ((16, 16), (48, 48), (32, 48)):
            pooled, patches = backbone.features(images(height, width=width))
            assert pooled.shape == (2, 64)
            assert patches.shape == (2, 64, height // 8, width // 8)
    # Bicubic resampling keeps a plane a plane, so positions linear in x and y can be checked by eye.
    with torch.no_grad():
        backbone.network.pos_embed.zero_()
        grid = backbone.network.pos_embed[0, 1:].view(4, 4, 64)
        grid[..., 0] = torch.arange(4.0)[:, None]
        grid[..., 1] = torch.arange(4.0)
        added = backbone.network._pos_embed(torch.zeros(1, 8, 8, 64))[0, 1:].view(8, 8, 64)
    torch.testing.assert_close(added[2:6, 3, 0], torch.tensor([0.75, 1.25, 1.75, 2.25]), atol=0.06, rtol=0)
    torch.testing.assert_close(added[3, 2:6, 1], torch.tensor([0.75, 1.25, 1.75, 2.25]), atol=0.06, rtol=0)


@pytest.mark.parametrize(
    ("name", "size", "nearest"),
    [("vit_tiny/8", 50, "48 or 56"), ("vit_tiny/16", 10, "16"), ("test_vit", 40, "32 or 48")],
)
def test_a_size_that_patches_do_not_tile_names_the_nearest(name: str, size: int, nearest: str) -> None:
    with pytest.raises(InvalidField, match=f"Images of {size} pixels .* nearest sizes are {nearest}"):
        build(name, size)


def test_an_image_that_patches_do_not_tile_names_the_nearest() -> None:
    with pytest.raises(InvalidField, match=r"Images of 36 pixels .* 32 or 40"):
        built(VIT)(images(36))


def test_drop_path_reaches_its_rate_in_the_last_block() -> None:
    blocks = build(VIT, 32, drop_path=0.1).network.blocks
    assert blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert build("test_convnext", 64, drop_path=0.1).features(images(64))[0].isfinite().all()
    with pytest.raises(InvalidField, match="'resnet18' has no stochastic depth"):
        build("resnet18", 32, drop_path=0.1)


# Vision transformers: masks


def test_mask_tokens_replace_exactly_the_masked_patches() -> None:
    backbone = built(VIT, mask_token=True)
    with torch.no_grad():
        backbone.mask_token.normal_(generator=torch.Generator().manual_seed(1))  # type: ignore[union-attr, operator]
    masks = torch.rand(2, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    seen: list[Tensor] = []
    backbone.network.blocks.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        backbone.features(images())
        backbone.features(images(), masks)
    plain, masked = seen
    positions = backbone.network.pos_embed
    assert 0 < masks.sum() < masks.numel()
    assert torch.equal(masked[:, 0], plain[:, 0])
    assert torch.equal(masked[:, 1:][~masks], plain[:, 1:][~masks])
    expected = backbone.mask_token + positions[:, 1:].expand(2, -1, -1)[masks]
    torch.testing.assert_close(masked[:, 1:][masks], expected)


def test_a_masked_patch_has_no_influence_whatever_it_shows() -> None:
    backbone = built(VIT, mask_token=True)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[:, 6] = True  # row 1, column 2
    changed = images().clone()
    changed[:, :, 8:16, 16:24] += 1
    with torch.no_grad():
        assert torch.equal(backbone.features(images(), masks)[0], backbone.features(changed, masks)[0])
        assert not torch.equal(backbone(images()), backbone(changed))


def test_the_mask_token_starts_at_zero_and_learns_from_masked_patches_alone() -> None:
    backbone = built(VIT, mask_token=True)
    token = backbone.mask_token
    assert isinstance(token, torch.nn.Parameter)
    assert token.count_nonzero() == 0
    backbone.features(images(), torch.zeros(2, 16, dtype=torch.bool))[0].sum().backward()
    assert token.grad is not None
    assert token.grad.count_nonzero() == 0
    backbone.features(images(), torch.ones(2, 16, dtype=torch.bool))[0].square().sum().backward()
    assert token.grad.count_nonzero() > 0
    assert "mask_token" not in dict(built(VIT).named_parameters())


def test_masks_that_cannot_be_applied_are_refused() -> None:
    masks = torch.zeros(2, 16, dtype=torch.bool)
    with pytest.raises(InvalidField, match="without a mask token; build it with mask_token=True"):
        built(VIT).features(images(), masks)
    with pytest.raises(InvalidField, match=r"masks has shape \[2, 15\]; \[2, 16\] is needed"):
        built(VIT, mask_token=True).features(images(), masks[:, 1:])
    with pytest.raises(InvalidField, match="'resnet18' is convolutional and cannot mask"):
        built("resnet18").features(images(), masks)


# Vision transformers: attention


@pytest.mark.parametrize(("name", "prefix"), [("test_vit/8", 1), ("test_vit2/8", 2), ("test_vit3/8", 2)])
def test_attention_is_the_literal_softmax_of_the_last_block(name: str, prefix: int) -> None:
    backbone = built(name).double()
    network = backbone.network
    seen: list[Tensor] = []
    network.blocks[-1].norm1.register_forward_hook(lambda *given: seen.append(given[-1]))
    pixels = images().double()
    with torch.no_grad():
        found = backbone.attention(pixels)
        backbone(pixels)
    assert torch.equal(seen[0], seen[1])  # the tokens that the last block really takes
    attn, tokens = network.blocks[-1].attn, seen[1].numpy()
    weight, bias = attn.qkv.weight.detach().numpy(), attn.qkv.bias.detach().numpy()
    heads, size = attn.num_heads, attn.head_dim
    assert tokens.shape[1] == prefix + 16
    for image in range(2):
        for head in range(heads):
            rows = slice(head * size, (head + 1) * size)
            query = weight[: heads * size][rows] @ tokens[image, 0] + bias[: heads * size][rows]
            keys = tokens[image] @ weight[heads * size :][rows].T + bias[heads * size :][rows]
            query = attn.q_norm(torch.from_numpy(query)).detach().numpy()
            keys = attn.k_norm(torch.from_numpy(keys)).detach().numpy()
            scores = np.exp(keys @ query / math.sqrt(size))
            row = scores / scores.sum()
            shown = found[image, head].flatten().numpy()
            np.testing.assert_allclose(shown, row[prefix:], rtol=1e-5)
            assert shown.sum() + row[:prefix].sum() == pytest.approx(1, abs=1e-6)


def test_attention_has_a_map_for_each_head_at_any_size() -> None:
    assert built(VIT).attention(images(48, width=32)).shape == (2, 2, 6, 4)


def test_attention_of_a_convolutional_network_is_refused() -> None:
    with pytest.raises(InvalidField, match="'resnet18' is convolutional and has no attention"):
        built("resnet18").attention(images())


def test_attention_of_a_block_that_has_another_kind_is_refused() -> None:
    backbone = built(VIT)
    backbone.network.blocks[-1].attn = torch.nn.Identity()
    with pytest.raises(InvalidField, match="no plain self-attention"):
        backbone.attention(images())


# MoCo v3: a frozen patch projection and fixed positions


def test_a_frozen_patch_embedding_is_uniform_and_never_trained() -> None:
    backbone = built("vit_tiny/8", freeze_patch_embedding=True)
    projection = backbone.network.patch_embed.proj
    assert not any(parameter.requires_grad for parameter in projection.parameters())
    bound = math.sqrt(6 / (3 * 8 * 8 + 192))
    assert projection.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert projection.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert projection.bias.count_nonzero() == 0
    backbone.features(images())[0].sum().backward()
    assert projection.weight.grad is None
    # The rest starts as in the paper's code: q, k and v as if they were three layers.
    qkv = backbone.network.blocks[0].attn.qkv.weight
    assert qkv.abs().max().item() == pytest.approx(math.sqrt(6 / (192 + 192)), rel=1e-3)
    assert all(parameter.requires_grad for parameter in built(VIT).parameters())


def test_sine_cosine_positions_equal_the_literal_ones() -> None:
    backbone = built("vit_tiny/8", sincos_positions=True)
    positions = backbone.network.pos_embed
    assert not positions.requires_grad
    assert positions[0, 0].count_nonzero() == 0
    quarter = 192 // 4
    for row in range(4):
        for column in range(4):
            expected = [
                wave(place / 10000 ** (i / quarter))
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for i in range(quarter)
            ]
            found = positions[0, 1 + row * 4 + column].double().numpy()
            np.testing.assert_allclose(found, expected, atol=1e-7)


def test_what_only_transformers_have_is_refused_for_others() -> None:
    for name in ("resnet18", "test_convnext"):
        for option in ("mask_token", "freeze_patch_embedding", "sincos_positions"):
            with pytest.raises(InvalidField, match=f"'{name}' is not a vision transformer"):
                built(name, 64, **{option: True})


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
