"""What patch features know: where an object is, and which object it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from embedserve.errors import InvalidField
from training.data import Source
from training.evaluate.drawing import Tile, grid, overlay
from training.evaluate.encoder import EvaluationEncoder, require_network
from training.evaluate.network import NetworkEncoder
from training.evaluate.probe import Heads, Standard, sweep
from training.evaluate.report import PICTURE_ONLY, Progress, silent
from training.evaluate.scenes import Cutouts, Scene, find_cutouts, make_scene, read_cutout
from training.precision import full_precision

__all__ = ["DenseResult", "DenseSettings", "evaluate_dense", "find_objects", "intersection_over_union"]

LEAST_OBJECTS = 10
FOLDS = 5
TEST = 0.3
"""Share of the objects that the segmentation is judged on."""
EXAMPLES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseSettings:
    """Settings of `dense`."""

    objects: int = 300
    """Objects that scenes are made of, drawn from the images with transparency."""
    epochs: int = 20
    """Passes over the patches to learn from."""
    seed: int = 0
    """Of the draw, the scenes and the order of training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseResult:
    """Shares 0..1."""

    iou: float
    """Mean over test scenes: intersection over union of the predicted and the true mask, in pixels."""
    iou_of_colours: float
    """The same with each patch's mean and spread of red, green and blue instead of features."""
    recall_at_1: float
    """Share of objects whose patches lead to the scene with the same object, among all scenes."""
    recall_at_5: float
    pooled_recall_at_1: float
    """The same with one vector for each whole scene: what patches have to beat."""
    pointing: float
    """Share of scenes whose best patch lies on the object."""
    patches: tuple[int, int]
    """Rows and columns of the patch map."""
    objects: int
    """Scenes that are searched."""
    train: int
    """Scenes that the segmentation learns from."""
    test: int
    """Scenes with other objects that it is judged on."""
    examples: list[list[Tile]] = field(metadata=PICTURE_ONLY)

    def summary(self) -> str:
        """One or two lines for people."""
        return (
            f"segmentation IoU {self.iou:.1%} (colours alone {self.iou_of_colours:.1%}), {self.test} scenes "
            f"of unseen objects, {self.patches[0]}×{self.patches[1]} patches\n"
            f"the same object on another ground, among {self.objects}: recall@1 {self.recall_at_1:.1%}, "
            f"@5 {self.recall_at_5:.1%} by patches, @1 {self.pooled_recall_at_1:.1%} by whole images; "
            f"the best patch is on the object in {self.pointing:.1%}"
        )

    def picture(self) -> Image.Image:
        """Test scenes with their true and their predicted masks."""
        return grid(self.examples, side=128, columns=("scene", "true mask", "predicted mask"))


def evaluate_dense(
    encoder: EvaluationEncoder, source: Source, settings: DenseSettings, progress: Progress = silent
) -> DenseResult:
    """Segmentation of pasted objects, and finding them again, from patch features.

    Every object is pasted into two scenes of different grounds, places and sizes. A linear layer learns
    foreground from the first scenes of 70% of the objects and is judged on the second scenes of the others.
    An object's mean patch feature in its first scene is compared with all patches of all second scenes.

    Raises:
        InvalidField: The encoder is a bundle or has a patch map below 2×2, or there are too few masks.
    """
    network = require_network(encoder, "dense")
    cutouts = find_cutouts(
        source, most=settings.objects, least=LEAST_OBJECTS, seed=settings.seed, evaluation="dense"
    )
    count = len(cutouts.rows)
    first, second = (_Seen(network, cutouts, settings.seed, turn) for turn in (0, 1))
    progress(2 * count, 2 * count)
    rows, columns = first.patches.shape[2:]
    if min(rows, columns) < 2:
        raise InvalidField(
            f"'{network.name}' has a patch map of {rows}×{columns} at {network.size} pixels, which has no "
            "places to tell apart; evaluate an encoder with larger images or a smaller patch.",
            param="path",
        )
    train = count - round(TEST * count)
    segment = partial(_segment, covered=first.covered[:train], masks=second.masks[:train])
    predicted = segment(first.patches, second.patches, settings=settings, progress=progress)
    colours = segment(first.colours, second.colours, settings=settings, progress=progress)
    truth = second.masks[train:]
    ious = intersection_over_union(predicted > 0, truth >= 0.5)
    place, on_object = find_objects(first, second)
    by_whole = F.normalize(first.pooled, dim=1) @ F.normalize(second.pooled, dim=1).T
    return DenseResult(
        iou=float(ious.mean()),
        iou_of_colours=float(intersection_over_union(colours > 0, truth >= 0.5).mean()),
        recall_at_1=float((place < 1).double().mean()),
        recall_at_5=float((place < 5).double().mean()),
        pooled_recall_at_1=float((_rank_of_own(by_whole) < 1).double().mean()),
        pointing=float(on_object.double().mean()),
        patches=(rows, columns),
        objects=count,
        train=train,
        test=count - train,
        examples=[
            _example(scene, score, float(iou))
            for scene, score, iou in list(zip(second.scenes[train:], predicted, ious, strict=True))[:EXAMPLES]
        ],
    )


