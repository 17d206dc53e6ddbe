"""open_clip's own zero-shot classifier and ours agree, on the same weights and images, at full size."""

from __future__ import annotations

import asyncio
import gc
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedserve.bundle import Description, ImageTower, TextTower, seal
from embedserve.classify import Classifier
from embedserve.config import Limits
from embedserve.encoder import Encoder
from embedserve.towers import Towers
from tests.training.export.texts import sentencepiece_like
from training.export.original import Choices, Original
from training.export.sources.open_clip import original
from training.starter.compact import export_graph

import open_clip  # isort: skip -- after the source, which prepares torchvision

LABELS = ["cat", "fire engine", "Tuscan village", "c++ source code", "naïve painting"]
TEMPLATES = ("a photo of a {}.", "{}", "a low-resolution picture of “{}” &amp; nothing else")


class Served(nn.Module):
    """uint8 [batch, height, width, 3] → unit vectors."""

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("shift", torch.tensor(mean)[:, None, None] * 255)
        self.register_buffer("scale", torch.tensor(std)[:, None, None] * 255)

    def forward(self, pixels: Tensor) -> Tensor:
        return normalize(self.network((pixels.permute(0, 3, 1, 2).float() - self.shift) / self.scale), dim=1)


class Unit(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        return normalize(self.network(ids), dim=1)
