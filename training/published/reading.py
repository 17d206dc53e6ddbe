"""A published checkpoint's file → weights that `training.backbones.loading` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from embedserve.errors import BadRequest, InvalidField
from training.backbones.files import contents, flat
from training.backbones.starting import Weights
from training.published import layouts, releases
from training.published.layouts import Layout, sniff, take
from training.published.locating import locate
from training.published.releases import RGB
from training.published.table import TABLE, Checkpoint, find

__all__ = ["for_training", "from_foreign", "read"]


def for_training(start: str) -> Weights:
    """The weights that "NAME" or "NAME@FILE" means, for images normalised with ImageNet's mean and std.

    Raises:
        NotFound, InvalidField, BadRequest: As `read`, `find` and `locate` do.
    """
    name, _, file = start.partition("@")
    checkpoint = find(name)
    weights = read(checkpoint, locate(checkpoint, Path(file) if file else None))
    release = checkpoint.release
    return _for_imagenet_inputs(weights, release.mean, release.std)


def read(checkpoint: Checkpoint, path: Path) -> Weights:
    """The network's tensors under torchvision's or timm's names, as they are.

    Raises:
        BadRequest: The file is damaged, holds no tensors, or could run code.
        InvalidField: It has another layout than the checkpoint's file, or tensors that nothing explains.
    """
    tensors = dict(flat(contents(path)))
    if not tensors:
        raise BadRequest(
            f"'{path}' holds no tensors; give the file of '{checkpoint.full_name}' as it is published at "
            f"{checkpoint.release.page}.",
            param="weights",
        )
    origin = f"'{path}'"
    layout = sniff(tensors)
    if layout is None or layout not in checkpoint.release.layouts:
        raise InvalidField(
            f"{origin} is not the file of '{checkpoint.full_name}': {_looks(layout, tensors)}. Give the file "
            f"that is published at {checkpoint.release.page}.",
            param="weights",
        )
    return Weights(
        take(layout, tensors, origin),
        f"'{checkpoint.full_name}' ({origin})",
        checkpoint.network,
        "large" if checkpoint.network.startswith("resnet") else None,
        "",
        positions=checkpoint.positions,
        notes=tuple(checkpoint.release.notes),
    )


def from_foreign(tensors: Mapping[str, Tensor], origin: str) -> Weights | None:
    """Weights of a file whose authors use names of their own; None for all others.

    The network is not known from the file, except that names alone do not tell a vision transformer's heads:
    MoCo v3's small one has twelve, where all others of its width have six.
    """
    layout = sniff(tensors)
    if layout is layouts.MOCO_V3_VIT:
        found = take(layout, tensors, origin)
        small = found.get("cls_token", torch.empty(0)).shape[-1] == 384
        return Weights(found, origin, "vit_small_12heads/16" if small else "", None, "")
    if layout is None or not layout.foreign:
        return None
    found = take(layout, tensors, origin)
    weights = Weights(
        found,
        origin,
        stem=None if layout is layouts.DINO_V2 else "large",
        prefix="",
        positions="dino" if layout is layouts.DINO_V2 and "reg_token" not in found else "",
    )
    scaled = releases.SIMCLR_V2 if layout in releases.SIMCLR_V2.layouts else releases.BYOL
    return _for_imagenet_inputs(weights, scaled.mean, scaled.std)


def _looks(layout: Layout | None, tensors: Mapping[str, Tensor]) -> str:
    if layout is None:
        return f"its tensors begin with {', '.join(list(tensors)[:3])}"
    of_layout = [name for name, row in TABLE.items() if layout in row.release.layouts]
    example = f" (such as '{of_layout[0]}')" if of_layout else ""
    return f"it looks like {layout.owner}{example}"


def _for_imagenet_inputs(weights: Weights, mean: RGB, std: RGB) -> Weights:
    """The same network for images normalised with ImageNet's mean and std instead of `mean` and `std`.

    The scale goes into the first convolution, the shift into the running mean of the norm behind it. That is
    exact but for the border of three pixels, where the padding is now the mean colour instead of black.
    """
    if (mean, std) == (releases.IMAGENET_MEAN, releases.IMAGENET_STD):
        return weights
    tensors = dict(weights.tensors)
    conv, norm = ("conv1", "bn1") if "conv1.weight" in tensors else ("conv1.0", "conv1.1")
    kernel = tensors.get(f"{conv}.weight")
    average = tensors.get(f"{norm}.running_mean")
    if kernel is None or average is None or kernel.shape[1] != 3:
        return weights  # reported as missing when it is loaded
    ours, theirs = (torch.tensor(value) for value in (releases.IMAGENET_STD, std))
    scale = (ours / theirs)[:, None, None]
    shift = (torch.tensor(releases.IMAGENET_MEAN) - torch.tensor(mean)) / theirs
    tensors[f"{conv}.weight"] = kernel * scale
    tensors[f"{norm}.running_mean"] = average - (kernel.sum((2, 3)) @ shift)
    note = "Its first layer was scaled: its authors normalise images in another way than training does here."
    return Weights(
        tensors,
        weights.origin,
        weights.network,
        weights.stem,
        weights.prefix,
        weights.positions,
        (*weights.notes, note),
    )
