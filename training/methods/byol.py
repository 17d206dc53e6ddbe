"""BYOL: one view predicts what a slowly moving copy of the network makes of the other. No negatives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.backbones import Backbone
from training.heads import mlp
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.momentum import momentum_copy, suited_momentum
from training.precision import full_precision
from training.schedules import Schedule, cosine
from training.views import Augmentation, View

__all__ = ["BYOL", "BYOLOptions", "regression_loss"]

PUBLISHED = {
    1000: (0.996, 0.2, 1.5e-6),
    300: (0.99, 0.3, 1e-6),
    100: (0.99, 0.45, 1e-6),
    0: (0.97, 0.45, 1e-6),
}
"""From so many epochs on: first momentum, learning rate, weight decay. The authors' code, on ImageNet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BYOLOptions(MethodOptions):
    """Settings of BYOL."""

    hidden_dim: int = 4096
    """Length of the hidden layer of projector and predictor."""
    projection_dim: int = 256
    """Length of projections and predictions."""
    momentum_start: float = 0.996
    """Momentum of the target network at first: 0.97, 0.99 and 0.996 for 40, 100 and 1,000 epochs."""
    momentum_end: float = 1.0
    """Momentum of the target network at the end of its cosine."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        momentum, _, _ = _published(facts.epochs)
        return cls(momentum_start=suited_momentum(momentum, facts), hidden_dim=1024 if facts.small else 4096)


class BYOL(Method[BYOLOptions]):
    paper = "Grill et al. 2020, arXiv:2006.07733"
    summary = "one view predicts a momentum encoder's projection of the other; no negatives"
    Options = BYOLOptions

    def __init__(self, backbone: Backbone, options: BYOLOptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        hidden, dim = options.hidden_dim, options.projection_dim
        self.projector = mlp([backbone.dim, hidden, dim])
        self.predictor = mlp([dim, hidden, dim])
        self.target_backbone = momentum_copy(backbone)
        self.target_projector = momentum_copy(self.projector)

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4)
        _, lr, weight_decay = _published(facts.epochs)
        return Recipe(optimizer="lars", lr=lr, weight_decay=weight_decay)

    @classmethod
    def views(cls, augmentation: Augmentation, options: BYOLOptions, facts: Facts) -> tuple[View, ...]:
        # The usual recipe for small images, unlike the paper's for photographs, inverts no colours.
        solarize = 0.0 if facts.small else 0.2
        return (
            augmentation.view(facts.size, blur=1.0),
            augmentation.view(facts.size, blur=0.1, solarize=solarize, of="partner"),
        )

    @property
    def projection(self) -> nn.Module:
        return self.projector

    def loss(self, batch: Batch) -> Losses:
        first, second = (self.predictor(self.projector(self.backbone(view))) for view in batch.views)
        with torch.no_grad():
            target_first, target_second = (
                self.target_projector(self.target_backbone(view)) for view in batch.views
            )
        return {"loss": regression_loss(first, target_second) + regression_loss(second, target_first)}

    def schedules(self) -> dict[str, Schedule]:
        return {"momentum": cosine(self.options.momentum_start, self.options.momentum_end)}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.backbone, self.target_backbone), (self.projector, self.target_projector)]


@full_precision
def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """2 − 2 cos(prediction, target), mean over rows (Grill et al. 2020, eq. 2).

    Args:
        predictions: float [B, dim], of any length.
        targets: float [B, dim], of any length.

    Returns:
        float [], 0 where both point the same way to 4, in float32 or the float64 of its inputs.
    """
    return 2 - 2 * F.cosine_similarity(predictions, targets, dim=1).mean()


def _published(epochs: int) -> tuple[float, float, float]:
    return next(values for least, values in PUBLISHED.items() if epochs >= least)
