"""SimCLR: two views of one image attract, all others in the batch repel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import Tensor, nn

from training.backbones import Backbone
from training.heads import mlp
from training.losses import nt_xent
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.views import Augmentation, View

__all__ = ["SimCLR", "SimCLROptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCLROptions(MethodOptions):
    """Settings of SimCLR."""

    temperature: float = 0.1
    """τ of NT-Xent: 0.1 for photographs, 0.5 for small images."""
    hidden_dim: int = 2048
    """Length of the projection head's hidden layers."""
    projection_dim: int = 128
    """Length of the projections that are compared."""
    beta: float = 0.0
    """Weight on hard negatives (Robinson et al. 2021); 0 treats all alike, 0.5 to 2 is usual."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        return cls(temperature=0.5, hidden_dim=512) if facts.small else cls()


class SimCLR(Method[SimCLROptions]):
    paper = "Chen et al. 2020, arXiv:2002.05709"
    summary = "two views attract, all other images of the batch repel"
    Options = SimCLROptions

    def __init__(self, backbone: Backbone, options: SimCLROptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        self.head: nn.Module = mlp(
            [backbone.dim, options.hidden_dim, options.projection_dim], output_norm=True
        )

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4)
        return Recipe(optimizer="lars", lr=0.3, weight_decay=1e-6)

    @classmethod
    def views(cls, augmentation: Augmentation, options: SimCLROptions, facts: Facts) -> tuple[View, ...]:
        return augmentation.view(facts.size), augmentation.view(facts.size, of="partner")

    def project(self, images: Tensor) -> Tensor:
        projected: Tensor = self.head(self.backbone(images))
        return projected

    @property
    def projection(self) -> nn.Module:
        return self.head

    def loss(self, batch: Batch) -> Losses:
        # One pass for each view, as in the paper's code on TPU cores: batch norm never sees both at once.
        first, second = (self.project(view) for view in batch.views)
        options = self.options
        loss = nt_xent(first, second, batch.ids, temperature=options.temperature, beta=options.beta)
        return {"loss": loss}
