"""`published:METHOD/NAME`: a checkpoint as its authors published it, see `training.published`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training import torchvision_ops
from training.backbones import Backbone, build
from training.backbones.loading import load
from training.export.hashes import sha256_of
from training.export.image_networks import BackboneAttention, BackboneMean, BackbonePatches
from training.export.original import Choices, Original, OriginalImages, ready
from training.published import Checkpoint, find, locate, read, rows
from training.published.releases import Release

__all__ = ["listing", "original"]

listing = rows
"""What can be exported, one row each."""


def original(rest: str, choices: Choices) -> Original:
    """The encoder that `rest`, such as "moco_v2/resnet50-800ep", names.

    Raises:
        InvalidField: An unknown name, a choice that it does not have, the file of another checkpoint, or one
            that cannot be downloaded.
        NotFound: `choices.weights` is no file.
        BadRequest: A file that is damaged or could run code.
    """
    checkpoint = find(rest)
    release = checkpoint.release
    if choices.projection:
        raise InvalidField(
            f"'{checkpoint.full_name}' is exported without its projection head, as its authors evaluate it; "
            "leave --projection out.",
            param="projection",
        )
    spec = release.preprocessing
    backbone = build(checkpoint.network, spec.height)
    source = f"random weights for {checkpoint.network}, '{checkpoint.full_name}'"
    if not choices.random:
        path = locate(checkpoint, choices.weights)
        load(backbone, read(checkpoint, path))  # its first note names the file, which `source` does better
        source = f"{checkpoint.url or release.page} (sha256 {sha256_of(path)})"
    transformer = backbone.kind == "vit"
    return Original(
        name=checkpoint.full_name.replace("/", "-"),
        dim=backbone.dim,
        images=OriginalImages(
            network=ready(_pooled(backbone, checkpoint, choices)),
            preprocessing=spec,
            mean=release.mean,
            std=release.std,
            reference=_reference(release),
            patches=ready(BackbonePatches(backbone)),
            attention=ready(BackboneAttention(backbone)) if transformer else None,
        ),
        licence=release.licence,
        source=source,
        notes=(_evaluated(checkpoint), *(release.notes if choices.random else backbone.notes[1:])),
    )


def _pooled(backbone: Backbone, checkpoint: Checkpoint, choices: Choices) -> nn.Module:
    if backbone.kind == "vit":
        return BackboneMean(backbone) if choices.pooling == "mean" else backbone
    if choices.pooling == "class":
        raise InvalidField(
            f"'{checkpoint.full_name}' is convolutional and has no class token; choose the pooling 'mean' or "
            "'auto'.",
            param="pooling",
        )
    return backbone


def _reference(release: Release) -> Callable[[Image.Image], Tensor]:
    """Resize, crop and scale as torchvision does, which most of the authors used."""
    torchvision_ops.register()
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    spec = release.preprocessing
    steps = transforms.Compose(
        [
            transforms.Resize(spec.resize_to, InterpolationMode(spec.interpolation)),
            transforms.CenterCrop((spec.height, spec.width)),
            transforms.ToTensor(),
            transforms.Normalize(release.mean, release.std),
        ]
    )

    def prepare(image: Image.Image) -> Tensor:
        tensor = steps(image)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"torchvision gave {type(tensor).__name__} instead of a tensor")
        return tensor

    return prepare


def _evaluated(checkpoint: Checkpoint) -> str:
    release = checkpoint.release
    figure = f" Linear classification on ImageNet: {checkpoint.top1}% top-1." if checkpoint.top1 else ""
    return f"{release.title} ({release.paper}), published by its authors at {release.page}.{figure}"
