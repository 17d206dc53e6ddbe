"""What a vision transformer knows besides its vector: its patches, and where its class token looks."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training.backbones import Backbone

__all__ = [
    "BackboneAttention",
    "BackboneMean",
    "BackbonePatches",
    "HuggingFaceAttention",
    "HuggingFacePatches",
    "HuggingFacePooled",
    "MapCells",
    "OpenClipAttention",
    "OpenClipPatches",
    "TimmPatches",
    "TimmPooled",
    "attention_of",
    "open_clip_parts",
]


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


class HuggingFacePooled(nn.Module):
    """The vector of an image in transformers.

    features: a model with two towers gives it in the space it shares with texts; pooled: as the model pools;
    class: the class token after the last norm; mean: the mean of the patches after it.
    """

    def __init__(self, model: nn.Module, kind: Literal["features", "pooled", "class", "mean"]) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        self.prefix = _prefix(model)

    def forward(self, images: Tensor) -> Tensor:
        model = cast(Any, self.model)
        if self.kind == "features":
            return cast(Tensor, model.get_image_features(pixel_values=images).pooler_output)
        found = model(pixel_values=images)
        if self.kind == "pooled":
            return cast(Tensor, found.pooler_output)
        tokens = cast(Tensor, found.last_hidden_state)
        return tokens[:, 0] if self.kind == "class" else tokens[:, self.prefix :].mean(dim=1)


class HuggingFacePatches(nn.Module):
    """Patch tokens of a vision transformer in transformers, as it gives them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vision = cast(nn.Module, getattr(model, "vision_model", model))
        self.prefix = _prefix(model)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.vision)(pixel_values=images).last_hidden_state)[:, self.prefix :]


class HuggingFaceAttention(nn.Module):
    """What the class token of CLIP, DINOv2 or ViT in transformers attends to in the last block."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vision = cast(nn.Module, getattr(model, "vision_model", model))
        self.prefix = _prefix(model)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """SigLIP has no class token; BEiT adds positions to its attention in a way of its own."""
        return cast(Any, model).config.model_type in {"clip", "dinov2", "dinov2_with_registers", "vit"}

    def forward(self, images: Tensor) -> Tensor:
        vision = cast(Any, self.vision)
        *blocks, last = _blocks(vision)
        tokens = vision.embeddings(images)
        if hasattr(vision, "pre_layrnorm"):
            tokens = vision.pre_layrnorm(tokens)
        for block in blocks:
            tokens = block(tokens, attention_mask=None)
        norm = next(getattr(last, name) for name in NORMS if hasattr(last, name))
        attend = last.self_attn if hasattr(last, "self_attn") else last.attention
        return cast(Tensor, attend(norm(tokens), attention_mask=None)[1])[:, :, 0, self.prefix :]


NORMS = ("norm1", "layer_norm1", "layernorm_before")
"""What transformers calls the norm before attention: in DINOv2, CLIP and ViT."""


def _blocks(vision: Any) -> Any:
    encoder = getattr(vision, "encoder", vision)
    return encoder.layer if hasattr(encoder, "layer") else encoder.layers


def _prefix(model: nn.Module) -> int:
    """Tokens before the patches."""
    config = cast(Any, model).config
    return 0 if config.model_type == "siglip" else 1 + getattr(config, "num_register_tokens", 0)


class TimmPooled(nn.Module):
    """The class token, or the mean of the patches, of a timm vision transformer behind its last norms."""

    def __init__(self, trunk: nn.Module, kind: Literal["class", "mean"]) -> None:
        super().__init__()
        self.trunk = trunk
        self.kind = kind
        self.prefix = cast(int, trunk.num_prefix_tokens)

    def forward(self, images: Tensor) -> Tensor:
        tokens = cast(Any, self.trunk).forward_features(images)
        pooled = tokens[:, 0] if self.kind == "class" else tokens[:, self.prefix :].mean(dim=1)
        return cast(Tensor, cast(Any, self.trunk).fc_norm(pooled))


class MapCells(nn.Module):
    """The last feature map of one of timm's convolutional networks, cell after cell."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return _cells(cast(Any, self.network).forward_features(images))


class BackbonePatches(nn.Module):
    """The patch map of one of our backbones, patch after patch."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return _cells(self.backbone.features(images)[1])


class BackboneMean(nn.Module):
    """The mean of a backbone's patches, [batch, patch_dim]."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.features(images)[1].mean((2, 3))


class BackboneAttention(nn.Module):
    """What the class token of one of our vision transformers attends to in the last block."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.attention(images).flatten(2)


def attention_of(backbone: Backbone, height: int, width: int) -> nn.Module | None:
    """`BackboneAttention`; None where the network has none to show."""
    attention = BackboneAttention(backbone)
    try:
        with torch.no_grad():
            attention(torch.zeros(1, 3, height, width))
    except InvalidField:
        return None
    return attention


def _cells(features: Tensor) -> Tensor:
    """[batch, channels, h, w] → [batch, h · w, channels]"""
    return features.flatten(2).transpose(1, 2)
