"""What DINO and DINOv2 share: a student predicts how its own moving average sorts an image among prototypes.

Both have these parts, and each method's own file puts them together:

    SelfDistillationOptions    head, temperatures, crops; resolved from the data
    multi_crop                 the views
    PrototypeHead              features → cosines with K prototypes
    distillation_loss          cross-entropy between the teacher's target and what the other views predict
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training.backbones import Backbone
from training.method import Facts, MethodOptions
from training.momentum import suited_momentum
from training.precision import full_precision
from training.schedules import Schedule, constant, cosine, warmup
from training.views import Augmentation, View

__all__ = [
    "PrototypeHead",
    "SelfDistillationOptions",
    "check_crops",
    "class_features",
    "distillation_loss",
    "multi_crop",
    "schedules",
]

LONG = 50_000
"""Steps from which there is time for the teacher's temperature to rise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfDistillationOptions(MethodOptions):
    """Settings that DINO and DINOv2 have in common."""

    output_dim: int = 65_536
    """K, the prototypes that an image is sorted into; a sixteenth of the images, 1,024 to 65,536."""
    hidden_dim: int = 2048
    """Length of the head's two hidden layers."""
    bottleneck_dim: int = 256
    """Length of the unit vectors that are compared with the prototypes."""
    student_temperature: float = 0.1
    """τ of the student's prediction."""
    teacher_temperature: float = 0.07
    """τ of the teacher's target after its warm-up; smaller is sharper. 0.04 for less than 50,000 steps."""
    teacher_temperature_start: float = 0.04
    """The same at the first step."""
    teacher_temperature_epochs: float = 30.0
    """Epochs of linear warm-up between the two; at most three tenths of all."""
    momentum_start: float = 0.996
    """Share of itself that the teacher keeps each step, at the start: higher for small batches."""
    momentum_end: float = 1.0
    """The same at the end; a cosine lies between."""
    freeze_epochs: float = 1.0
    """Epochs for which the prototypes do not move; more where the loss stays at ln K."""
    local_crops: int = 8
    """Small crops beside the two full-size ones; each costs (local_size ÷ size)² of a full view."""
    local_size: int = 96
    """Pixels of a side of a small crop; 3/7 of a full view, in whole patches."""
    local_min: float = 0.05
    """Least share of the image's area in a small crop."""
    crop_split: float = 0.4
    """Share of the area up to which small crops go, and from which full-size ones start."""

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        default: Any = cls()  # of the subclass, with its own defaults
        # The same memory in images at any batch size: the authors' .996 is for 1,024.
        most = 1 - (1 - default.momentum_start) * min(1, facts.batch_size / 1024)
        # With too soft a target, while the crops of an image hardly agree yet, the loss stays at ln K. With
        # 8,192 images of Fashion-MNIST it was there after 256 steps of .07, and had left it by step 128 of
        # .04, with which the authors advise to begin.
        short = facts.epochs * facts.steps_per_epoch < LONG
        suited: dict[str, Any] = {
            "teacher_temperature": 0.04 if short else default.teacher_temperature,
            "output_dim": _prototypes(facts.images),
            "momentum_start": suited_momentum(most, facts),
            "teacher_temperature_epochs": min(30.0, 0.3 * facts.epochs),
            "freeze_epochs": min(1.0, 0.1 * facts.epochs),
            "local_size": _local_size(facts.size),
        }
        if facts.small:
            # A twentieth of a small image is a few pixels: fewer crops, of more of it.
            suited |= {"local_crops": 4, "local_min": 0.15, "hidden_dim": 1024}
        return cls(**suited)


