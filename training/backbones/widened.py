"""ResNets of other widths, and as the authors of SimCLR and BYOL built theirs.

    resnet50x2            every channel doubled (Kolesnikov et al. 2019): SwAV, VICReg. torchvision's
                          `wide_resnet50_2` widens the middle of each block alone
    resnet50x1-simclr     TensorFlow's: the max-pool pads as "SAME" does
    resnet50x1-simclr-sk  … with selective kernels and the stem and shortcuts of ResNet-D (SimCLRv2)
    resnet50x1-byol       JAX's: whatever strides pads as "SAME" does

"SAME" pads an even side by one pixel less on the left and top than torchvision, so its windows lie a pixel
further. The weights fit either way and the vectors differ.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Shape", "Widened", "large_stem", "parse", "start_convolutions"]

Padding = Literal["", "simclr", "byol"]

BLOCKS = {
    14: (1, 1, 1, 1),
    26: (2, 2, 2, 2),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
"""Depth → bottleneck blocks of the four stages."""
EXPANSION = 4
NAME = re.compile(r"resnet(\d+)x([1-9])(?:-(simclr|byol))?(-sk)?")


@dataclass(frozen=True, slots=True)
class Shape:
    """What a name says."""

    depth: int = 50
    width: int = 1
    padding: Padding = ""
    selective: bool = False

    @property
    def dim(self) -> int:
        """Length of the pooled feature vector."""
        return 512 * EXPANSION * self.width


def parse(name: str) -> Shape | None:
    """The network that `name` means; None when it is no name of this module's."""
    found = NAME.fullmatch(name)
    if found is None or int(found[1]) not in BLOCKS or (found[4] and found[3] != "simclr"):
        return None
    padding: Padding = "simclr" if found[3] == "simclr" else "byol" if found[3] else ""
    return Shape(int(found[1]), int(found[2]), padding, bool(found[4]))


class Widened(nn.Module):
    """Images, float [B, 3, H, W] → pooled features [B, dim]. Names are torchvision's, `fc` is left out.

    As in `training.backbones.convolutional.ResNet`, each block starts as the identity.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = 64 * shape.width
        self.conv1, self.maxpool = large_stem(shape)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        inputs = width
        for stage, blocks in enumerate(BLOCKS[shape.depth]):
            planes = width * 2**stage
            layers = [Bottleneck(inputs, planes, 2 if stage else 1, shape, project=True)]
            inputs = planes * EXPANSION
            layers += [Bottleneck(inputs, planes, 1, shape, project=False) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        start_convolutions(self)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for number in (1, 2, 3, 4):
            maps = self.get_submodule(f"layer{number}")(maps)
        return F.adaptive_avg_pool2d(maps, 1).flatten(1)


class Bottleneck(nn.Module):
    """1×1, 3×3 (which strides), 1×1, and around it the identity or a projection."""

    def __init__(self, inputs: int, planes: int, stride: int, shape: Shape, *, project: bool) -> None:
        super().__init__()
        outputs = planes * EXPANSION
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2: nn.Module
        self.bn2: nn.Module
        if shape.selective:
            self.conv2, self.bn2 = SelectiveKernel(planes, stride), nn.Identity()
        else:
            self.conv2 = _conv(planes, planes, 3, stride, same=shape.padding == "byol")
            self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Sequential | None = None
        if project and shape.selective:
            self.downsample = nn.Sequential(
                ShortcutPool(stride), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )
        elif project:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, maps: Tensor) -> Tensor:
        shortcut = maps if self.downsample is None else self.downsample(maps)
        out = self.relu(self.bn1(self.conv1(maps)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu(out + shortcut)


class SelectiveKernel(nn.Module):
    """Two 3×3 streams, mixed channel by channel with weights seen in both (Li et al. 2019).

    SimCLRv2 narrows to a sixteenth of the channels between pooling and mixing, at least 32.
    """

    def __init__(self, planes: int, stride: int) -> None:
        super().__init__()
        narrow = max(planes // 16, 32)
        self.streams = nn.Conv2d(planes, 2 * planes, 3, stride, padding=1, bias=False)
        self.streams_bn = nn.BatchNorm2d(2 * planes)
        self.narrow = nn.Conv2d(planes, narrow, 1, bias=False)
        self.narrow_bn = nn.BatchNorm2d(narrow)
        self.mix = nn.Conv2d(narrow, 2 * planes, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """[B, planes, H, W] → [B, planes, H/stride, W/stride], nowhere negative."""
        streams: Tensor = torch.stack(torch.relu(self.streams_bn(self.streams(maps))).chunk(2, dim=1))
        seen = streams.sum(0).mean((2, 3), keepdim=True)
        mix = torch.stack(self.mix(torch.relu(self.narrow_bn(self.narrow(seen)))).chunk(2, dim=1))
        return (streams * mix.softmax(0)).sum(0)


class ShortcutPool(nn.Module):
    """The mean over 2×2 of ResNet-D's shortcuts, as TensorFlow pads it.

    With stride 1 the windows of the last row and column reach over the edge and TensorFlow leaves what is
    beyond out of the mean. Repeating the edge gives the same numbers.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, maps: Tensor) -> Tensor:
        if self.stride == 1:
            return F.avg_pool2d(F.pad(maps, (0, 1, 0, 1), mode="replicate"), 2, 1)
        return F.avg_pool2d(F.pad(maps, (0, 1, 0, 1)), 2, 2)


class SameConv2d(nn.Conv2d):
    """A strided convolution that pads as TensorFlow's and JAX's "SAME" does."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(_padded(maps, self.kernel_size[0], self.stride[0]))


class SameMaxPool2d(nn.MaxPool2d):
    """3×3 with stride 2, padded as "SAME" does. Zeros can pad, as what a ReLU leaves is nowhere negative."""

    def __init__(self) -> None:
        super().__init__(3, stride=2)

    def forward(self, maps: Tensor) -> Tensor:
        pooled: Tensor = super().forward(_padded(maps, 3, 2))
        return pooled


def large_stem(shape: Shape) -> tuple[nn.Module, nn.Module]:
    """What comes before the first batch norm, and the max-pool behind it."""
    width = 64 * shape.width
    pool = SameMaxPool2d() if shape.padding else nn.MaxPool2d(3, stride=2, padding=1)
    if not shape.selective:
        return _conv(3, width, 7, 2, same=shape.padding == "byol"), pool
    half = width // 2
    conv = nn.Sequential(
        nn.Conv2d(3, half, 3, 2, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        nn.Conv2d(half, half, 3, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.ReLU(inplace=True),
        nn.Conv2d(half, width, 3, padding=1, bias=False),
    )
    return conv, pool


def start_convolutions(network: nn.Module) -> None:
    """Draws new weights as torchvision's ResNets do."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv(inputs: int, outputs: int, kernel: int, stride: int, *, same: bool) -> nn.Conv2d:
    if same and stride > 1:
        return SameConv2d(inputs, outputs, kernel, stride, bias=False)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _padded(maps: Tensor, kernel: int, stride: int) -> Tensor:
    """[B, C, H, W] with zeros around as "SAME" has them; an odd one goes to the right and below."""
    height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in maps.shape[2:])
    return F.pad(maps, (width // 2, width - width // 2, height // 2, height - height // 2))
