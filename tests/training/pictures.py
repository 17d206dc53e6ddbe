"""Small folders of pictures that a training run can be made on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from training.methods import METHODS

__all__ = ["QUICK", "quick", "write_pictures"]

QUICK = {
    "backbone": "test_resnet",
    "size": "32",
    "epochs": "2",
    "batch_size": "8",
    "log_every": "1",
    "checkpoint_every": "3",
    "holdout": "0.2",
}
"""Settings of a run of eight steps that takes about a second."""


def quick(method: str, **settings: object) -> dict[str, str]:
    """Settings of a short run; methods for vision transformers get one."""
    given = dict(QUICK)
    if METHODS[method].backbone_kind == "vit":
        given["backbone"] = "test_vit/4"
    small = {
        "output_dim",
        "hidden_dim",
        "projection_dim",
        "predictor_dim",
        "prediction_dim",
        "bottleneck_dim",
    }
    options = set(METHODS[method].Options.__dataclass_fields__)
    if METHODS[method].captioned:
        given |= {"text": "transformer/1x32", "shared_length": "32", "captions": "label"}
    return given | dict.fromkeys(small & options, "32") | {key: str(value) for key, value in settings.items()}


def write_pictures(folder: Path, *, classes: int = 2, each: int = 20, size: int = 32, seed: int = 0) -> Path:
    """Class folders of blotches whose colour leans towards the class."""
    chance = np.random.default_rng(seed)
    for index in range(classes):
        inside = folder / f"class-{index}"
        inside.mkdir(parents=True)
        for number in range(each):
            coarse = chance.integers(0, 160, (4, 4, 3), np.uint8)
            coarse[..., index % 3] += 90
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(
                inside / f"{number}.png"
            )
    return folder
