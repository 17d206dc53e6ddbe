"""Fine-tuning: the whole network and a linear head, trained on labels from where self-supervision left it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training.augment import augment, draw, plan
from training.data import EpochOrder, Pixels, Source
from training.evaluate.drawing import bars, chart
from training.evaluate.encoder import EvaluationEncoder, require_network
from training.evaluate.knn import top_accuracy
from training.evaluate.labels import labelled_rows
from training.evaluate.network import NetworkEncoder
from training.evaluate.probe import Heads, Standard, sweep
from training.evaluate.report import PICTURE_ONLY, Progress, silent
from training.schedules import Now, cosine, warmup
from training.views import Augmentation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Classifier",
    "FinetuneResult",
    "FinetuneSettings",
    "classify",
    "evaluate_finetune",
    "fine_tune",
    "starting_classifier",
]

Rows = NDArray[np.int64]

PROBE_EPOCHS = 50
CLIP = 1.0
WARMUP = 0.1
"""Share of the training in which the learning rate rises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """Settings of `finetune`."""

    epochs: int = 20
    """Passes over the images to learn from."""
    batch_size: int = 128
    """Images of a step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9."""
    lr: float = 5e-4
    """Learning rate at the top of a warm-up and cosine; 0.01 suits sgd."""
    weight_decay: float = 0.05
    """For weights; biases and norms have none. 1e-4 suits sgd."""
    crop_min: float = 0.35
    """Least share of the image's area in a crop."""
    flip: float = 0.5
    """Probability of a mirror image; 0 where left and right differ."""
    holdout: float = 0.0
    """Share held out to be judged on, without a test part; 0 takes what training held out, else 0.1."""
    seed: int = 0
    """Of order and crops."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidField(f"{name}={getattr(self, name)}; it must be at least 1.", param=name)
        if not self.lr > 0:
            raise InvalidField(f"lr={self.lr} is not above 0.", param="lr")
        Augmentation(crop_min=self.crop_min, flip=self.flip)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """Accuracies are shares of the test images, 0..1."""

    before: float
    """top-1 of the linear probe that fine-tuning starts from: the frozen network."""
    top1: float
    """After the last epoch; no epoch is chosen by the test images."""
    top5: float | None
    """None with five classes or fewer."""
    losses: list[float]
    """Mean cross-entropy of each epoch, on the crops."""
    train: int
    """Images to learn from."""
    test: int
    """Images to be judged on."""
    classes: int
    skipped: int = 0
    """Images that could not be read."""
    per_class: dict[str, float] = field(metadata=PICTURE_ONLY)

    def summary(self) -> str:
        """One or two lines for people."""
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.1%}"
        return (
            f"fine-tuned top-1 {self.top1:.1%}{top5} (frozen, with a linear head: {self.before:.1%})\n"
            f"{self.test:,} test images, {self.train:,} to learn from, {self.classes} classes, "
            f"{len(self.losses)} epochs"
        )

    def picture(self) -> Image.Image:
        """The loss by epoch, and what is right by class."""
        ordered = sorted(self.per_class.items(), key=lambda item: item[1])

        def plot(left: Axes, right: Axes) -> None:
            left.plot(range(1, len(self.losses) + 1), self.losses, "o-")
            left.set(
                xlabel="epoch", ylabel="cross-entropy", title=f"top-1 {self.before:.1%} → {self.top1:.1%}"
            )
            left.grid(alpha=0.3)
            bars(right, [name for name, _ in ordered], [value for _, value in ordered], "right, by class")

        return chart(plot, panels=2, size=(6, 5))


class Classifier(nn.Module):
    """A network with a linear layer on its features: float [B, 3, H, W] → logits [B, classes]."""

    def __init__(self, network: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.network = network
        self.head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            self.head.weight.copy_(weight)
            self.head.bias.copy_(bias)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.network(images))
        return logits


def starting_classifier(network: NetworkEncoder, heads: Heads, standard: Standard) -> Classifier:
    """A trainable copy of a network with the first of some linear heads on it.

    Starting from a trained head instead of a random one keeps the first steps from spoiling the features
    (Kumar et al. 2022). The head's standardisation W·((x - mean) · scale) + b becomes part of its weights.
    """
    weight = heads.weight[0] * standard.scale
    bias = heads.bias[0] - weight @ standard.mean
    copied = copy.deepcopy(network.module)
    copied.requires_grad_(True)  # a momentum encoder's have none
    return Classifier(copied, weight, bias)


def fine_tune(
    classifier: Classifier,
    pixels: Pixels,
    rows: Rows,
    *,
    size: int,
    settings: FinetuneSettings,
    progress: Progress = silent,
) -> list[float]:
    """Trains a classifier in place on random crops and flips; it is left in evaluation mode.

    Args:
        classifier: On the device of `pixels`.
        pixels: All images.
        rows: int64 [n]: those to learn from, with labels.
        size: Pixels of a side of the crops.
        settings: How.
        progress: Called with (steps done, steps).

    Returns:
        The mean loss of each epoch.

    Raises:
        InvalidField: The loss is no longer a number.
    """
    device = pixels.device
    order = EpochOrder(len(rows), min(settings.batch_size, len(rows)), settings.seed)
    steps = settings.epochs * order.steps_per_epoch
    view = Augmentation(
        crop_min=settings.crop_min,
        flip=settings.flip,
        **dict.fromkeys(("brightness", "contrast", "saturation", "hue", "jitter", "grayscale", "blur"), 0.0),
    ).view(size)
    optimizer = _optimizer(classifier, settings)
    rate = warmup(WARMUP * settings.epochs, cosine(settings.lr, 0.0))
    generator = torch.Generator().manual_seed(settings.seed)
    labels = torch.from_numpy(pixels.source.labels)
    losses: list[Tensor] = []
    classifier.train()
    batches = pixels.prefetch(rows[order.rows(step)] for step in range(steps))
    for step, batch in enumerate(batches):
        chosen = rows[order.rows(step)]
        parameters = draw(view, torch.from_numpy(pixels.aspect[chosen]), generator)
        images = augment(batch, plan(view, parameters, stored_size=pixels.size, device=batch.device))
        for group in optimizer.param_groups:
            group["lr"] = rate(Now(step, steps, order.steps_per_epoch))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = classifier(images)
        loss = F.cross_entropy(logits.float(), labels[chosen].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(classifier.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.detach())
        progress(step + 1, steps)
    classifier.eval()
    by_epoch = torch.stack(losses).view(settings.epochs, -1).double().mean(1)
    if not by_epoch.isfinite().all():
        raise InvalidField(
            f"Fine-tuning diverged with lr={settings.lr:g}: the loss is no longer a number. Try a tenth.",
            param="lr",
        )
    return by_epoch.tolist()


@torch.no_grad()
def classify(classifier: Classifier, network: NetworkEncoder, pixels: Pixels, rows: Rows) -> Tensor:
    """Probabilities of the evaluation views of some images, float32 [n, classes]."""
    return torch.cat([classifier(images).float().softmax(1) for images in network.batches(pixels, rows)])


def _optimizer(classifier: Classifier, settings: FinetuneSettings) -> torch.optim.Optimizer:
    weights = [one for one in classifier.parameters() if one.ndim > 1]
    others = [one for one in classifier.parameters() if one.ndim <= 1]
    groups = [
        {"params": weights, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=settings.lr)


def evaluate_finetune(
    encoder: EvaluationEncoder, source: Source, settings: FinetuneSettings, progress: Progress = silent
) -> FinetuneResult:
    """Linear probe, then fine-tuning from it, both judged on the same images.

    Raises:
        InvalidField: The encoder is a bundle; no labels, one class, nothing held out; the loss diverged.
    """
    network = require_network(encoder, "finetune")
    labelled_rows(source, encoder, evaluation="finetune", holdout=settings.holdout)
    pixels = network.pixels(source, progress)
    source = pixels.source
    train, test = labelled_rows(source, encoder, evaluation="finetune", holdout=settings.holdout)
    labels = torch.from_numpy(source.labels).to(network.device)
    features = network.embed_pixels(pixels, progress=progress)
    standard = Standard.of(features[train])
    classes = len(source.class_names)
    head, _, _ = sweep(
        standard(features[train]),
        labels[train],
        classes=classes,
        epochs=PROBE_EPOCHS,
        batch_size=256,
        seed=settings.seed,
        progress=progress,
    )
    classifier = starting_classifier(network, head, standard)
    losses = fine_tune(classifier, pixels, train, size=network.size, settings=settings, progress=progress)
    scores = classify(classifier, network, pixels, test)
    right = (scores.argmax(1) == labels[test]).cpu().numpy()
    return FinetuneResult(
        before=float(head.accuracy(standard(features[test]), labels[test])),
        top1=float(right.mean()),
        top5=top_accuracy(scores, labels[test], 5) if classes > 5 else None,
        losses=losses,
        train=len(train),
        test=len(test),
        classes=classes,
        skipped=len(pixels.skipped),
        per_class=dict(_per_class(right, source.labels[test], source.class_names)),
    )


def _per_class(right: NDArray[np.bool_], labels: Rows, names: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for label in np.unique(labels):
        yield names[label], float(right[labels == label].mean())
