"""The text side of a run that learned from captions, with the captions that it learned from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from embedserve.bundle import Scoring
from embedserve.errors import InvalidField
from training.captions import CaptionRules, Captions
from training.evaluate.report import Progress, silent
from training.method import Method
from training.methods.image_text import ImageText

__all__ = ["RunReader", "caption_rules_of", "reader_of"]

TEXTS = 256
"""Texts of one forward pass."""


class RunReader:
    """The text side of a method that learned from captions.

    Args:
        method: In evaluation mode.
        device: Where it runs.
    """

    def __init__(self, method: ImageText[Any], device: torch.device) -> None:
        self.method, self.rules, self.device = method, method.text.rules, device
        self.scoring = Scoring(**method.scoring())

    @torch.no_grad()
    def embed(self, texts: Sequence[str], *, progress: Progress = silent) -> Tensor:
        """As `Reader.embed`."""
        captions = Captions([(text,) for text in texts], self.rules, seed=0)
        parts: list[Tensor] = []
        for start in range(0, len(captions.texts), TEXTS):
            some = np.arange(start, min(start + TEXTS, len(captions.texts)))
            tokens = torch.from_numpy(captions.tokens(some)).to(self.device)
            parts.append(nn.functional.normalize(self.method.text_vectors(tokens).float(), dim=1))
            progress(int(some[-1]) + 1, len(captions.texts))
        vectors = torch.cat(parts)[torch.from_numpy(captions.ids).to(self.device)]
        bad = (~vectors.isfinite().all(1)).nonzero()
        if len(bad):
            raise InvalidField(
                f"The text '{texts[int(bad[0])][:80]}' gets a vector with NaN or infinity. The training "
                "diverged: evaluate an earlier checkpoint, or train with less lr.",
                param="path",
            )
        return vectors


def reader_of(method: Method[Any], device: torch.device) -> RunReader | None:
    """None for a method that learned from images alone."""
    return RunReader(method, device) if isinstance(method, ImageText) else None


def caption_rules_of(method: Method[Any]) -> CaptionRules | None:
    """Where its captions were, so that the same images come back; None for a method without."""
    if not isinstance(method, ImageText):
        return None
    options = method.options
    return CaptionRules(
        by=options.captions, templates=tuple(options.templates.split("|")), filter=options.filter
    )
