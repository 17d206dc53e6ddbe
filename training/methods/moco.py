"""MoCo v1 and v2: a query attracts the key of its own image and repels the keys of earlier steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from training.backbones import Backbone
from training.distributed import gather, rank
from training.heads import mlp
from training.losses import queue_loss, unit
from training.method import Batch, Facts, Losses, Method, MethodOptions, Recipe
from training.momentum import momentum_copy, suited_momentum
from training.queue import FeatureQueue, suited_queue
from training.schedules import Schedule, cosine
from training.views import Augmentation, View

__all__ = ["MoCoOptions", "MoCoV1", "MoCoV2", "MoCoV2Options"]

NORM_IMAGES = 32
"""Images that one batch norm sees with `shuffle_bn`: the paper's 256 over 8 GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoCoOptions(MethodOptions):
    """Settings of MoCo v1."""

    temperature: float = 0.07
    """τ of InfoNCE: 0.07 for photographs, 0.1 for small images."""
    queue_length: int = 65_536
    """Keys of earlier steps that serve as negatives; at most about half the images."""
    projection_dim: int = 128
    """Length of queries and keys."""
    momentum_start: float = 0.999
    """Share of itself that the momentum encoder keeps each step, at the start."""
    momentum_end: float = 0.999
    """The same at the end; a cosine lies between."""
    symmetric: bool = False
    """Either view is query once and key once: twice the work for each image."""
    shuffle_bn: bool = False
    """Batch norm over 32 images at a time, shuffled for the keys, instead of over the batch of all ranks."""
    beta: float = 0.0
    """Weight on hard negatives (Robinson et al. 2021); 0 treats all alike, 0.5 to 2 is usual."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        momentum = suited_momentum(0.99 if facts.small else 0.999, facts)
        suited = replace(cls(), momentum_start=momentum, momentum_end=momentum)
        if facts.small:
            # As in the authors' demo on CIFAR-10, where more than 4,096 keys helped no further.
            return replace(suited, temperature=0.1, queue_length=suited_queue(4096, facts))
        return replace(suited, queue_length=suited_queue(65_536, facts))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoCoV2Options(MoCoOptions):
    """Settings of MoCo v2."""

    temperature: float = 0.2
    """τ of InfoNCE: 0.2 for photographs, 0.1 for small images."""


class MoCoV1(Method[MoCoOptions]):
    paper = "He et al. 2020, arXiv:1911.05722"
    summary = "a query attracts its key, a queue of earlier keys repels; works with small batches"
    Options = MoCoOptions

    def __init__(self, backbone: Backbone, options: MoCoOptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        self.head = self.projector(backbone.dim, options)
        self.momentum_backbone = momentum_copy(backbone)
        self.momentum_head = momentum_copy(self.head)
        self.queue = FeatureQueue(options.queue_length, options.projection_dim)

    @staticmethod
    def projector(dim: int, options: MoCoOptions) -> nn.Module:
        """[B, dim] → [B, projection_dim]: one linear layer."""
        return mlp([dim, options.projection_dim])

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.small:
            return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4)
        # The paper lowers the rate of version 1 in two steps; here it has the cosine of version 2.
        return Recipe(optimizer="sgd", lr=0.03, weight_decay=1e-4, warmup_epochs=0)

    @classmethod
    def views(cls, augmentation: Augmentation, options: MoCoOptions, facts: Facts) -> tuple[View, ...]:
        # Without blur. The paper also jitters the colour of every view, and its hue by .4 turns; here that is
        # the user's to say.
        return augmentation.view(facts.size, blur=0), augmentation.view(facts.size, blur=0, of="partner")

    @property
    def local_batch_norm(self) -> bool:
        """Whether batch norms must not be joined over ranks."""
        return self.options.shuffle_bn

    def schedules(self) -> dict[str, Schedule]:
        return {"momentum": cosine(self.options.momentum_start, self.options.momentum_end)}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.backbone, self.momentum_backbone), (self.head, self.momentum_head)]

    @property
    def projection(self) -> nn.Module:
        return self.head

    def loss(self, batch: Batch) -> Losses:
        first, second = batch.views
        directions = [(first, second), (second, first)] if self.options.symmetric else [(first, second)]
        losses = []
        for query_view, key_view in directions:
            queries, keys = self.queries(query_view), self.keys(key_view, batch.now.step)
            losses.append(
                queue_loss(
                    queries,
                    keys,
                    batch.ids,
                    self.queue,
                    temperature=self.options.temperature,
                    beta=self.options.beta,
                )
            )
            # In neither direction a key is among the negatives yet: the queue takes it after the step.
            self.queue.stage(unit(keys), batch.ids)
        # Both directions are added, not averaged, as in the authors' code.
        return {"loss": torch.stack(losses).sum()}

    def queries(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] → float [B, projection_dim], with gradient."""
        backbone = _in_parts(self.backbone) if self.options.shuffle_bn else self.backbone
        queries: Tensor = self.head(backbone(images))
        return queries

    @torch.no_grad()
    def keys(self, images: Tensor, step: int) -> Tensor:
        """float [B, 3, H, W] → float [B, projection_dim], from the momentum encoder.

        With `shuffle_bn` the images of all ranks change places first (He et al. 2020, section 3.3): a key is
        normalised among other images than its query, so their common statistics give the pair away no longer.

        Args:
            step: Seeds the order, which every rank draws for itself.
        """
        if not self.options.shuffle_bn:
            keys: Tensor = self.momentum_head(self.momentum_backbone(images))
            return keys
        joined = gather(images)
        order = torch.randperm(len(joined), generator=torch.Generator().manual_seed(step))
        here = slice(rank() * len(images), (rank() + 1) * len(images))
        own, back = order[here].to(images.device), order.argsort()[here].to(images.device)
        return gather(self.momentum_head(_in_parts(self.momentum_backbone)(joined[own])))[back]


class MoCoV2(MoCoV1):
    paper = "Chen et al. 2020, arXiv:2003.04297"
    summary = "MoCo with a hidden layer in its head, blurred views and a softer temperature"
    Options = MoCoV2Options

    @staticmethod
    def projector(dim: int, options: MoCoOptions) -> nn.Module:
        """[B, dim] → [B, projection_dim]: a hidden layer as long as the features, and no batch norm."""
        return mlp([dim, dim, options.projection_dim], hidden_norm=False)

    @classmethod
    def views(cls, augmentation: Augmentation, options: MoCoOptions, facts: Facts) -> tuple[View, ...]:
        return augmentation.view(facts.size), augmentation.view(facts.size, of="partner")


def _in_parts(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`network` with its batch norms seeing some 32 images at a time, at least."""

    def run(images: Tensor) -> Tensor:
        parts = images.tensor_split(max(1, len(images) // NORM_IMAGES))
        return torch.cat([network(part) for part in parts])

    return run
