"""VICReg: views agree (invariance), every feature varies (variance), no two carry the same (covariance)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from training.backbones import Backbone
from training.distributed import gather
from training.heads import mlp
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.precision import full_precision
from training.views import Augmentation, View

__all__ = ["VICReg", "VICRegOptions", "vicreg_terms"]

GAMMA = 1.0
"""γ, the standard deviation that every feature should have at least."""
EPSILON = 1e-4
"""ε, added to the variance so that its root has a gradient at 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VICRegOptions(MethodOptions):
    """Settings of VICReg."""

    invariance: float = 25.0
    """λ, the weight of the distance between views."""
    variance: float = 25.0
    """μ, the weight of features that vary too little."""
    covariance: float = 1.0
    """ν, the weight of covariances between features."""
    hidden_dim: int = 8192
    """Length of the expander's two hidden layers."""
    projection_dim: int = 8192
    """Number of features that are compared."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        return cls(hidden_dim=2048, projection_dim=2048) if facts.small else cls()


class VICReg(Method[VICRegOptions]):
    paper = "Bardes et al. 2021, arXiv:2105.04906"
    summary = "views agree while features vary and do not covary; no negatives, no momentum encoder"
    Options = VICRegOptions

    def __init__(self, backbone: Backbone, options: VICRegOptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        hidden = options.hidden_dim
        self.expander = mlp([backbone.dim, hidden, hidden, options.projection_dim], output_bias=False)

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            # A tenth of the other methods' rate: with weights of 25, at theirs the loss is soon no number.
            return Recipe(optimizer="sgd", lr=0.012, weight_decay=5e-4)
        # The authors' code: 0.3 for 100 epochs, 0.2 for longer ones.
        return Recipe(
            optimizer="lars", lr=0.3 if facts.epochs <= 100 else 0.2, lr_end=0.001, weight_decay=1e-6
        )

    @classmethod
    def views(cls, augmentation: Augmentation, options: VICRegOptions, facts: Facts) -> tuple[View, ...]:
        # BYOL's views made alike: each has the mean of the two probabilities.
        solarize = 0.0 if facts.small else 0.1
        return (
            augmentation.view(facts.size, blur=0.5, solarize=solarize),
            augmentation.view(facts.size, blur=0.5, solarize=solarize, of="partner"),
        )

    @property
    def projection(self) -> nn.Module:
        return self.expander

    def loss(self, batch: Batch) -> Losses:
        first, second = (self.expander(self.backbone(view)) for view in batch.views)
        terms = vicreg_terms(first, second)
        loss = sum(getattr(self.options, name) * term for name, term in terms.items())
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


@full_precision
def vicreg_terms(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """The three terms of VICReg (Bardes et al. 2021, eq. 1, 3 and 5), unweighted.

    Invariance is a mean over this rank's rows; variance and covariance are those of the joined batch of all
    ranks. As in the authors' code, and unlike eq. 5 and 6, the squared distance is divided by the number of
    features and the variance term is the mean over both views, not their sum: the published weights and
    results belong to that.

    Args:
        first: float [B, dim], the first view of each image.
        second: float [B, dim], the second, in the same order.

    Returns:
        'invariance', 'variance' and 'covariance', float [] each, in float32 or the float64 of the inputs.
    """
    spreads = [_spread(gather(first)), _spread(gather(second))]
    return {
        "invariance": F.mse_loss(first, second),
        "variance": (spreads[0][0] + spreads[1][0]) / 2,
        "covariance": spreads[0][1] + spreads[1][1],
    }


def _spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """How far the features' deviations fall short of γ, and how much the features covary."""
    centred = rows - rows.mean(0)
    covariance = centred.T @ centred / (len(rows) - 1)
    variance = covariance.diagonal()
    short = F.relu(GAMMA - (variance + EPSILON).sqrt()).mean()
    return short, (covariance.square().sum() - variance.square().sum()) / rows.shape[1]
