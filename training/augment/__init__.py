"""Makes views of batches of images, on whatever device the pixels are.

    parameters = draw(view, aspect, generator)        # on the CPU: the same seed, the same views everywhere
    work = plan(view, parameters, stored_size=S, device=device)
    images = augment(pixels, work)

Pixels are stored as squares, uint8 [B, S, S, 3]; `aspect` holds what the originals' width ÷ height was.
Random crops and the evaluation view `centre` are cut in the original's geometry, so the squash is undone.
"""

from __future__ import annotations

from training.augment.drawing import Parameters, draw
from training.augment.geometry import crop_resize
from training.augment.pipeline import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Plan,
    augment,
    centre,
    evaluation_share,
    plan,
    show,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Parameters",
    "Plan",
    "augment",
    "centre",
    "crop_resize",
    "draw",
    "evaluation_share",
    "plan",
    "show",
]
