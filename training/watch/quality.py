"""What a run is judged by while it trains: retrieval of held-out captions if there are any, else k-NN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["RETRIEVAL", "quality_words", "score"]

RETRIEVAL = ("image_to_text", "text_to_image")
"""R@1 of held-out images for their captions, and of captions for their images, as figures are called."""


def score(figures: Mapping[str, Any]) -> float:
    """What the best checkpoint is chosen by; higher is better. NaN where nothing was held out."""
    both = [float(figures[name]) for name in RETRIEVAL if name in figures]
    return sum(both) / len(both) if both else float(figures.get("knn", math.nan))


def quality_words(figures: Mapping[str, Any]) -> str:
    """The figures for a line: "captions R@1 31.2% · images R@1 29.0% · k-NN 75.0%", or "" without any."""
    named = zip(("captions R@1", "images R@1", "k-NN"), (*RETRIEVAL, "knn"), strict=True)
    return " · ".join(f"{words} {figures[key]:.1%}" for words, key in named if key in figures)
