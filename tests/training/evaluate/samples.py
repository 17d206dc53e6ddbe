"""Small data sets in memory, and encoders whose features can be computed by eye."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from tests.training.tiny import TinyConv
from training.data import Source
from training.evaluate.embedding import Embedded, Reader
from training.evaluate.network import NetworkEncoder

COLOURS = ((220, 30, 30), (30, 200, 40), (40, 60, 220), (220, 210, 40))
NAMES = ("red", "green", "blue", "yellow")


def source_of(
    images: Sequence[NDArray[np.uint8] | bytes],
    *,
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] = (),
    groups: Sequence[int] | None = None,
    test: Sequence[bool] | None = None,
    name: str = "samples",
) -> Source:
    """A source of arrays or files that lie in memory."""
    count = len(images)
    return Source(
        name=name,
        location=f"memory:{name}",
        keys=tuple(f"{row:04}" for row in range(count)),
        labels=np.full(count, -1, np.int64) if labels is None else np.array(labels, np.int64),
        class_names=tuple(class_names),
        groups=None if groups is None else np.array(groups, np.int64),
        test=np.zeros(count, bool) if test is None else np.array(test, bool),
        stamps=np.zeros((count, 2), np.int64),
        fetch=lambda row: images[row],
    )


def coloured(
    count: int = 80, *, classes: int = 4, size: int = 16, seed: int = 0, noise: float = 40
) -> Source:
    """Noisy pictures in the colour of their class; classes take turns."""
    chance = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    base = np.array(COLOURS)[labels][:, None, None]
    pixels = (base + chance.normal(0, noise, (count, size, size, 3))).clip(0, 255).astype(np.uint8)
    return source_of(
        list(pixels), labels=labels.tolist(), class_names=NAMES[:classes], name=f"coloured {seed}"
    )


def without_labels(source: Source) -> Source:
    return replace(source, labels=np.full(len(source), -1, np.int64), class_names=())


def cutout(seed: int, size: int = 48) -> bytes:
    """A PNG of a coloured shape on transparent ground."""
    chance = np.random.default_rng(seed)
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    box = tuple(int(one) for one in (size * 0.2, size * 0.25, size * 0.8, size * 0.75))
    draw = ImageDraw.Draw(image)
    colour = (*(int(one) for one in chance.integers(0, 256, 3)), 255)
    (draw.ellipse if seed % 2 else draw.rectangle)(box, fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass
class EyeEncoder:
    """An encoder that computes a vector from each RGB image by a function."""

    function: Callable[[NDArray[np.float64]], Sequence[float]]
    name: str = "eye"
    dim: int = 3
    holdout: float | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    reader: Reader | None = None

    def embed(self, source: Source, *, progress=lambda done, total: None, cached: bool = True) -> Embedded:
        vectors = [self.function(np.asarray(source.read(row), np.float64)) for row in range(len(source))]
        progress(len(source), len(source))
        return Embedded(torch.tensor(np.array(vectors), dtype=torch.float32), source, ())


def mean_colour() -> EyeEncoder:
    """The mean of red, green and blue, around middle gray."""
    return EyeEncoder(lambda pixels: (pixels.mean((0, 1)) - 127.5) / 127.5)


def tiny_encoder(cache: Path, *, holdout: float | None = None) -> NetworkEncoder:
    """Random convolutions at 16 pixels, with the batch statistics of noisy colours."""
    torch.manual_seed(0)
    backbone = TinyConv().train()
    with torch.no_grad():
        for _ in range(30):
            backbone(torch.randn(64, 3, 1, 1) + 0.5 * torch.randn(64, 3, 16, 16))
    return NetworkEncoder("tiny", backbone, size=16, stored_size=16, cache=cache, workers=1, holdout=holdout)


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)
