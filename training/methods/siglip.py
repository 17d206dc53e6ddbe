"""SigLIP: for each image and each caption of the batch, whether they belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.backbones import Backbone
from training.image_text_losses import siglip_loss
from training.method import Batch, Facts, Losses
from training.methods.image_text import ImageText, ImageTextOptions

__all__ = ["SigLIP", "SigLIPOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SigLIPOptions(ImageTextOptions):
    """Settings of SigLIP."""

    first_bias: float = -10.0
    """What is added to scaled cosines at first: nearly all pairs are wrong, and so begin as wrong."""


class SigLIP(ImageText[SigLIPOptions]):
    paper = "Zhai et al. 2023, arXiv:2303.15343"
    summary = (
        "each image and caption are right or wrong on their own; for any batch size; learns from captions"
    )
    Options = SigLIPOptions
    first_scale = 10.0
    activation = "sigmoid"

    def __init__(
        self,
        backbone: Backbone,
        options: SigLIPOptions,
        facts: Facts,
        carried: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, options, facts, carried)
        self.bias = nn.Parameter(torch.tensor(options.first_bias))

    def loss(self, batch: Batch) -> Losses:
        scale = self.scale()
        loss = siglip_loss(*self.pairs(batch), scale, bias=self.bias)
        return {"loss": loss, "scale": scale.detach(), "bias": self.bias.detach()}

    def scoring(self) -> dict[str, Any]:
        return {**super().scoring(), "logit_bias": float(self.bias.detach())}
