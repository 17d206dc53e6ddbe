"""lightly's methods (PyPI `lightly`), put together from its own modules: what we are measured against.

Heads, temperatures and the losses' scale are those of lightly's examples and of its CIFAR-10 benchmark.
Backbone and first weights, crops and colours, optimiser and schedules, the momentum of moving averages,
precision and memory format are ours, and the loss is in float32 as ours is. So what differs is the method's
code, and how images get to the network: Pillow transforms in a DataLoader's worker processes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from training import checkpoint, torchvision_ops
from training.method import Method, ParameterRule
from training.optim import build_optimizer, set_rates
from training.precision import Precision
from training.run import build_method
from training.schedules import Now
from training.seeding import seed_everything
from training.settings import Settings
from training.train import STEPS, WEIGHTS

torchvision_ops.register()

__all__ = ["PEERS", "Peer", "batches", "require_lightly", "train_peer"]


def require_lightly() -> str:
    """lightly's version. Exits with what to do where it is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import lightly
    except ImportError as error:
        raise SystemExit(
            f"The comparison needs lightly ({error}): pip install -c constraints.txt lightly, or do "
            "without it (training_speed: --no-peer; training_quality: --peers '')"
        ) from None
    version: str = lightly.__version__
    return version


class Peer(nn.Module):
    """A method of lightly's. `loss` takes the views that its transform makes."""

    transform: Callable[[Image.Image], Sequence[Tensor]]
    backbone: nn.Module
    momentum = 0.99
    """Of the moving averages in the step that comes."""
    epoch = 0
    """Epochs that are done."""
    followers: ClassVar[Sequence[str]] = ()
    """Names of modules that are followed by those called `momentum_…`."""

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def before_step(self) -> None:
        """Takes away gradients that must not act yet."""

    def after_step(self) -> None:
        """What moves after the optimiser."""
        from lightly.models.utils import update_momentum

        for name in self.followers:
            update_momentum(getattr(self, name), getattr(self, f"momentum_{name}"), self.momentum)

    @property
    def encoder(self) -> nn.Module:
        """What is evaluated: of the two networks the one that is in our method as well."""
        return self.backbone

    def parameter_rules(self) -> list[ParameterRule]:
        """For `training.optim.build_optimizer`: none."""
        return []


def _in_float32(criterion: Callable[..., Tensor], *outputs: Tensor | list[Tensor]) -> Tensor:
    """A loss of lightly's, outside autocast as ours are."""
    wide = [one.float() if isinstance(one, Tensor) else [part.float() for part in one] for one in outputs]
    first = wide[0] if isinstance(wide[0], Tensor) else wide[0][0]
    with torch.autocast(first.device.type, enabled=False):
        return criterion(*wide)


