"""NNCLR: the nearest neighbour of one view among earlier images attracts the prediction of the other view."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from training.backbones import Backbone
from training.heads import mlp
from training.losses import query_key_loss, unit
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.precision import full_precision
from training.queue import FeatureQueue, suited_queue
from training.views import Augmentation, View

__all__ = ["NNCLR", "NNCLROptions", "nearest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NNCLROptions(MethodOptions):
    """Settings of NNCLR."""

    temperature: float = 0.1
    """τ of InfoNCE: 0.1 for photographs, 0.2 for small images."""
    queue_length: int = 98_304
    """Embeddings of earlier images that neighbours are found among; at most about half the images."""
    hidden_dim: int = 2048
    """Length of the projector's hidden layers."""
    projection_dim: int = 256
    """Length of the embeddings that are compared."""
    predictor_dim: int = 4096
    """Length of the predictor's hidden layer."""
    beta: float = 0.0
    """Weight on hard negatives (Robinson et al. 2021); 0 treats all alike, 0.5 to 2 is usual."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        length = suited_queue(98_304, facts)
        if facts.small:
            return cls(temperature=0.2, queue_length=length, predictor_dim=2048)
        return cls(queue_length=length)


class NNCLR(Method[NNCLROptions]):
    paper = "Dwibedi et al. 2021, arXiv:2104.14548"
    summary = "a view attracts the nearest neighbour of the other one; depends less on augmentation"
    Options = NNCLROptions

    def __init__(self, backbone: Backbone, options: NNCLROptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        hidden, out = options.hidden_dim, options.projection_dim
        self.projector = mlp([backbone.dim, hidden, hidden, out], output_norm=True)
        self.predictor = mlp([out, options.predictor_dim, out])
        self.queue = FeatureQueue(options.queue_length, out)

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4)
        return Recipe(optimizer="lars", lr=0.3, weight_decay=1e-6)

    @classmethod
    def views(cls, augmentation: Augmentation, options: NNCLROptions, facts: Facts) -> tuple[View, ...]:
        return augmentation.view(facts.size), augmentation.view(facts.size, of="partner")

    @property
    def projection(self) -> nn.Module:
        return self.projector

    def loss(self, batch: Batch) -> Losses:
        first, second = (self.projector(self.backbone(view)) for view in batch.views)
        loss = (
            self._contrast(first, self.predictor(second), batch.ids)
            + self._contrast(second, self.predictor(first), batch.ids)
        ) / 2
        # Only the first view joins the queue, and only after the step: no image is its own neighbour now.
        self.queue.stage(unit(first.detach()), batch.ids)
        return {"loss": loss}

    def _contrast(self, embeddings: Tensor, predictions: Tensor, ids: Tensor) -> Tensor:
        # Neighbours are the rows and predictions the columns of the softmax (eq. 3): the gradient goes into
        # the predictions of all ranks.
        neighbours = nearest(embeddings, self.queue)
        options = self.options
        return query_key_loss(
            neighbours, predictions, ids, temperature=options.temperature, beta=options.beta
        )


@torch.no_grad()
@full_precision
def nearest(embeddings: Tensor, queue: FeatureQueue) -> Tensor:
    """The row of the queue with the greatest cosine to each embedding, without gradient (eq. 2).

    A row may come from the same image, one epoch ago: it is a legitimate neighbour, and the paper does not
    exclude it. Random rows are no neighbours, other than in the paper, where they are overwritten before they
    matter. While the queue is empty an embedding is its own neighbour, which makes the first loss SimCLR's.

    Args:
        embeddings: float [B, dim], of any length.
        queue: Rows of earlier steps.

    Returns:
        float [B, dim], unit vectors.
    """
    embeddings = unit(embeddings)
    # No cosine is less than −1.
    cosines = (embeddings @ queue.rows.T).masked_fill(queue.ids < 0, -2)
    return torch.where(queue.filled > 0, queue.rows[cosines.argmax(1)], embeddings)
