"""CLIP: of all captions of the batch the right one for each image, and of all images the right one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from training.image_text_losses import clip_loss
from training.method import Batch, Losses
from training.methods.image_text import ImageText, ImageTextOptions, clamp_scale
from training.schedules import Now

__all__ = ["CLIP", "CLIPOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CLIPOptions(ImageTextOptions):
    """Settings of CLIP."""

    label_smoothing: float = 0.0
    """Share of the probability that is spread over all captions alike; .1 where captions are often wrong."""


class CLIP(ImageText[CLIPOptions]):
    paper = "Radford et al. 2021, arXiv:2103.00020"
    summary = "images find their captions, captions their images; learns from captions"
    Options = CLIPOptions
    first_scale = 1 / 0.07
    most_scale = 100.0

    def loss(self, batch: Batch) -> Losses:
        scale = self.scale()
        loss = clip_loss(*self.pairs(batch), scale, label_smoothing=self.options.label_smoothing)
        return {"loss": loss, "scale": scale.detach()}

    @torch.no_grad()
    def after_step(self, now: Now, values: Mapping[str, float]) -> None:
        super().after_step(now, values)
        clamp_scale(self.log_scale, self.most_scale)
