"""DINO: a student predicts, from any crop, how its own moving average sorts two large crops of the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from training.backbones import Backbone
from training.distributed import all_mean
from training.method import Batch, Facts, Losses, Method, Recipe
from training.methods.self_distillation import (
    PrototypeHead,
    SelfDistillationOptions,
    check_crops,
    class_features,
    distillation_loss,
    multi_crop,
    schedules,
)
from training.momentum import momentum_copy
from training.precision import full_precision
from training.schedules import Now, Schedule
from training.views import Augmentation, View

__all__ = ["DINO", "Center", "DINOOptions"]

FULL_VIEWS = 2
"""Views that the teacher sees; the student sees all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DINOOptions(SelfDistillationOptions):
    """Settings of DINO."""

    center_momentum: float = 0.9
    """Share of itself that the centre of the teacher's outputs keeps each step."""
    head_norm: bool = False
    """Batch norm in the hidden layers of the head: for networks that have batch norm themselves."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        suited = super(DINOOptions, cls).suited_to(facts)
        if facts.backbone_kind == "vit":
            return suited
        # As the authors train ResNets; but of a small image .14 is a few pixels.
        return replace(suited, head_norm=True, crop_split=suited.crop_split if facts.small else 0.14)


class DINO(Method[DINOOptions]):
    paper = "Caron et al. 2021, arXiv:2104.14294"
    summary = "small crops predict how a moving average sees the whole; attention that follows objects"
    backbone_kind = "vit"
    Options = DINOOptions

    def __init__(self, backbone: Backbone, options: DINOOptions, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        check_crops(backbone, options)
        self.head = PrototypeHead(backbone.dim, options, norm=options.head_norm)
        self.teacher = momentum_copy(backbone)
        self.teacher_head = momentum_copy(self.head)
        self.center = Center(options.output_dim, options.center_momentum)

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        if facts.backbone_kind == "conv":
            if facts.small:
                return Recipe(optimizer="sgd", lr=0.12, weight_decay=5e-4, clip=3.0)
            return Recipe(optimizer="sgd", lr=0.03, weight_decay=1e-4, clip=3.0)
        return Recipe(
            optimizer="adamw",
            lr=5e-4,
            lr_end=2e-3,  # the authors' 1e-6
            weight_decay=0.04,
            weight_decay_end=0.4,
            # Of all gradients together; the authors' code clips each parameter's own.
            clip=3.0,
        )

    @classmethod
    def views(cls, augmentation: Augmentation, options: DINOOptions, facts: Facts) -> tuple[View, ...]:
        return multi_crop(augmentation, options, facts)

    def schedules(self) -> dict[str, Schedule]:
        return schedules(self.options)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.backbone, self.teacher), (self.head, self.teacher_head)]

    @property
    def projection(self) -> nn.Module:
        return self.teacher_head.layers

    def loss(self, batch: Batch) -> Losses:
        targets = self._targets(batch)
        outputs = self.head(class_features(self.backbone, batch.views))
        outputs = outputs.view(len(batch.views), -1, outputs.shape[1])
        return {"loss": distillation_loss(outputs, targets, temperature=self.options.student_temperature)}

    @torch.no_grad()
    def _targets(self, batch: Batch) -> Tensor:
        outputs = self.teacher_head(class_features(self.teacher, batch.views[:FULL_VIEWS]))
        # The centre of the steps before; this one's outputs move it after the step.
        self.center.stage(outputs)
        targets = self.center.targets(outputs, batch.values["teacher_temperature"])
        return targets.view(FULL_VIEWS, -1, targets.shape[1])

    def before_step(self, now: Now) -> None:
        if now.epoch < self.options.freeze_epochs:
            self.head.freeze_prototypes()

    def after_step(self, now: Now, values: Mapping[str, float]) -> None:
        super().after_step(now, values)
        self.center.update()

    @property
    def encoder(self) -> Backbone:
        # The teacher is the better one all through training (Caron et al. 2021, figure 6).
        return self.teacher

    def logit_count(self) -> int:
        return self.options.output_dim


class Center(nn.Module):
    """An exponential moving average of the teacher's mean output (Caron et al. 2021, eq. 4).

    Attributes:
        mean: float32 [K], zero at first.
    """

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.mean = nn.Buffer(torch.zeros(dim))
        self._staged: list[Tensor] = []

    @full_precision
    def targets(self, outputs: Tensor, temperature: float) -> Tensor:
        """The teacher's distributions [B, K] for its outputs [B, K]. No gradient."""
        return ((outputs.detach() - self.mean) / temperature).softmax(1)

    @torch.no_grad()
    def stage(self, outputs: Tensor) -> None:
        """Takes this rank's outputs [B, K] of one part of a step."""
        self._staged.append(outputs.to(self.mean.dtype).mean(0))

    @torch.no_grad()
    def update(self) -> None:
        """Moves towards the mean of what all ranks staged since the last time."""
        if self._staged:
            self.mean.lerp_(all_mean(torch.stack(self._staged).mean(0)), 1 - self.momentum)
            self._staged.clear()