class _Seen:
    """One scene for each object, and what the encoder makes of it."""

    def __init__(self, network: NetworkEncoder, cutouts: Cutouts, seed: int, turn: int) -> None:
        self.scenes: list[Scene] = []
        for row in cutouts.rows.tolist():
            cutout = read_cutout(cutouts.source, row)
            if cutout is None:
                raise InvalidField(f"'{cutouts.source.keys[row]}' changed while it was read.", param="data")
            self.scenes.append(make_scene(cutout, network.size, np.random.default_rng((seed, row, turn))))
        pooled, patches, colours = [], [], []
        for start in range(0, len(self.scenes), network.batch):
            part = self.scenes[start : start + network.batch]
            pixels = torch.from_numpy(np.stack([scene.pixels for scene in part]))
            whole, map_ = network.patches(network.view(pixels, torch.ones(len(part))))
            pooled.append(whole)
            patches.append(map_)
            colours.append(_colours(pixels.to(network.device), map_.shape[2], map_.shape[3]))
        self.pooled, self.patches, self.colours = torch.cat(pooled), torch.cat(patches), torch.cat(colours)
        self.masks = torch.from_numpy(np.stack([scene.mask for scene in self.scenes])).to(network.device)
        """float32 [n, size, size]."""

    @property
    def covered(self) -> Tensor:
        """How much of each patch the object covers, [n, h, w]."""
        rows, columns = self.patches.shape[2:]
        return F.adaptive_avg_pool2d(self.masks[:, None], (rows, columns))[:, 0]


def _colours(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """Mean and standard deviation of the channels in each patch: [B, 6, h, w]."""
    values = pixels.permute(0, 3, 1, 2).float() / 255
    mean = F.adaptive_avg_pool2d(values, (rows, columns))
    square = F.adaptive_avg_pool2d(values.square(), (rows, columns))
    return torch.cat((mean, (square - mean.square()).clamp(min=0).sqrt()), dim=1)


def _segment(
    learned: Tensor,
    judged: Tensor,
    *,
    covered: Tensor,
    masks: Tensor,
    settings: DenseSettings,
    progress: Progress,
) -> Tensor:
    """Learns foreground from the scenes of the first t objects, and predicts it for the others.

    Args:
        learned, judged: [n, C, h, w], of the first and the second scenes.
        covered: [t, h, w]: how much of each patch of the first scenes is object.
        masks: [t, size, size]: the true masks of the second scenes.

    Returns:
        [n - t, size, size], of the second scenes: above 0 where the object is predicted.
    """
    train, size = len(covered), masks.shape[-1]
    rows = learned[:train].permute(0, 2, 3, 1).flatten(0, 2)
    standard = Standard.of(rows)
    labels = (covered >= 0.5).long()
    fold = (torch.arange(train) % FOLDS)[:, None, None].expand(labels.shape)
    head, _, _ = sweep(
        standard(rows),
        labels.flatten(),
        classes=2,
        epochs=settings.epochs,
        batch_size=1024,
        seed=settings.seed,
        fold=fold.flatten(),
        progress=progress,
    )
    # Most patches are ground, so the most accurate head finds too little. The level above which it is object
    # is the best one for the second scenes of the objects that were learned from.
    scores = _foreground(head, standard, judged[:train], size)
    share = torch.linspace(0.3, 0.99, 70, device=scores.device)
    levels = scores.flatten()[:: max(1, scores.numel() // 100_000)].quantile(share)
    ious = [intersection_over_union(scores > level, masks >= 0.5).mean() for level in levels]
    return _foreground(head, standard, judged[train:], size) - levels[int(torch.stack(ious).argmax())]


def _foreground(head: Heads, standard: Standard, features: Tensor, size: int) -> Tensor:
    maps = features.permute(0, 2, 3, 1)
    scores = head.scores(standard(maps.flatten(0, 2)))[:, 0].view(*maps.shape[:3], 2)
    difference = (scores[..., 1] - scores[..., 0])[:, None]
    return F.interpolate(difference, (size, size), mode="bilinear", align_corners=False)[:, 0]


def intersection_over_union(predicted: Tensor, true: Tensor) -> Tensor:
    """Of bool masks [n, H, W]: float64 [n]; 1 where both are empty."""
    both = (predicted & true).sum((1, 2)).double()
    either = (predicted | true).sum((1, 2)).double()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


@full_precision
def find_objects(first: _Seen, second: _Seen) -> tuple[Tensor, Tensor]:
    """Looks for each object's mean patch feature among the patches of all second scenes.

    A scene's score is the best cosine among its patches.

    Returns:
        int64 [n]: how many scenes score higher than the object's own. bool [n]: whether the best patch of its
        own scene lies on the object.
    """
    weights = first.covered[:, None]
    queries = F.normalize((F.normalize(first.patches, dim=1) * weights).sum((2, 3)), dim=1)
    places = F.normalize(second.patches, dim=1).flatten(2)
    best = torch.stack([(queries @ one).amax(1) for one in places], dim=1)
    own = torch.einsum("nc,ncp->np", queries, places).argmax(1)
    on_object = second.covered.flatten(1).gather(1, own[:, None])[:, 0] >= 0.5
    return _rank_of_own(best), on_object


def _rank_of_own(scores: Tensor) -> Tensor:
    """How many columns of a row score higher than the one on the diagonal: int64 [n]."""
    return (scores > scores.diagonal()[:, None] + 1e-6).sum(1)


def _example(scene: Scene, score: Tensor, iou: float) -> list[Tile]:
    image = Image.fromarray(scene.pixels)
    predicted = (score > 0).float().cpu().numpy()
    return [Tile(image), Tile(overlay(image, scene.mask)), Tile(overlay(image, predicted), f"IoU {iou:.2f}")]
