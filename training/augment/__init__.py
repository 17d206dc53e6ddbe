"""Makes views of batches of images, on whatever device the pixels are.

    parameters = draw(view, aspect, generator)        # on the CPU: the same seed, the same views everywhere
    images = augment(pixels, view, parameters, mean=IMAGENET_MEAN, std=IMAGENET_STD)

Pixels are stored as squares, uint8 [B, S, S, 3]; `aspect` holds what the originals' width ÷ height was.
Random crops and the evaluation view `centre` are cut in the original's geometry, so the squash is undone.
"""

from __future__ import annotations

from training.augment.drawing import Parameters, draw
from training.augment.geometry import crop_resize
from training.augment.pipeline import IMAGENET_MEAN, IMAGENET_STD, augment, centre, evaluation_share, show

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Parameters",
    "augment",
    "centre",
    "crop_resize",
    "draw",
    "evaluation_share",
    "show",
]
