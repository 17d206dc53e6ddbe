"""Where a vision transformer's class token looks: at the object, with DINO's training (Caron et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from embedserve.errors import InvalidField
from training.augment import IMAGENET_MEAN, IMAGENET_STD, show
from training.data import Source
from training.data.squares import decode_rows
from training.evaluate.dense import intersection_over_union
from training.evaluate.drawing import Tile, grid, overlay
from training.evaluate.encoder import EvaluationEncoder, require_network
from training.evaluate.network import NetworkEncoder
from training.evaluate.report import PICTURE_ONLY, Progress, silent
from training.evaluate.scenes import find_cutouts, read_cutout

__all__ = ["AttentionResult", "AttentionSettings", "evaluate_attention", "most_attended"]

EXAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """Settings of `attention`."""

    images: int = 200
    """Images at most, drawn from those with transparency, or from all where too few have any."""
    mass: float = 0.6
    """A head's mask is the fewest patches that hold this share of its attention to patches."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if self.images < 1:
            raise InvalidField(f"images={self.images}: attention needs 1 image or more.", param="images")
        if not 0 < self.mass < 1:
            raise InvalidField(f"mass={self.mass} is not between 0 and 1.", param="mass")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionResult:
    """Shares 0..1. Intersections over union are None where too few images have a mask."""

    iou_of_best_head: float | None
    """Mean over images of the best head's, chosen for each image by its true mask (as in DINO's figure)."""
    iou_by_head: list[float] | None
    """Mean over images."""
    iou_of_everything: float | None
    """Of a mask that covers the whole image: what any attention has to beat."""
    entropy_by_head: list[float]
    """Mean over images, relative to a head that looks everywhere alike: 1 is uniform, 0 a single patch."""
    images: int
    masks: int
    """Images with a mask."""
    examples: list[list[Tile]] = field(metadata=PICTURE_ONLY)

    def summary(self) -> str:
        """One or two lines for people."""
        entropies = f"entropy {min(self.entropy_by_head):.2f} to {max(self.entropy_by_head):.2f} of uniform"
        heads = len(self.entropy_by_head)
        if self.iou_of_best_head is None or self.iou_by_head is None or self.iou_of_everything is None:
            return (
                f"attention of {heads} heads over {self.images} images: {entropies}\n"
                "no masks: give images with transparency to compare the attention with the object"
            )
        return (
            f"attention IoU: best head of each image {self.iou_of_best_head:.1%}, best head overall "
            f"{max(self.iou_by_head):.1%}, the whole image {self.iou_of_everything:.1%}\n"
            f"{heads} heads over {self.images} images: {entropies}"
        )

    def picture(self) -> Image.Image:
        """Images, and each head's attention laid over them."""
        heads = (f"head {one + 1}" for one in range(len(self.entropy_by_head)))
        return grid(self.examples, side=112, columns=("image", *heads))


def evaluate_attention(
    encoder: EvaluationEncoder, source: Source, settings: AttentionSettings, progress: Progress = silent
) -> AttentionResult:
    """Attention of the class token in the last block, against masks from transparency where there are any.

    The images are the data's own, on white, as the encoder is trained on them and serves them.

    Raises:
        InvalidField: The encoder is a bundle or convolutional, or no image can be read.
    """
    network = require_network(encoder, "attention")
    if network.backbone.kind != "vit":
        network.backbone.attention(torch.zeros(1, 3, network.size, network.size))  # says what to do instead
    rows = find_cutouts(
        source, most=settings.images, least=0, seed=settings.seed, evaluation="attention"
    ).rows
    masked = len(rows) > 0
    if not masked:
        drawn = np.random.default_rng(settings.seed).permutation(len(source))
        rows = drawn[: settings.images].astype(np.int64)
    images, masks = _read(network, source, rows.tolist(), masked=masked)
    if not len(images):
        raise InvalidField(f"None of the drawn images of '{source.name}' can be read.", param="data")
    attention = torch.cat(
        [_attention(network, images[at : at + network.batch]) for at in range(0, len(images), network.batch)]
    )
    progress(len(images), len(images))
    patches = attention.flatten(2)
    patches = patches / patches.sum(2, keepdim=True)
    entropy = -(patches * patches.clamp(min=1e-12).log()).sum(2) / np.log(patches.shape[2])
    chosen = most_attended(attention, settings.mass)
    side = network.size
    regions = F.interpolate(chosen.float(), (side, side), mode="nearest").bool()
    ious = None
    if masked:
        ious = torch.stack(
            [intersection_over_union(regions[:, head], masks) for head in range(regions.shape[1])], dim=1
        )
    return AttentionResult(
        iou_of_best_head=None if ious is None else float(ious.amax(1).mean()),
        iou_by_head=None if ious is None else ious.mean(0).tolist(),
        iou_of_everything=None if ious is None else float(masks.double().mean()),
        entropy_by_head=entropy.double().mean(0).tolist(),
        images=len(images),
        masks=len(images) if masked else 0,
        examples=_examples(images[:EXAMPLES], attention[:EXAMPLES], ious),
    )


