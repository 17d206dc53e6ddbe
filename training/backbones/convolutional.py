"""Convolutional encoders: torchvision's ResNets, and timm's networks that end in a feature map."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training import torchvision_ops
from training.backbones import widened
from training.backbones.base import Backbone

__all__ = ["RESNETS", "Convolutional", "ResNet", "Stem", "is_resnet", "stem_for", "stem_of"]

Stem = Literal["small", "medium", "large"]

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
"""torchvision's names."""

SMALL, MEDIUM = 40, 112
"""Pixels of a side up to which a stem is used. 28 to 32 pixels must not shrink before the first block, and
64 to 96 pixels only once: a ResNet shrinks by 8 after its stem, and its own stem by 4."""


def is_resnet(name: str) -> bool:
    """Whether `ResNet` builds it: torchvision's, and those of `training.backbones.widened`."""
    return name in RESNETS or widened.parse(name) is not None


def stem_for(size: int) -> Stem:
    """The stem for square images of `size` pixels a side.

    small (≤ 40): a 3×3 convolution of stride 1 and no max-pool (SimCLR, appendix B.9); medium (≤ 112): 3×3 of
    stride 2, no max-pool; large: the network's own 7×7 of stride 2 with a max-pool.
    """
    if size <= SMALL:
        return "small"
    return "medium" if size <= MEDIUM else "large"


def stem_of(weight: Tensor, wanted: Stem) -> Stem:
    """The stem whose first convolution has `weight`. A 3×3 kernel tells nothing of its stride, so `wanted`
    decides between small and medium; where that was large, small is what others publish."""
    if weight.shape[-1] != 3:
        return "large"
    return "small" if wanted == "large" else wanted


class ResNet(Backbone):
    """A ResNet (He et al. 2016), torchvision's or one of `training.backbones.widened`, pooled by the mean
    over the last map."""

    kind = "conv"

    def __init__(self, name: str, stem: Stem) -> None:
        self._shape = widened.parse(name)
        network, dim = _of_torchvision(name) if self._shape is None else _widened(self._shape)
        super().__init__(name, network, dim, dim)
        self.stem: Stem = "large"
        self.set_stem(stem)

    def set_stem(self, stem: Stem) -> None:
        """Exchanges the stem; a new convolution starts as torchvision starts its own.

        What follows the stem is untouched.
        """
        if stem == self.stem:
            return
        net, width = self.network, self.network.bn1.num_features
        if stem == "large":
            net.conv1, net.maxpool = widened.large_stem(self._shape or widened.Shape(width=width // 64))
        else:
            net.conv1 = nn.Conv2d(3, width, 3, stride=1 if stem == "small" else 2, padding=1, bias=False)
            net.maxpool = nn.Identity()
        widened.start_convolutions(net.conv1)
        self.stem = stem

    def features(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _refuse_masks(self.name, masks)
        net = self.network
        stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        patches: Tensor = net.layer4(net.layer3(net.layer2(net.layer1(stem))))
        return F.adaptive_avg_pool2d(patches, 1).flatten(1), patches


class Convolutional(Backbone):
    """A timm network that ends in a feature map: ConvNeXt, EfficientNet, RegNet, Swin, …

    Pooling is the network's own, with the norm or convolution that some have behind it, so `dim` and
    `patch_dim` may differ. Such networks bring their own stem, whatever the size.
    """

    kind = "conv"

    def __init__(self, name: str, network: nn.Module, size: int) -> None:
        super().__init__(name, network, 0, 0)
        self._channels_first = True
        patches, pooled = self._try(size)
        width = int(self.network.num_features)
        if patches.ndim != 4 or width not in (patches.shape[1], patches.shape[3]):
            found = "tokens" if patches.ndim == 3 else str(list(patches.shape))
            raise InvalidField(
                f"'{name}' gives {found} instead of a feature map; "
                "choose a ResNet, a ConvNeXt, an EfficientNet, or one of timm's VisionTransformer networks.",
                param="backbone",
            )
        self._channels_first = patches.shape[1] == width
        self.dim, self.patch_dim = pooled.shape[1], width
        side = patches.shape[2] if self._channels_first else patches.shape[1]
        if side <= 2 and size <= MEDIUM:
            self.notes = (
                f"'{name}' has no stem for small images: {size} pixels become a map of {side}×{side}. "
                "resnet18 and vit_tiny/4 suit such images.",
            )

    def features(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _refuse_masks(self.name, masks)
        patches = self.network.forward_features(images)
        pooled: Tensor = self.network.forward_head(patches, pre_logits=True)
        return pooled, patches if self._channels_first else patches.permute(0, 3, 1, 2)

    @torch.no_grad()
    def _try(self, size: int) -> tuple[Tensor, Tensor]:
        """The shapes of the two outputs are known to no attribute that all of timm's networks have."""
        self.network.eval()
        try:
            patches = self.network.forward_features(torch.zeros(1, 3, size, size))
            pooled = self.network.forward_head(patches, pre_logits=True)
        except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError) as error:
            raise InvalidField(
                f"'{self.name}' cannot take images of {size}×{size} pixels ({error}); choose another size or "
                "another backbone, such as 'resnet18'.",
                param="backbone",
            ) from None
        self.network.train()
        return patches, pooled


def _of_torchvision(name: str) -> tuple[nn.Module, int]:
    torchvision_ops.register()
    from torchvision import models

    # The last batch norm of each residual branch starts at zero, so every block starts as the identity
    # (Goyal et al. 2017, section 5.1). SimCLR, BYOL, SimSiam and Barlow Twins were trained so; large
    # batches and LARS need it. torchvision leaves it out unless asked.
    network: Any = models.get_model(name, weights=None, zero_init_residual=True)
    dim = int(network.fc.in_features)
    network.fc = nn.Identity()
    return network, dim


def _widened(shape: widened.Shape) -> tuple[nn.Module, int]:
    return widened.Widened(shape), shape.dim


def _refuse_masks(name: str, masks: Tensor | None) -> None:
    if masks is not None:
        raise InvalidField(
            f"'{name}' is convolutional and cannot mask patches; choose a vision transformer, such as "
            "'vit_small/16'.",
            param="backbone",
        )
