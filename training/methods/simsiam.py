"""SimSiam: one view predicts the other; the gradient stops at what is predicted. No negatives, no copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from training.backbones import Backbone
from training.heads import mlp
from training.method import Batch, Facts, Losses, Method, MethodOptions, ParameterRule, Recipe
from training.precision import full_precision
from training.views import Augmentation, View

__all__ = ["SimSiam", "SimSiamOptions", "negative_cosine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimSiamOptions(MethodOptions):
    """Settings of SimSiam."""

    projection_dim: int = 2048
    """Length of the projector's layers, and of what is predicted."""
    prediction_dim: int = 512
    """Length of the predictor's hidden layer: a bottleneck."""
    projection_layers: int = 3
    """Linear layers of the projector; 2 for small images."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        return cls(projection_layers=2) if facts.small else cls()


class SimSiam(Method[SimSiamOptions]):
    paper = "Chen & He 2020, arXiv:2011.10566"
    summary = "one view predicts the other behind a stopped gradient; no negatives, no momentum encoder"
    Options = SimSiamOptions

    def __init__(self, backbone: Backbone, options: SimSiamOptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        dim = options.projection_dim
        # The norm on the output has no scale and shift: the paper's code, not its text.
        self.projector = mlp(
            [backbone.dim, *[dim] * options.projection_layers], output_norm=True, output_affine=False
        )
        self.predictor = mlp([dim, options.prediction_dim, dim])

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            # A quarter of the other methods' rate: the paper's for CIFAR-10 (appendix D).
            return Recipe(optimizer="sgd", lr=0.03, weight_decay=5e-4)
        return Recipe(optimizer="sgd", lr=0.05, weight_decay=1e-4, warmup_epochs=0.0)

    @classmethod
    def views(cls, augmentation: Augmentation, options: SimSiamOptions, facts: Facts) -> tuple[View, ...]:
        return augmentation.view(facts.size), augmentation.view(facts.size, of="partner")

    def parameter_rules(self) -> list[ParameterRule]:
        # The predictor has to keep up with the newest projections to the end (section 4.2).
        return [ParameterRule(module=self.predictor, fixed_lr=True)]

    @property
    def projection(self) -> nn.Module:
        return self.projector

    def loss(self, batch: Batch) -> Losses:
        first, second = (self.projector(self.backbone(view)) for view in batch.views)
        forth = negative_cosine(self.predictor(first), second)
        back = negative_cosine(self.predictor(second), first)
        return {"loss": (forth + back) / 2}


@full_precision
def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """−cos(prediction, target), mean over rows (Chen & He 2020, eq. 1). No gradient reaches the targets.

    Args:
        predictions: float [B, dim], of any length.
        targets: float [B, dim], of any length.

    Returns:
        float [], −1 to 1, in float32 or the float64 of its inputs.
    """
    return -F.cosine_similarity(predictions, targets.detach(), dim=1).mean()
