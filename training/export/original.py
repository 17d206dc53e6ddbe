"""What a source hands to the export: the network as PyTorch has it, and all that serving must know of it.

    source name → sources/*.py → `Original` → towers, graphs, parity, precision → bundle

A source knows one library. Everything after it knows none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from embedserve.bundle import Preprocessing, Scoring
from embedserve.cleaning import Cleaning

__all__ = ["Choices", "Original", "OriginalImages", "OriginalTexts", "ready"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a person may choose about a source."""

    weights: Path | None = None
    """A local file with the weights, in the source's own layout; None: the library's cache or hub."""
    random: bool = False
    """Random weights, from torch's global generator: for tests and for measuring speed without a download."""
    projection: bool = False
    """A run's projection head as well; its vectors are those that the loss compared."""
    pooling: Literal["auto", "class", "mean"] = "auto"
    """Of a vision transformer: the class token, or the mean of its patches. auto: as it was trained."""
    size: int | None = None
    """Pixels of a side, for networks that take several; None: as the weights were trained or evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalImages:
    """The image side, in eval mode, float32, on the CPU."""

    network: nn.Module
    """float32 [batch, 3, height, width], normalised by `mean`, `std` → float32 [batch, dim], any norm."""
    preprocessing: Preprocessing
    mean: tuple[float, float, float]
    """Of RGB values 0..1."""
    std: tuple[float, float, float]
    reference: Callable[[Image.Image], Tensor] | None = None
    """The library's own preprocessing: an RGB image of any size → float32 [3, height, width], normalised.
    What serving's preprocessing is compared with. None where the source has none of its own."""
    evaluated: Callable[[Image.Image], Tensor] | None = None
    """As `reference`: what evaluations by the source see, where a bundle cannot say that exactly. How close
    serving comes is measured and told, and nothing is refused for it."""
    patches: nn.Module | None = None
    """As `network`, to patch tokens [batch, patches, patch_dim], row after row; None: not offered."""
    attention: nn.Module | None = None
    """As `network`, to the class token's attention to patches, [batch, heads, patches]; None: not offered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginalTexts:
    """The text side, in eval mode, float32, on the CPU."""

    network: nn.Module
    """int64 [batch, length] for any length from 1 to the context → float32 [batch, dim], of any norm.
    Padding (`pad_id`) at the end of a row must not change its vector; where `padding` is "context", length is
    always the context."""
    tokenizer: str
    """The text of tokenizer.json."""
    context_length: int
    pad_id: int
    padding: Literal["longest", "context"] = "longest"
    cleaning: Cleaning = "none"
    """What happens to a text before `tokenizer`; goes into the bundle as it is."""
    reference_tokens: Callable[[Sequence[str]], list[list[int]]] | None = None
    """The library's own tokenizer, cut to the context, special tokens included, padding left out."""
    reference_vectors: Callable[[Sequence[str]], Tensor] | None = None
    """Texts through the library's own tokenizer and its untouched network, padded as the library pads:
    unit vectors, float32 [n, dim]. What the whole text path is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """An encoder as its source has it."""

    name: str
    """Fits `Description.name`, such as 'ViT-B-32-laion2b_s34b_b79k'."""
    dim: int
    images: OriginalImages | None = None
    texts: OriginalTexts | None = None
    scoring: Scoring = field(default_factory=Scoring)
    dims: tuple[int, ...] = ()
    """Matryoshka prefix lengths that it was trained for."""
    licence: str
    """SPDX where known, else 'unknown: ask <whom>'."""
    source: str
    """Where it is from, exactly enough to find it again, versions included."""
    notes: tuple[str, ...] = ()
    """Sentences a person should read; they go to the model card."""


def ready(network: nn.Module) -> nn.Module:
    """In eval mode, float32, without gradients."""
    return network.eval().to(torch.float32).requires_grad_(False)
