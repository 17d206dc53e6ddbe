"""DINOv2: DINO on whole crops, the same on hidden patches (iBOT), and features kept apart (KoLeo)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training.backbones import Backbone
from training.backbones.vision_transformer import VisionTransformer
from training.koleo import koleo_loss
from training.masking import Hidden, hide
from training.method import Batch, Facts, Losses, Method, ParameterRule, Recipe
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
from training.sinkhorn import sinkhorn
from training.views import Augmentation, View

__all__ = ["DINOv2", "DINOv2Options", "patch_loss"]

FULL_VIEWS = 2
"""Views that the teacher sees, and of which the student sees parts hidden."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DINOv2Options(SelfDistillationOptions):
    """Settings of DINOv2."""

    momentum_start: float = 0.992
    crop_split: float = 0.32
    mask_least: float = 0.1
    """Least share of the patches that is hidden of a crop."""
    mask_most: float = 0.5
    """Largest share. One of the two full-size crops of each image is masked."""
    sinkhorn_iterations: int = 3
    """Iterations of Sinkhorn-Knopp, which makes the teacher's targets use every prototype equally."""
    koleo: float = 0.1
    """Weight of the term that pushes an image's features away from its nearest neighbour's; 0 for none."""
    layer_decay: float = 0.9
    """Factor on the learning rate from each block to the one before; 1 for none."""


class DINOv2(Method[DINOv2Options]):
    paper = "Oquab et al. 2023, arXiv:2304.07193"
    summary = "DINO that also fills in hidden patches; strong features of whole images and of their parts"
    backbone_kind = "vit"
    Options = DINOv2Options

    def __init__(self, backbone: Backbone, options: DINOv2Options, facts: Facts) -> None:
        super().__init__(backbone, options, facts)
        if not isinstance(backbone, VisionTransformer):
            raise InvalidField(
                f"dinov2 hides patches, and '{backbone.name}' has none; set backbone to a vision transformer "
                "such as vit_small/16, or train dino.",
                param="backbone",
            )
        check_crops(backbone, options)
        self.grid = facts.size // backbone.patch  # patches in a row of a full-size view
        self.head = PrototypeHead(backbone.dim, options)
        self.patch_head = PrototypeHead(backbone.patch_dim, options)
        self.teacher = momentum_copy(backbone)
        self.teacher_head = momentum_copy(self.head)
        self.teacher_patch_head = momentum_copy(self.patch_head)

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        # .004 at a batch of 1,024, in proportion to the root of the batch and not to the batch itself.
        lr = 0.004 * math.sqrt(facts.batch_size / 1024)
        return Recipe(
            optimizer="adamw",
            lr=lr * 256 / facts.batch_size,
            lr_end=2.5e-4,  # the authors' 1e-6
            weight_decay=0.04,
            weight_decay_end=0.4,
            clip=3.0,
        )

    @classmethod
    def backbone_options(cls, facts: Facts) -> Mapping[str, bool]:
        return {"mask_token": True}

    @classmethod
    def views(cls, augmentation: Augmentation, options: DINOv2Options, facts: Facts) -> tuple[View, ...]:
        return multi_crop(augmentation, options, facts)

    def schedules(self) -> dict[str, Schedule]:
        return schedules(self.options)

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        return [
            (self.backbone, self.teacher),
            (self.head, self.teacher_head),
            (self.patch_head, self.teacher_patch_head),
        ]

    def parameter_rules(self) -> list[ParameterRule]:
        """Early layers learn more slowly, and the patch embedding five times as slowly again."""
        network, decay = self.backbone.network, self.options.layer_decay
        blocks = list(network.blocks)
        first = decay ** (len(blocks) + 1)
        return [
            ParameterRule(module=network.norm),
            *[ParameterRule(module=one, lr=decay ** (len(blocks) - at)) for at, one in enumerate(blocks)],
            ParameterRule(module=network.patch_embed, lr=0.2 * first),
            ParameterRule(module=self.backbone, lr=first),  # tokens and positions
        ]

    @property
    def projection(self) -> nn.Module:
        return self.teacher_head.layers

    def loss(self, batch: Batch) -> Losses:
        options = self.options
        full, local = batch.views[:FULL_VIEWS], batch.views[FULL_VIEWS:]
        crops, images = torch.cat(list(full)), len(full[0])
        share = (options.mask_least, options.mask_most)
        hidden = hide(images, self.grid, self.grid, share=share, step=batch.now.step).to(crops.device)
        targets, patch_targets = self._targets(crops, hidden, batch.values["teacher_temperature"])

        tokens, patches = self.backbone.features(crops, hidden.masks)
        features = torch.cat([tokens, class_features(self.backbone, local)]) if local else tokens
        outputs = self.head(features).view(len(batch.views), images, -1)
        patch_outputs = self.patch_head(_chosen(patches, hidden.at))

        temperature = options.student_temperature
        whole = distillation_loss(outputs, targets, temperature=temperature)
        parts = patch_loss(patch_outputs, patch_targets, hidden.weights, temperature=temperature)
        # Crops of one image are not neighbours of each other: each view for itself.
        apart = torch.stack([koleo_loss(view, batch.ids) for view in tokens.chunk(FULL_VIEWS)]).sum()
        return {
            "loss": whole + parts + options.koleo * apart,
            "dino": whole,
            "ibot": parts,
            "koleo": apart / FULL_VIEWS,
        }

    @torch.no_grad()
    def _targets(self, crops: Tensor, hidden: Hidden, temperature: float) -> tuple[Tensor, Tensor]:
        """The teacher's distributions: [2, B, K] for crops, which it sees whole; [M, K] for patches."""
        tokens, patches = self.teacher.features(crops)
        outputs = self.teacher_head(tokens), self.teacher_patch_head(_chosen(patches, hidden.at))
        iterations = self.options.sinkhorn_iterations
        whole, parts = (sinkhorn(one, epsilon=temperature, iterations=iterations) for one in outputs)
        return whole.view(FULL_VIEWS, -1, whole.shape[1]), parts

    def before_step(self, now: Now) -> None:
        if now.epoch < self.options.freeze_epochs:
            self.head.freeze_prototypes()
            self.patch_head.freeze_prototypes()

    @property
    def encoder(self) -> Backbone:
        return self.teacher

    def logit_count(self) -> int:
        return self.options.output_dim


@full_precision
def patch_loss(outputs: Tensor, targets: Tensor, weights: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy between targets and outputs of hidden patches (Zhou et al. 2022, eq. 2).

    Args:
        outputs: float [M, K], the student's cosines.
        targets: float [M, K], the teacher's distributions; each row sums to 1.
        weights: float [M], of each patch in the sum.
        temperature: The student's τ > 0.

    Returns:
        float [], in float32 or the float64 of the inputs.
    """
    predicted = (outputs / temperature).log_softmax(1)
    return -(weights.to(predicted.dtype) * (targets * predicted).sum(1)).sum()


def _chosen(patches: Tensor, at: Tensor) -> Tensor:
    """Rows of a patch map: [B, C, h, w] and int64 [M] → [M, C]."""
    return patches.flatten(2).transpose(1, 2).flatten(0, 1).index_select(0, at)