def _prototypes(images: int) -> int:
    """The power of two next below a sixteenth of the images: 65,536 for ImageNet, 2,048 for CIFAR.

    With far more prototypes than images to fill them the targets are noise, and the loss stays at ln K.
    """
    return min(max(1 << (max(images // 16, 1).bit_length() - 1), 1024), 65_536)


def _local_size(size: int) -> int:
    """3/7 of a full-size view, rounded up to whole patches of the default transformer for that size."""
    patch = 4 if size <= 40 else 8 if size <= 112 else 16
    return max(1, -(-size * 3 // (7 * patch))) * patch


def check_crops(backbone: Backbone, options: SelfDistillationOptions) -> None:
    """Raises InvalidField for small crops that patches do not tile, or that begin above `crop_split`."""
    if options.local_crops and options.local_min > options.crop_split:
        raise InvalidField(
            f"local_min={options.local_min:g} is more than crop_split={options.crop_split:g}, the largest "
            "share of a small crop; lower the one or raise the other.",
            param="local_min",
        )
    patch = getattr(backbone, "patch", 1)
    if options.local_crops and options.local_size % patch:
        above = (options.local_size // patch + 1) * patch
        nearest = f"{above - patch} or {above}" if above > patch else f"{above}"
        raise InvalidField(
            f"local_size={options.local_size} does not divide into the patches of {patch} pixels of "
            f"'{backbone.name}'; use {nearest}, or local_crops=0.",
            param="local_size",
        )


def multi_crop(
    augmentation: Augmentation, options: SelfDistillationOptions, facts: Facts
) -> tuple[View, ...]:
    """Two full-size crops for student and teacher, and small ones for the student (Caron et al. 2021, §3.1).

    The full-size crops are blurred unequally and the second is solarised, as in BYOL.
    """
    split, local = options.crop_split, (options.local_min, options.crop_split)
    crop = augmentation.view(options.local_size, scale=local, blur=0.5, full_size=facts.size)
    return (
        augmentation.view(facts.size, scale=(split, 1.0), blur=1.0),
        augmentation.view(facts.size, scale=(split, 1.0), blur=0.1, solarize=0.2, of="partner"),
        *[crop] * options.local_crops,
    )


def schedules(options: SelfDistillationOptions) -> dict[str, Schedule]:
    """'momentum' of the teacher and 'teacher_temperature'."""
    temperature = constant(options.teacher_temperature)
    return {
        "momentum": cosine(options.momentum_start, options.momentum_end),
        "teacher_temperature": warmup(
            options.teacher_temperature_epochs, temperature, start=options.teacher_temperature_start
        ),
    }


def class_features(backbone: Backbone, views: Sequence[Tensor]) -> Tensor:
    """Pooled features of V views, [V · B, dim]. Views of one size share a pass, and so their batch norm."""
    sizes = groupby(views, key=lambda view: view.shape[-1])
    return torch.cat([backbone(torch.cat(list(same))) for _, same in sizes])


class PrototypeHead(nn.Module):
    """Two hidden layers, a bottleneck of unit length, and K prototypes (Caron et al. 2021, appendix C).

    The paper's last layer is weight-normalised with its gains fixed at 1: a linear layer whose rows have unit
    length, so its outputs are cosines. What is trained are the rows before they are brought to that length.
    """

    def __init__(self, dim: int, options: SelfDistillationOptions, *, norm: bool = False) -> None:
        super().__init__()
        hidden = options.hidden_dim
        layers: list[nn.Module] = []
        for before in (dim, hidden):
            layers += [nn.Linear(before, hidden, bias=not norm)]
            layers += [nn.BatchNorm1d(hidden)] if norm else []
            layers += [nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, options.bottleneck_dim))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self.prototypes = nn.Linear(options.bottleneck_dim, options.output_dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """float [B, dim] → cosines [B, K], in float32 or wider."""
        return _cosines(self.layers(features), self.prototypes.weight)

    def freeze_prototypes(self) -> None:
        """Takes the gradient of the prototypes away, so that the coming step leaves them."""
        self.prototypes.weight.grad = None


@full_precision
def _cosines(rows: Tensor, prototypes: Tensor) -> Tensor:
    # In float32 whatever the networks ran in: at a temperature of .04, bfloat16 moves a logit by up to .05.
    return F.normalize(rows, dim=1) @ F.normalize(prototypes, dim=1).T


@full_precision
def distillation_loss(outputs: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy between the teacher's targets and the student's outputs of every *other* view (eq. 3).

    Args:
        outputs: float [V, B, K], the student's cosines; the first T views are those of the teacher.
        targets: float [T, B, K], the teacher's distributions; each row sums to 1.
        temperature: The student's τ > 0.

    Returns:
        float [], mean over the T·(V−1) pairs and this rank's rows, in float32 or the float64 of the inputs.
    """
    total = outputs.new_zeros(())
    every = targets.sum(0)
    for view, scores in enumerate(outputs):
        # A view's targets are added up first: one product with the logarithms instead of T.
        wanted = every - targets[view] if view < len(targets) else every
        total = total - (wanted * (scores / temperature).log_softmax(1)).sum(1).mean()
    return total / (len(targets) * (len(outputs) - 1))
