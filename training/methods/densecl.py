"""DenseCL: MoCo v2 for whole images and for every place in them. For detection and segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from training.backbones import Backbone
from training.heads import mlp
from training.losses import queue_loss, unit
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.methods.moco import MoCoV2, MoCoV2Options
from training.momentum import momentum_copy
from training.precision import full_precision
from training.queue import FeatureQueue
from training.schedules import Schedule, cosine
from training.views import Augmentation, View

__all__ = ["DenseCL", "DenseCLOptions", "corresponding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseCLOptions(MethodOptions):
    """Settings of DenseCL."""

    temperature: float = 0.2
    """τ of both losses: 0.2 for photographs, 0.1 for small images."""
    queue_length: int = 65_536
    """Keys of earlier steps in either queue; at most about half the images."""
    hidden_dim: int = 2048
    """Length of the hidden layer of both heads."""
    projection_dim: int = 128
    """Length of queries and keys."""
    momentum_start: float = 0.999
    """Share of itself that the momentum encoder keeps each step, at the start."""
    momentum_end: float = 0.999
    """The same at the end; a cosine lies between."""
    dense_weight: float = 0.5
    """λ: share of the loss of places; the loss of whole images has the rest."""
    beta: float = 0.0
    """Weight on hard negatives (Robinson et al. 2021); 0 treats all alike, 0.5 to 2 is usual."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        suited = MoCoV2Options.suited_to(facts)
        return cls(
            temperature=suited.temperature,
            queue_length=suited.queue_length,
            hidden_dim=512 if facts.small else 2048,
            momentum_start=suited.momentum_start,
            momentum_end=suited.momentum_end,
        )


class DenseCL(Method[DenseCLOptions]):
    paper = "Wang et al. 2021, arXiv:2011.09157"
    summary = "MoCo v2 for places as well as whole images; for detection and segmentation"
    Options = DenseCLOptions

    def __init__(self, backbone: Backbone, options: DenseCLOptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        hidden, out = options.hidden_dim, options.projection_dim
        self.head = mlp([backbone.dim, hidden, out], hidden_norm=False)
        self.dense_head = nn.Sequential(
            nn.Conv2d(backbone.patch_dim, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, out, 1)
        )
        self.momentum_backbone = momentum_copy(backbone)
        self.momentum_head = momentum_copy(self.head)
        self.momentum_dense_head = momentum_copy(self.dense_head)
        self.queue = FeatureQueue(options.queue_length, out)
        self.dense_queue = FeatureQueue(options.queue_length, out)

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        return MoCoV2.recipe(facts)

    @classmethod
    def views(cls, augmentation: Augmentation, options: DenseCLOptions, facts: Facts) -> tuple[View, ...]:
        return augmentation.view(facts.size), augmentation.view(facts.size, of="partner")

    def schedules(self) -> dict[str, Schedule]:
        return {"momentum": cosine(self.options.momentum_start, self.options.momentum_end)}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [
            (self.backbone, self.momentum_backbone),
            (self.head, self.momentum_head),
            (self.dense_head, self.momentum_dense_head),
        ]

    @property
    def projection(self) -> nn.Module:
        return self.head

    def loss(self, batch: Batch) -> Losses:
        first, second = batch.views
        options = self.options
        pooled, patches = self.backbone.features(first)
        queries, dense_queries = self.head(pooled), self.dense_head(patches)
        with torch.no_grad():
            # Batch norm over all ranks stands in for the paper's shuffling, which would send all maps around.
            pooled, key_patches = self.momentum_backbone.features(second)
            keys, dense_keys = self.momentum_head(pooled), self.momentum_dense_head(key_patches)
            matched = corresponding(patches, key_patches, dense_keys)
        whole = queue_loss(
            queries, keys, batch.ids, self.queue, temperature=options.temperature, beta=options.beta
        )
        places = patches.shape[2] * patches.shape[3]
        dense = queue_loss(
            dense_queries.flatten(2).transpose(1, 2).flatten(0, 1),
            matched.flatten(0, 1),
            batch.ids.repeat_interleave(places),
            self.dense_queue,
            temperature=options.temperature,
            beta=options.beta,
        )
        self.queue.stage(unit(keys), batch.ids)
        # One key for each image, the mean of its places (section 3.2).
        self.dense_queue.stage(unit(dense_keys.mean((2, 3))), batch.ids)
        return {
            "loss": (1 - options.dense_weight) * whole + options.dense_weight * dense,
            "whole": whole,
            "dense": dense,
        }


@full_precision
def corresponding(patches: Tensor, key_patches: Tensor, dense_keys: Tensor) -> Tensor:
    """For each place of the query the dense key of the place that is most similar to it (eq. 3).

    Similar is what the backbones find similar, the query's and the momentum encoder's, before their dense
    heads: those learn from the very matches that would be made with them.

    Args:
        patches: float [B, C, h, w], the backbone's map of the query view.
        key_patches: float [B, C, h', w'], the momentum backbone's map of the key view.
        dense_keys: float [B, dim, h', w'], its projection.

    Returns:
        float [B, h·w, dim].
    """
    queries, keys = unit(patches.flatten(2)), unit(key_patches.flatten(2))
    best = (queries.transpose(1, 2) @ keys).argmax(2)
    rows = dense_keys.flatten(2).transpose(1, 2)
    return rows.gather(1, best[:, :, None].expand(-1, -1, rows.shape[2]))
