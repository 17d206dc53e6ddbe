"""Vision transformers (Dosovitskiy et al. 2021), timm's implementation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training.backbones.base import Backbone

__all__ = ["VisionTransformer", "check_size", "freeze_positions", "freeze_projection", "sincos_positions"]


class VisionTransformer(Backbone):
    """One of timm's `VisionTransformer` networks, with a class token and positions resampled to the image.

    Pooled features are the class token behind the last norm, as DINO takes them; patch features are the
    patch tokens behind the same norm.
    """

    kind = "vit"

    def __init__(self, name: str, network: nn.Module, *, mask_token: bool = False) -> None:
        dim = int(network.embed_dim)  # type: ignore[arg-type]
        super().__init__(name, network, dim, dim)
        self.patch = int(self.network.patch_embed.patch_size[0])
        self.mask_token = nn.Parameter(torch.zeros(dim)) if mask_token else None

    def features(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        tokens, height, width = self._embed(images, masks)
        tokens = self.network.norm(self.network.blocks(tokens))
        pooled = self.network.fc_norm(tokens[:, 0])
        patches = tokens[:, self.network.num_prefix_tokens :]
        return pooled, patches.transpose(1, 2).view(-1, self.dim, height, width)

    def attention(self, images: Tensor) -> Tensor:
        tokens, height, width = self._embed(images, None)
        *blocks, last = self.network.blocks
        attn: Any = getattr(last, "attn", None)
        if type(attn).__name__ != "Attention":
            raise InvalidField(
                f"The last block of '{self.name}' has no plain self-attention to show; choose another vision "
                "transformer, such as 'vit_small/16'.",
                param="backbone",
            )
        for block in blocks:
            tokens = block(tokens)
        # Fused attention never holds these weights, so they are made here from the block's own q and k.
        qkv = attn.qkv(last.norm1(tokens)).unflatten(2, (3, attn.num_heads, -1))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, tokens, head dim]
        query, key = attn.q_norm(query[:, :, :1]), attn.k_norm(key)
        scores = torch.matmul(query, key.transpose(2, 3))[:, :, 0].float() * attn.scale
        rows = torch.softmax(scores, dim=-1)[..., self.network.num_prefix_tokens :]
        return rows.reshape(images.shape[0], -1, height, width)

    def _embed(self, images: Tensor, masks: Tensor | None) -> tuple[Tensor, int, int]:
        """Tokens [B, prefix + h·w, dim] with positions, as the first block takes them; h and w."""
        for side in images.shape[2:]:
            check_size(self.name, side, self.patch)
        patches = self.network.patch_embed(images)  # [B, h, w, dim]
        height, width = patches.shape[1:3]
        if masks is not None:
            if self.mask_token is None:
                raise InvalidField(
                    f"'{self.name}' was built without a mask token; build it with mask_token=True.",
                    param="masks",
                )
            if masks.shape != (len(images), height * width):
                raise InvalidField(
                    f"masks has shape {list(masks.shape)}; [{len(images)}, {height * width}] is needed, one "
                    "entry for each patch.",
                    param="masks",
                )
            hidden = masks.view(-1, height, width, 1)
            patches = torch.where(hidden, self.mask_token.to(patches.dtype), patches)
        tokens = self.network._pos_embed(patches)
        return self.network.norm_pre(self.network.patch_drop(tokens)), height, width


def check_size(name: str, size: int, patch: int) -> None:
    """Raises InvalidField with the nearest sizes when patches of `patch` pixels do not tile `size` pixels."""
    if size % patch:
        below, above = size // patch * patch, (size // patch + 1) * patch
        nearest = f"{below} or {above}" if below else f"{above}"
        raise InvalidField(
            f"Images of {size} pixels do not divide into the patches of {patch} pixels of '{name}'; "
            f"the nearest sizes are {nearest}.",
            param="size",
        )


def sincos_positions(height: int, width: int, dim: int, prefix: int) -> Tensor:
    """Fixed two-dimensional positions, float32 [1, prefix + h·w, dim] (MoCo v3, Chen et al. 2021).

    The patch in row y and column x gets [sin xω, cos xω, sin yω, cos yω], each of dim/4 numbers with
    ωᵢ = 10000^(−i/(dim/4)); class token and registers, the first `prefix` tokens, get zero.

    Raises:
        InvalidField: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise InvalidField(
            f"Sine-cosine positions need a width divisible by 4, not {dim}.", param="positions"
        )
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    angles = [columns[:, None] * omega, rows[:, None] * omega]
    patches = torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)
    return torch.cat([patches.new_zeros(prefix, dim), patches]).float()[None]


def freeze_positions(backbone: VisionTransformer, *, restart: bool) -> None:
    """Positions are not trained; with `restart` they become sines and cosines."""
    net = backbone.network
    if restart:
        prefix = 0 if net.no_embed_class else net.num_prefix_tokens
        height, width = net.patch_embed.grid_size
        with torch.no_grad():
            net.pos_embed.copy_(sincos_positions(height, width, backbone.dim, prefix))
    net.pos_embed.requires_grad_(False)


def freeze_projection(backbone: VisionTransformer, *, restart: bool) -> None:
    """The patch projection is not trained. With `restart` it is drawn uniformly, with the bound that Xavier's
    rule gives a linear layer of 3·p² inputs (MoCo v3's code)."""
    projection = backbone.network.patch_embed.proj
    if restart:
        bound = math.sqrt(6 / (3 * backbone.patch**2 + backbone.dim))
        nn.init.uniform_(projection.weight, -bound, bound)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    projection.requires_grad_(False)
