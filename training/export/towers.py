"""What serving runs: from pixels or token ids to unit vectors, scaling and normalisation included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["LEAST_LENGTH", "ImageGraph", "TextGraph", "unit"]

LEAST_LENGTH = 1e-6
"""Below this a vector counts as zero and stays zero, instead of becoming noise or NaN."""


def unit(vectors: Tensor) -> Tensor:
    """float [n, dim], each row of length 1; rows shorter than `LEAST_LENGTH` stay nearly zero."""
    return vectors / vectors.square().sum(dim=1, keepdim=True).sqrt().clamp_min(LEAST_LENGTH)


class ImageGraph(nn.Module):
    """uint8 [batch, height, width, 3] → unit vectors, float32 [batch, dim], and the further outputs.

    Args:
        network: float32 [batch, 3, height, width], normalised → float32 [batch, dim].
        mean, std: Of RGB values 0..1, as in (value − mean) ÷ std.
        further: Networks that take what `network` takes; what they give comes behind the vectors, as it is.
    """

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        further: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.network, self.further = network, nn.ModuleList(further)
        self.mean = nn.Buffer(torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.std = nn.Buffer(torch.tensor(std, dtype=torch.float32)[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        images = self.normalized(pixels)
        vectors = unit(self.network(images))
        return (vectors, *(one(images) for one in self.further)) if len(self.further) else vectors

    def normalized(self, pixels: Tensor) -> Tensor:
        """uint8 [batch, height, width, 3] → what the network takes, float32 [batch, 3, height, width]."""
        return (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std


class TextGraph(nn.Module):
    """int64 [batch, length] → unit vectors, float32 [batch, dim]."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return unit(self.network(tokens))
