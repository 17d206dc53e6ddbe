"""What a vision transformer knows besides its vector: its patches, and where its class token looks."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

__all__ = ["OpenClipAttention", "OpenClipPatches", "TimmPatches", "open_clip_parts"]


class OpenClipPatches(nn.Module):
    """Patch tokens of open_clip's `VisionTransformer`, normalised as its class token is, not projected."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        visual = cast(Any, self.visual)
        return cast(Tensor, visual._pool(visual.transformer(visual._embeds(images)))[1])


class OpenClipAttention(nn.Module):
    """What the class token of open_clip's `VisionTransformer` attends to in the last block."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, images: Tensor) -> Tensor:
        visual = cast(Any, self.visual)
        *blocks, last = visual.transformer.resblocks
        tokens = visual._embeds(images)
        for block in blocks:
            tokens = block(tokens)
        tokens = last.ln_1(tokens)
        weights = last.attn(tokens[:, :1], tokens, tokens, need_weights=True, average_attn_weights=False)[1]
        return cast(Tensor, weights[:, :, 0, 1:])


class TimmPatches(nn.Module):
    """Patch tokens of a timm vision transformer, after its last norm."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.prefix = cast(int, trunk.num_prefix_tokens)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.trunk).forward_features(images)[:, self.prefix :])


def open_clip_parts(visual: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """Patches and attention of an image tower of open_clip; None for what it does not have."""
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
    from timm.models import vision_transformer

    if isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type != "none":
        plain = isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
        looks = visual.pool_type == "tok" and plain
        return OpenClipPatches(visual), OpenClipAttention(visual) if looks else None
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, vision_transformer.VisionTransformer):
        return TimmPatches(trunk), None
    return None, None
