"""lightly's methods (PyPI `lightly`), put together from its own modules: what we are measured against.

Backbone, optimiser, precision and memory format are ours, so that what differs is the method's code and how
images get to the network: Pillow transforms in a DataLoader's worker processes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from training import torchvision_ops

torchvision_ops.register()

__all__ = ["PEERS", "Peer", "batches", "require_lightly"]


def require_lightly() -> str:
    """lightly's version. Exits with what to do where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lightly
    except ImportError as error:
        raise SystemExit(
            f"The comparison needs lightly ({error}): pip install -c constraints.txt lightly"
        ) from None
    version: str = lightly.__version__
    return version


class Peer(nn.Module):
    """A method of lightly's. `loss` takes the views that its transform makes."""

    transform: Callable[[Image.Image], Sequence[Tensor]]
    backbone: nn.Module

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def after_step(self) -> None:
        """What moves after the optimiser."""


class PeerSimCLR(Peer):
    def __init__(self, backbone: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import SimCLRProjectionHead
        from lightly.transforms import SimCLRTransform

        self.transform = SimCLRTransform(input_size=size, gaussian_blur=0.0, cj_strength=0.5, min_scale=0.2)
        self.backbone = backbone
        self.head = SimCLRProjectionHead(dim, 512, 128)
        self.criterion = NTXentLoss(temperature=0.5)

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        first, second = (self.head(self.backbone(view)) for view in views)
        loss: Tensor = self.criterion(first, second)
        return loss


class PeerBarlowTwins(Peer):
    def __init__(self, backbone: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        from lightly.loss import BarlowTwinsLoss
        from lightly.models.modules import BarlowTwinsProjectionHead
        from lightly.transforms import SimCLRTransform

        self.transform = SimCLRTransform(input_size=size, gaussian_blur=0.0, cj_strength=0.5, min_scale=0.2)
        self.backbone = backbone
        self.head = BarlowTwinsProjectionHead(dim, 2048, 2048)
        self.criterion = BarlowTwinsLoss()

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        first, second = (self.head(self.backbone(view)) for view in views)
        loss: Tensor = self.criterion(first, second)
        return loss


class PeerBYOL(Peer):
    momentum = 0.99

    def __init__(self, backbone: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.transforms import SimCLRTransform

        self.transform = SimCLRTransform(input_size=size, gaussian_blur=0.0, cj_strength=0.5, min_scale=0.2)
        self.backbone = backbone
        self.projector = BYOLProjectionHead(dim, 1024, 256)
        self.predictor = BYOLPredictionHead(256, 1024, 256)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.criterion = NegativeCosineSimilarity()

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        predictions = [self.predictor(self.projector(self.backbone(view))) for view in views]
        with torch.no_grad():
            targets = [self.momentum_projector(self.momentum_backbone(view)) for view in views]
        loss: Tensor = self.criterion(predictions[0], targets[1]) + self.criterion(predictions[1], targets[0])
        return loss / 2

    def after_step(self) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.momentum_backbone, self.momentum)
        update_momentum(self.projector, self.momentum_projector, self.momentum)


class PeerMoCo(Peer):
    def __init__(self, backbone: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.transforms import MoCoV2Transform

        self.transform = MoCoV2Transform(input_size=size, gaussian_blur=0.0)
        self.backbone = backbone
        self.head = MoCoProjectionHead(dim, dim, 128)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_head = copy.deepcopy(self.head).requires_grad_(False)
        self.criterion = NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        query = self.head(self.backbone(views[0]))
        with torch.no_grad():
            key = self.momentum_head(self.momentum_backbone(views[1]))
        loss: Tensor = self.criterion(query, key)
        return loss

    def after_step(self) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.momentum_backbone, 0.99)
        update_momentum(self.head, self.momentum_head, 0.99)


class PeerSwAV(Peer):
    prototype_count = 600

    def __init__(self, backbone: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        from lightly.loss import SwaVLoss
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
        from lightly.transforms import SwaVTransform

        small = max(8, round(size * 3 / 7 / 8) * 8)
        self.transform = SwaVTransform(
            crop_sizes=(size, small),
            crop_counts=(2, 4),
            crop_min_scales=(0.2, 0.1),
            crop_max_scales=(1.0, 0.4),
            gaussian_blur=0.0,
            cj_strength=0.5,
        )
        self.backbone = backbone
        self.head = SwaVProjectionHead(dim, 512, 128)
        self.prototypes = SwaVPrototypes(128, self.prototype_count)
        self.criterion = SwaVLoss()

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        self.prototypes.normalize()
        scores = [
            self.prototypes(nn.functional.normalize(self.head(self.backbone(view)), dim=1)) for view in views
        ]
        loss: Tensor = self.criterion(scores[:2], scores[2:])
        return loss


class PeerDINO(Peer):
    outputs = 2048

    def __init__(self, backbone: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
        from lightly.transforms import DINOTransform

        small = max(8, round(size * 3 / 7 / 8) * 8)
        self.transform = DINOTransform(
            global_crop_size=size,
            global_crop_scale=(0.4, 1.0),
            local_crop_size=small,
            local_crop_scale=(0.1, 0.4),
            n_local_views=4,
            gaussian_blur=(0.0, 0.0, 0.0),
            cj_strength=0.5,
        )
        self.backbone = backbone
        self.head = DINOProjectionHead(dim, 512, 64, self.outputs, freeze_last_layer=1)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.momentum_head = DINOProjectionHead(dim, 512, 64, self.outputs).requires_grad_(False)
        self.momentum_head.load_state_dict(self.head.state_dict())
        self.criterion = DINOLoss(output_dim=self.outputs, warmup_teacher_temp_epochs=5)
        self.epoch = 0

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = [self.momentum_head(self.momentum_backbone(view)) for view in views[:2]]
        predictions = [self.head(self.backbone(view)) for view in views]
        loss: Tensor = self.criterion(targets, predictions, epoch=self.epoch)
        return loss

    def after_step(self) -> None:
        from lightly.models.utils import update_momentum

        update_momentum(self.backbone, self.momentum_backbone, 0.99)
        update_momentum(self.head, self.momentum_head, 0.99)


PEERS: dict[str, type[Any]] = {
    "simclr": PeerSimCLR,
    "byol": PeerBYOL,
    "moco_v2": PeerMoCo,
    "swav": PeerSwAV,
    "barlow_twins": PeerBarlowTwins,
    "dino": PeerDINO,
}
"""Our name of a method → lightly's."""


@dataclass
class _Pictures(Dataset[Sequence[Tensor]]):
    pixels: NDArray[np.uint8]
    transform: Callable[[Image.Image], Sequence[Tensor]]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sequence[Tensor]:
        return self.transform(Image.fromarray(self.pixels[index]))


def batches(
    pixels: NDArray[np.uint8], peer: Peer, *, batch: int, workers: int, device: torch.device
) -> Iterator[list[Tensor]]:
    """Views from a DataLoader as lightly's examples set it up; endless.

    Args:
        pixels: uint8 [N, S, S, 3].
        batch: Images of a step.
        workers: Processes that transform.
    """
    loader = DataLoader(
        _Pictures(pixels, peer.transform),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    while True:
        for views in loader:
            yield [view.to(device, non_blocking=True, memory_format=torch.channels_last) for view in views]
