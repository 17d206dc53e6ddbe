"""Every method by the name that `embedserve train` knows it by."""

from __future__ import annotations

from typing import Any

from embedserve.errors import NotFound, closest
from training.method import Method
from training.methods.barlow_twins import BarlowTwins
from training.methods.byol import BYOL
from training.methods.clip import CLIP
from training.methods.densecl import DenseCL
from training.methods.dino import DINO
from training.methods.dinov2 import DINOv2
from training.methods.lit import LiT
from training.methods.moco import MoCoV1, MoCoV2
from training.methods.moco_v3 import MoCoV3
from training.methods.nnclr import NNCLR
from training.methods.siglip import SigLIP
from training.methods.simclr import SimCLR
from training.methods.simclr_v2 import SimCLRv2
from training.methods.simsiam import SimSiam
from training.methods.swav import SwAV
from training.methods.vicreg import VICReg

__all__ = ["METHODS", "find"]

METHODS: dict[str, type[Method[Any]]] = {
    "barlow_twins": BarlowTwins,
    "byol": BYOL,
    "clip": CLIP,
    "densecl": DenseCL,
    "dino": DINO,
    "dinov2": DINOv2,
    "lit": LiT,
    "moco_v1": MoCoV1,
    "moco_v2": MoCoV2,
    "moco_v3": MoCoV3,
    "nnclr": NNCLR,
    "siglip": SigLIP,
    "simclr": SimCLR,
    "simclr_v2": SimCLRv2,
    "simsiam": SimSiam,
    "swav": SwAV,
    "vicreg": VICReg,
}


def find(name: str) -> type[Method[Any]]:
    """The method of that name. Raises NotFound with the closest name."""
    if name not in METHODS:
        raise NotFound(
            f"There is no method '{name}'; {closest(name, METHODS)} `embedserve train --list` shows all.",
            param="method",
        )
    return METHODS[name]
