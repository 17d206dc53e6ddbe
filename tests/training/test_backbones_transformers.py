"""Vision transformers: image sizes, masks, attention, and what MoCo v3 fixes."""

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra 'train')")

from torch import Tensor  # noqa: E402

from embedserve.errors import InvalidField  # noqa: E402
from training.backbones import Backbone, build  # noqa: E402

VIT = "test_vit/8"  # timm's own test architecture: 64 wide, 6 blocks, 2 heads


def images(size: int = 32, batch: int = 2, width: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, width or size, generator=torch.Generator().manual_seed(0))


def built(name: str, size: int = 32, **options: bool) -> Backbone:
    torch.manual_seed(0)
    return build(name, size, **options).eval()


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
    for norm in ("q_norm", "k_norm"):  # some networks have them
        layer = torch.nn.LayerNorm(network.blocks[-1].attn.head_dim, dtype=torch.float64)
        torch.nn.init.normal_(layer.weight)
        setattr(network.blocks[-1].attn, norm, layer)
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