def _small_crop(size: int) -> int:
    """Pixels of a side of a small crop, as our multi-crop has it: 3/7 of the view in whole patches."""
    patch = 4 if size <= 40 else 8 if size <= 112 else 16
    return -(-size * 3 // (7 * patch)) * patch


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
        return _in_float32(self.criterion, first, second)


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
        return _in_float32(self.criterion, first, second)


class PeerBYOL(Peer):
    followers = ("backbone", "projector")

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
        first = _in_float32(self.criterion, predictions[0], targets[1])
        second = _in_float32(self.criterion, predictions[1], targets[0])
        return (first + second) / 2


class PeerMoCo(Peer):
    followers = ("backbone", "head")

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
        return _in_float32(self.criterion, query, key)


class PeerSwAV(Peer):
    prototype_count = 600

    def __init__(self, backbone: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        from lightly.loss import SwaVLoss
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
        from lightly.transforms import SwaVTransform

        self.transform = SwaVTransform(
            crop_sizes=(size, _small_crop(size)),
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
        return _in_float32(self.criterion, scores[:2], scores[2:])


class PeerDINO(Peer):
    outputs = 2048
    followers = ("backbone", "head")

    def __init__(self, backbone: nn.Module, dim: int, size: int) -> None:
        super().__init__()
        from lightly.loss import DINOLoss
        from lightly.transforms import DINOTransform

        self.transform = DINOTransform(
            global_crop_size=size,
            global_crop_scale=(0.4, 1.0),
            local_crop_size=_small_crop(size),
            local_crop_scale=(0.15, 0.4),
            n_local_views=4,
            gaussian_blur=(0.0, 0.0, 0.0),
            cj_strength=0.5,
            cj_sat=0.8,
        )
        self.backbone = backbone
        self.head = self._head(dim)
        self.momentum_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        # Weight norm cannot be copied.
        self.momentum_head = self._head(dim).requires_grad_(False)
        self.momentum_head.load_state_dict(self.head.state_dict())
        self.criterion = DINOLoss(output_dim=self.outputs)

    def _head(self, dim: int) -> nn.Module:
        from lightly.models.modules import DINOProjectionHead

        # Batch norm, as lightly advises for convolutional networks.
        head: nn.Module = DINOProjectionHead(
            dim, 2048, 256, self.outputs, batch_norm=True, freeze_last_layer=1
        )
        return head

    def loss(self, views: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            targets = [self.momentum_head(self.momentum_backbone(view)) for view in views[:2]]
        predictions = [self.head(self.backbone(view)) for view in views]
        return _in_float32(self.criterion, targets, predictions)

    def before_step(self) -> None:
        cast("Any", self.head).cancel_last_layer_gradients(current_epoch=self.epoch)

    @property
    def encoder(self) -> nn.Module:
        return self.momentum_backbone


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


def train_peer(
    settings: Settings,
    pixels: NDArray[np.uint8],
    device: torch.device,
    file: Path,
    *,
    workers: int,
    stopped: Callable[[], bool],
) -> tuple[Peer, bool]:
    """Trains lightly's form of a method with our method's optimiser and schedules, or goes on with it.

    Args:
        settings: Of our method, resolved for these images. Its first weights are the peer's.
        pixels: uint8 [N, S, S, 3], the images to train on.
        file: Its state when it stops or ends; where it is there, training goes on from it, with the images in
            a new order.
        workers: Processes that make views.
        stopped: Asked before each step.

    Returns:
        The peer on the device, and whether it is done.
    """
    config, recipe, facts = settings.config, settings.recipe, settings.facts
    seed_everything(config.seed, WEIGHTS)
    method = build_method(settings, start="")
    schedules = method.schedules()
    peer = PEERS[config.method](method.backbone, method.backbone.dim, config.size).to(device)
    peer.to(memory_format=torch.channels_last)
    precision = Precision(config.precision, device, deterministic=config.deterministic)
    optimizer, scaler = build_optimizer(cast("Method[Any]", peer), recipe), precision.scaler()
    step, steps = 0, config.epochs * facts.steps_per_epoch
    if file.exists():
        state = checkpoint.load(file)
        step = state["step"]
        peer.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    trained = [one for one in peer.parameters() if one.requires_grad]
    seed_everything(config.seed, STEPS, step)
    stream = batches(pixels, peer, batch=config.batch_size, workers=workers, device=device)
    while step < steps and not stopped():
        now = Now(step, steps, facts.steps_per_epoch)
        peer.epoch = step // facts.steps_per_epoch
        if "momentum" in schedules:
            peer.momentum = schedules["momentum"](now)
        set_rates(optimizer, recipe, now, batch_size=config.batch_size)
        with precision.autocast():
            loss = peer.loss(next(stream))
        scaler.scale(loss).backward()
        if recipe.clip > 0:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained, recipe.clip)
        peer.before_step()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        peer.after_step()
        step += 1
    checkpoint.save(
        file,
        {
            "step": step,
            "model": peer.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        },
    )
    return peer, step == steps
