"""Backbones small enough that a whole training step takes milliseconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.backbones import Backbone, build
from training.method import Batch, Facts, Method, Texts
from training.methods import find
from training.schedules import Now
from training.views import Augmentation

__all__ = ["FACTS", "TinyConv", "batch_for", "tiny_method"]

FACTS = Facts(images=64, size=16, epochs=4, batch_size=8, steps_per_epoch=8)


class TinyConv(Backbone):
    """Two strided convolutions with batch norm: [B, 3, 16, 16] → [B, 16], patches [B, 16, 4, 4]."""

    kind = "conv"

    def __init__(self) -> None:
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        super().__init__("tiny", network, 16, 16)

    def features(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        patches = self.network(images)
        return patches.mean((2, 3)), patches

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)[0]

    def attention(self, images: Tensor) -> Tensor:
        raise NotImplementedError


def tiny_method(name: str, *, facts: Facts = FACTS, seed: int = 0, **options: Any) -> Method[Any]:
    """The method on a tiny backbone, with small heads; `options` override its own."""
    kind = find(name)
    torch.manual_seed(seed)
    backbone = (
        _tiny_vit(facts.size, kind.backbone_options(facts)) if kind.backbone_kind == "vit" else TinyConv()
    )
    suited = kind.Options.suited_to(facts)
    small = {key: min(getattr(suited, key), 32) for key in dir(suited) if key.endswith("_dim")}
    if kind.captioned:
        small |= {"text": "transformer/1x32", "shared_length": 32}
    return kind(backbone, type(suited)(**{**_as_dict(suited), **small, **options}), facts)


def _tiny_vit(size: int, options: Mapping[str, bool]) -> Backbone:
    """Two blocks, 64 wide, over patches of 4 pixels."""
    backbone = build("test_vit/4", size, **options)
    backbone.network.blocks = backbone.network.blocks[:2]
    return backbone


def _as_dict(options: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


def batch_for(
    method: Method[Any], *, size: int = 8, seed: int = 0, step: int = 0, facts: Facts = FACTS
) -> Batch:
    """A batch of noise with the views that the method asks for."""
    generator = torch.Generator().manual_seed(seed)
    views = type(method).views(Augmentation(), method.options, facts)
    images = [torch.randn(size, 3, view.size, view.size, generator=generator) for view in views]
    words = torch.randint(1, 49_000, (size, 6), generator=generator)
    now = Now(step, facts.epochs * facts.steps_per_epoch, facts.steps_per_epoch)
    return Batch(
        views=images,
        ids=torch.arange(size),
        now=now,
        values={name: schedule(now) for name, schedule in method.schedules().items()},
        texts=Texts(words, torch.arange(size)) if method.captioned else None,
    )