def most_attended(attention: Tensor, mass: float) -> Tensor:
    """The fewest patches that together hold a share of each head's attention.

    Args:
        attention: [B, heads, h, w], not negative.
        mass: Share of the attention to patches, between 0 and 1.

    Returns:
        bool [B, heads, h, w]; at least one patch of each.
    """
    flat = attention.flatten(2).double()
    values, order = flat.sort(dim=2, descending=True, stable=True)
    before = values.cumsum(2) - values  # what stronger patches hold already
    chosen = before < mass * flat.sum(2, keepdim=True)
    chosen[..., 0] = True
    return torch.zeros_like(chosen).scatter_(2, order, chosen).view(attention.shape)


@torch.no_grad()
def _attention(network: NetworkEncoder, images: Tensor) -> Tensor:
    return network.backbone.attention(images).float()


def _read(
    network: NetworkEncoder, source: Source, rows: Sequence[int], *, masked: bool
) -> tuple[Tensor, Tensor]:
    """Views float32 [n, 3, size, size] and, where `masked`, masks bool [n, size, size] cut alike."""
    images, masks = [], []
    for row in rows:
        decoded = decode_rows(source, range(row, row + 1), network.stored_size)
        if decoded.failures:
            continue
        aspect = torch.from_numpy(decoded.aspect)
        images.append(network.view(torch.from_numpy(decoded.pixels), aspect))
        cutout = read_cutout(source, row) if masked else None
        if cutout is not None:
            masks.append(_mask_view(network, cutout, aspect))
    return (
        torch.cat(images) if images else torch.zeros(0, 3, 1, 1),
        torch.cat(masks) if masks else torch.zeros(0, 1, 1, dtype=torch.bool),
    )


def _mask_view(network: NetworkEncoder, cutout: Image.Image, aspect: Tensor) -> Tensor:
    """Alpha through the same squash and crop as the pixels: bool [1, size, size]."""
    side = network.stored_size
    alpha = cutout.getchannel("A").resize((side, side), Image.Resampling.BILINEAR)
    squares: NDArray[np.uint8] = np.stack([np.asarray(alpha)] * 3, axis=2)[None]
    seen = show(network.view(torch.from_numpy(squares), aspect), IMAGENET_MEAN, IMAGENET_STD)
    return seen[..., 0] >= 128


def _examples(images: Tensor, attention: Tensor, ious: Tensor | None) -> list[list[Tile]]:
    pictures = show(images, IMAGENET_MEAN, IMAGENET_STD).cpu().numpy()
    tiles = []
    for row, pixels in enumerate(pictures):
        image = Image.fromarray(pixels)
        heads = [_relative(head) for head in attention[row]]
        words = ["" if ious is None else f"IoU {ious[row, head]:.2f}" for head in range(len(heads))]
        tiles.append(
            [
                Tile(image),
                *(Tile(overlay(image, head), said) for head, said in zip(heads, words, strict=True)),
            ]
        )
    return tiles


def _relative(head: Tensor) -> NDArray[np.float32]:
    """Attention from its least to its greatest value as 0..1."""
    low, high = head.amin(), head.amax()
    scaled: NDArray[np.float32] = ((head - low) / (high - low).clamp(min=1e-12)).cpu().numpy()
    return scaled
