"""MoCo v3: queries predict the momentum encoder's keys; the other images of the batch repel. No queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from training.backbones import Backbone
from training.heads import mlp
from training.losses import query_key_loss
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.momentum import momentum_copy, suited_momentum
from training.schedules import Schedule, cosine
from training.views import Augmentation, View

__all__ = ["MoCoV3", "MoCoV3Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoCoV3Options(MethodOptions):
    """Settings of MoCo v3."""

    temperature: float = 1.0
    """τ of InfoNCE: 1 for a ResNet on photographs, 0.2 for vision transformers and small images."""
    hidden_dim: int = 4096
    """Length of the hidden layers of projector and predictor."""
    projection_dim: int = 256
    """Length of queries and keys."""
    momentum_start: float = 0.99
    """Share of itself that the momentum encoder keeps each step, at the start."""
    momentum_end: float = 1.0
    """The same at the end; a cosine lies between."""
    beta: float = 0.0
    """Weight on hard negatives (Robinson et al. 2021); 0 treats all alike, 0.5 to 2 is usual."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        momentum = suited_momentum(0.996 if facts.epochs >= 1000 else 0.99, facts)
        if facts.small:
            return cls(temperature=0.2, hidden_dim=2048, momentum_start=momentum)
        return cls(temperature=0.2 if facts.backbone_kind == "vit" else 1.0, momentum_start=momentum)


class MoCoV3(Method[MoCoV3Options]):
    paper = "Chen, Xie & He 2021, arXiv:2104.02057"
    summary = "MoCo with large batches instead of a queue; for ResNets and vision transformers"
    Options = MoCoV3Options

    def __init__(self, backbone: Backbone, options: MoCoV3Options, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        hidden, out = options.hidden_dim, options.projection_dim
        vit = backbone.kind == "vit"
        # A vision transformer has one more layer in its projector, and a batch norm behind its predictor.
        projector = [backbone.dim, hidden, hidden, out] if vit else [backbone.dim, hidden, out]
        self.projector = mlp(projector, output_norm=True, output_affine=False)
        self.predictor = mlp([out, hidden, out], output_norm=vit, output_affine=False, output_bias=False)
        self.momentum_backbone = momentum_copy(backbone)
        self.momentum_projector = momentum_copy(self.projector)

    @classmethod
    def backbone_options(cls, facts: Facts) -> Mapping[str, bool]:
        """Keyword arguments for `training.backbones.build`.

        A vision transformer keeps its random patch embedding: trained, it is where MoCo v3 becomes unstable
        (section 4.2). Its positions are fixed sines and cosines (section 5).
        """
        if facts.backbone_kind == "vit":
            return {"freeze_patch_embedding": True, "sincos_positions": True}
        return {}

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.backbone_kind == "vit":
            return Recipe(optimizer="adamw", lr=1.5e-4, weight_decay=0.1, warmup_epochs=40)
        if facts.small:
            return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4)
        # The authors' settings for 100, 300 and 1,000 epochs.
        return Recipe(
            optimizer="lars",
            lr=0.6 if facts.epochs <= 100 else 0.3,
            weight_decay=1.5e-6 if facts.epochs >= 1000 else 1e-6,
        )

    @classmethod
    def views(cls, augmentation: Augmentation, options: MoCoV3Options, facts: Facts) -> tuple[View, ...]:
        # BYOL's two unequal views. Each view is query and key, so which is which does not matter.
        return (
            augmentation.view(facts.size, blur=1.0),
            augmentation.view(facts.size, blur=0.1, solarize=0.2, of="partner"),
        )

    def schedules(self) -> dict[str, Schedule]:
        return {"momentum": cosine(self.options.momentum_start, self.options.momentum_end)}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.backbone, self.momentum_backbone), (self.projector, self.momentum_projector)]

    @property
    def projection(self) -> nn.Module:
        return self.projector

    def loss(self, batch: Batch) -> Losses:
        first, second = (self.predictor(self.projector(self.backbone(view))) for view in batch.views)
        first_keys, second_keys = (self.keys(view) for view in batch.views)
        forward = self._contrast(first, second_keys, batch.ids)
        backward = self._contrast(second, first_keys, batch.ids)
        return {"loss": forward + backward}

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] → float [B, projection_dim], from the momentum encoder."""
        keys: Tensor = self.momentum_projector(self.momentum_backbone(images))
        return keys

    def _contrast(self, queries: Tensor, keys: Tensor, ids: Tensor) -> Tensor:
        options = self.options
        loss = query_key_loss(queries, keys, ids, temperature=options.temperature, beta=options.beta)
        # 2τ makes the size of the gradient nearly independent of τ (algorithm 1).
        return 2 * options.temperature * loss
