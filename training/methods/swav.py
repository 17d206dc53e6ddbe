"""SwAV: each crop predicts to which prototypes the other views of its image are assigned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.backbones import Backbone
from training.distributed import rank, world_size
from training.heads import mlp
from training.losses import unit
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.precision import full_precision
from training.queue import FeatureQueue
from training.schedules import Now
from training.sinkhorn import sinkhorn
from training.views import Augmentation, View

__all__ = ["SwAV", "SwAVOptions", "prototype_scores", "swapped_prediction_loss"]

FULL_VIEWS = 2
"""Views that are assigned to prototypes; all views predict the assignments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SwAVOptions(MethodOptions):
    """Settings of SwAV."""

    prototypes: int = 3000
    """K, the number of prototypes; a hundredth of the images, 16 to 3,000."""
    temperature: float = 0.1
    """τ of the predicted assignments."""
    epsilon: float = 0.05
    """ε of Sinkhorn-Knopp; smaller (0.03) where the loss stays at ln K."""
    sinkhorn_iterations: int = 3
    """Iterations of Sinkhorn-Knopp."""
    queue_length: int = 3840
    """Images whose earlier embeddings are assigned with the batch; 0 for a batch of a row per prototype."""
    queue_epochs: float = 15.0
    """Epochs before the queue is used: early embeddings age too fast."""
    freeze_epochs: float = 1.0
    """Epochs for which the prototypes do not move."""
    hidden_dim: int = 2048
    """Length of the projection head's hidden layer."""
    projection_dim: int = 128
    """Length of the projections that are compared with the prototypes."""
    local_crops: int = 6
    """Small crops beside the two full-size ones; each costs (local_size ÷ size)² of a full view."""
    local_size: int = 96
    """Pixels of a side of a small crop; 3/7 of a full view, a multiple of 8."""
    local_min: float = 0.05
    """Least share of the image's area in a small crop."""
    local_max: float = 0.14
    """Largest share of the image's area in a small crop."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        prototypes = min(3000, max(16, facts.images // 100))
        # The authors leave the queue out at a batch of 4,096 and have 3,840 rows for 3,000 prototypes at 256.
        queue = 0 if facts.batch_size >= prototypes else round(1.28 * prototypes)
        suited = cls(
            prototypes=prototypes,
            queue_length=queue,
            queue_epochs=min(15.0, 0.075 * facts.epochs),
            freeze_epochs=min(1.0, 0.05 * facts.epochs),
            local_size=max(8, round(facts.size * 3 / 7 / 8) * 8),
        )
        if facts.small:
            # A twentieth of a small image is a few pixels: fewer crops, of more of it.
            return replace(suited, hidden_dim=512, local_crops=4, local_min=0.1, local_max=0.4)
        return suited


class SwAV(Method[SwAVOptions]):
    paper = "Caron et al. 2020, arXiv:2006.09882"
    summary = "crops predict each other's assignment to prototypes, over eight crops of two sizes"
    Options = SwAVOptions

    def __init__(self, backbone: Backbone, options: SwAVOptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        self.head = mlp([backbone.dim, options.hidden_dim, options.projection_dim])
        self.prototypes = nn.Linear(options.projection_dim, options.prototypes, bias=False)
        # An image's full-size views lie side by side in one row. Each is assigned among its like alone.
        self.queue = FeatureQueue(options.queue_length, FULL_VIEWS * options.projection_dim)
        self._batch_size = facts.batch_size
        self._normalize_prototypes()

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4)
        return Recipe(optimizer="lars", lr=0.3, lr_end=0.001, weight_decay=1e-6)

    @classmethod
    def views(cls, augmentation: Augmentation, options: SwAVOptions, facts: Facts) -> tuple[View, ...]:
        scale = (options.local_min, options.local_max)
        image = augmentation.view(options.local_size, scale=scale, full_size=facts.size)
        partner = replace(image, of="partner")
        local = [partner if index % 2 else image for index in range(options.local_crops)]
        return augmentation.view(facts.size), augmentation.view(facts.size, of="partner"), *local

    @property
    def projection(self) -> nn.Module:
        return self.head

    def loss(self, batch: Batch) -> Losses:
        embeddings = self._embeddings(batch.views)
        scores = prototype_scores(embeddings, self.prototypes.weight)
        assignments = torch.stack([self._assign(view, scores[view], batch.now) for view in range(FULL_VIEWS)])
        if self.options.queue_length:
            self.queue.stage(torch.cat(list(embeddings[:FULL_VIEWS]), dim=1), batch.ids)
        loss = swapped_prediction_loss(scores, assignments, temperature=self.options.temperature)
        return {"loss": loss}

    def _embeddings(self, views: Sequence[Tensor]) -> Tensor:
        """Unit vectors, [views, B, dim]. Views of one size share a pass, and so their batch norm."""
        sizes = groupby(views, key=lambda view: view.shape[-1])
        features = torch.cat([self.backbone(torch.cat(list(same))) for _, same in sizes])
        return torch.stack(unit(self.head(features)).chunk(len(views)))

    def _assign(self, view: int, scores: Tensor, now: Now) -> Tensor:
        """The prototypes of one full-size view of each image, [B, K] without gradient."""
        options, rows = self.options, len(scores)
        if self._queue_is_used(now):
            # All ranks have the same queue; each adds its share, so that every row counts once.
            earlier = self.queue.rows[rank() :: world_size()].chunk(FULL_VIEWS, dim=1)[view]
            scores = torch.cat([scores, prototype_scores(earlier, self.prototypes.weight)])
        assignments = sinkhorn(scores, epsilon=options.epsilon, iterations=options.sinkhorn_iterations)
        return assignments[:rows]

    def _queue_is_used(self, now: Now) -> bool:
        # Counted from the step, not read from the queue: that would wait for the GPU.
        filled = now.step * self._batch_size >= self.options.queue_length
        return self.options.queue_length > 0 and filled and now.epoch >= self.options.queue_epochs

    def before_step(self, now: Now) -> None:
        if now.epoch < self.options.freeze_epochs:
            self.prototypes.weight.grad = None

    def after_step(self, now: Now, values: Mapping[str, float]) -> None:
        super().after_step(now, values)
        self._normalize_prototypes()

    @torch.no_grad()
    def _normalize_prototypes(self) -> None:
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def logit_count(self) -> int:
        return self.options.prototypes


@full_precision
def prototype_scores(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """Cosines: unit vectors [..., dim] and [K, dim] → [..., K], in float32 or the float64 of the inputs."""
    return embeddings @ prototypes.T


@full_precision
def swapped_prediction_loss(scores: Tensor, assignments: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of each assignment with what every *other* view predicts (Caron et al. 2020, eq. 2, 6).

    Args:
        scores: float [V, B, K], cosines of all views with the prototypes.
        assignments: float [A, B, K], those of the first A views; each row sums to 1.
        temperature: τ > 0.

    Returns:
        float [], mean over the A·(V−1) pairs and this rank's rows, in float32 or the float64 of the inputs.
    """
    predicted = (scores / temperature).log_softmax(2)
    cross_entropies = -torch.einsum("abk,vbk->av", assignments, predicted) / scores.shape[1]
    pairs = assignments.shape[0] * (scores.shape[0] - 1)
    return (cross_entropies.sum() - cross_entropies.diagonal().sum()) / pairs
