"""SimCLR v2: a deeper head, whose first layer stays with the encoder; optionally a memory of negatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from training.backbones import Backbone
from training.distributed import gather
from training.heads import mlp
from training.losses import info_nce, nt_xent, unit
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.momentum import momentum_copy, suited_momentum
from training.precision import full_precision
from training.queue import FeatureQueue
from training.schedules import Schedule, cosine
from training.views import Augmentation, View

__all__ = ["SimCLRv2", "SimCLRv2Options", "memory_loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimCLRv2Options(MethodOptions):
    """Settings of SimCLR v2."""

    temperature: float = 0.1
    """τ of NT-Xent: 0.1 for photographs, 0.5 for small images."""
    hidden_dim: int = 2048
    """Length of the head's two hidden layers; the encoder's features are the first of them."""
    projection_dim: int = 128
    """Length of the projections that are compared."""
    memory: int = 0
    """Earlier projections of a momentum encoder that serve as negatives, 65,536 in the paper; 0: none."""
    momentum_start: float = 0.999
    """Momentum of the memory's encoder at first."""
    momentum_end: float = 0.999
    """Momentum of the memory's encoder at the end of its cosine."""
    beta: float = 0.0
    """Weight on hard negatives (Robinson et al. 2021); 0 treats all alike, 0.5 to 2 is usual."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        momentum = suited_momentum(0.99 if facts.small else 0.999, facts)
        suited = cls(momentum_start=momentum, momentum_end=momentum)
        return replace(suited, temperature=0.5, hidden_dim=512) if facts.small else suited


class WithFirstLayer(Backbone):
    """A backbone followed by the first layer of a projection head: its pooled features are that layer's.

    The weights of the network keep their names, so other methods can start from it.
    """

    def __init__(self, backbone: Backbone, dim: int) -> None:
        super().__init__(backbone.name, backbone.network, dim, backbone.patch_dim)
        self.kind = backbone.kind  # type: ignore[misc]
        self.notes = backbone.notes
        self.layer = nn.Sequential(
            nn.Linear(backbone.dim, dim, bias=False), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)
        )
        # In a tuple it is no submodule: the network above is all that it has, and would be saved twice.
        self._backbone = (backbone,)

    def features(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pooled, patches = self._backbone[0].features(images, masks)
        layered: Tensor = self.layer(pooled)
        return layered, patches

    def attention(self, images: Tensor) -> Tensor:
        return self._backbone[0].attention(images)


class SimCLRv2(Method[SimCLRv2Options]):
    paper = "Chen et al. 2020, arXiv:2006.10029"
    summary = "SimCLR with a deeper head, transferred from the head's first layer; optional memory"
    Options = SimCLRv2Options

    def __init__(self, backbone: Backbone, options: SimCLRv2Options, facts: Facts) -> None:
        super().__init__(WithFirstLayer(backbone, options.hidden_dim), options, facts)
        # With the layer that belongs to the encoder now, three.
        self.head = mlp([options.hidden_dim, options.hidden_dim, options.projection_dim], output_norm=True)
        if options.memory:
            self.memory_backbone = momentum_copy(self.backbone)
            self.memory_head = momentum_copy(self.head)
            self.memory = FeatureQueue(options.memory, options.projection_dim)

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4)
        # The paper's 0.1·√batch is this rate at its batch of 4,096.
        return Recipe(optimizer="lars", lr=0.4, weight_decay=1e-4, warmup_epochs=0.05 * facts.epochs)

    @classmethod
    def views(cls, augmentation: Augmentation, options: SimCLRv2Options, facts: Facts) -> tuple[View, ...]:
        return augmentation.view(facts.size), augmentation.view(facts.size, of="partner")

    @property
    def projection(self) -> nn.Module:
        return self.head

    def loss(self, batch: Batch) -> Losses:
        options = self.options
        first, second = (self.head(self.backbone(view)) for view in batch.views)
        if not options.memory:
            return {
                "loss": nt_xent(first, second, batch.ids, temperature=options.temperature, beta=options.beta)
            }
        with torch.no_grad():
            keys = [unit(self.memory_head(self.memory_backbone(view))) for view in batch.views]
        loss = memory_loss(
            torch.cat([first, second]),
            torch.cat([keys[1], keys[0]]),
            batch.ids.repeat(2),
            self.memory.rows,
            self.memory.ids,
            temperature=options.temperature,
            beta=options.beta,
        )
        for rows in keys:
            self.memory.stage(rows, batch.ids)
        return {"loss": loss}

    def schedules(self) -> dict[str, Schedule]:
        if not self.options.memory:
            return {}
        return {"momentum": cosine(self.options.momentum_start, self.options.momentum_end)}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        if not self.options.memory:
            return []
        return [(self.backbone, self.memory_backbone), (self.head, self.memory_head)]


@full_precision
def memory_loss(
    queries: Tensor,
    keys: Tensor,
    ids: Tensor,
    memory: Tensor,
    memory_ids: Tensor,
    *,
    temperature: float,
    beta: float = 0.0,
) -> Tensor:
    """NT-Xent whose other side comes from a memory network, with its buffer as more negatives.

    Chen et al. 2020 (SimCLR v2, section 3.1) name the idea and give no formula. Here the keys of all ranks
    stay negatives, as in NT-Xent, and the buffer joins them.

    Args:
        queries: float [B, dim], of any length.
        keys: unit vectors [B, dim] without gradient; row i is the positive of query i.
        ids: int64 [B], one number for each image or group.
        memory: unit vectors [M, dim].
        memory_ids: int64 [M]; −1 for rows that are not filled yet, which are left out.
        temperature, beta: As in `nt_xent`.

    Returns:
        float [], in float32 or the float64 of its inputs.
    """
    queries = unit(queries)
    candidates = torch.cat([gather(keys), memory])
    candidate_ids = torch.cat([gather(ids), memory_ids])
    excluded = (ids[:, None] == candidate_ids) | (candidate_ids < 0)
    positive = (queries * keys).sum(1) / temperature
    return info_nce(positive, queries @ candidates.T / temperature, excluded, beta=beta)
