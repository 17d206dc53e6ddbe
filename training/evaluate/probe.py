"""Linear classifiers on frozen features, many of them trained at once.

All heads see the same batches, so that a sweep costs two matrix products for each step: the features are read
once, whatever the number of settings that are tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from torch import Tensor

from embedserve.errors import InvalidField
from training.evaluate.report import Progress, silent
from training.precision import full_precision

__all__ = ["DECAYS", "RATES", "Heads", "Standard", "Trial", "assign_folds", "sweep", "train_heads"]

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
DECAYS = (0.0, 1e-3, 1e-2, 1e-1, 1.0)
"""What a sweep tries, each rate with each decay: few labels want much decay, many want none."""
MANY = 10_000
"""Rows from which a held-out tenth tells settings apart; below, every fifth is held out in turn."""
USUAL = (0.03, 1e-2)
"""Rate and decay where there are too few labels to choose by."""
MOMENTUM = 0.9
CHUNK = 2**25
"""Scores held at once: 128 MB of float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Standard:
    """Shift and scale that give each feature mean 0 and variance 1 on some images.

    This is a batch norm without scale and shift of its own whose statistics are exact: what linear probing of
    ViTs puts before the head (He et al. 2022, appendix A.1), and learning rates then fit every encoder.
    """

    mean: Tensor
    scale: Tensor
    """1 ÷ standard deviation; 0 for a feature that never changes."""

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """From [n, dim]."""
        variance, mean = torch.var_mean(features.double(), dim=0, correction=0)
        deviation = variance.sqrt()
        alive = deviation > 1e-6 * deviation.max()
        scale = torch.where(alive, 1 / deviation, torch.zeros_like(deviation))
        return cls(mean.float(), scale.float())

    def __call__(self, features: Tensor) -> Tensor:
        """float32 [n, dim]."""
        return (features - self.mean) * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class Heads:
    """S linear classifiers of the same features."""

    weight: Tensor
    """float32 [S, classes, dim]."""
    bias: Tensor
    """float32 [S, classes]."""

    @full_precision
    def scores(self, features: Tensor) -> Tensor:
        """[n, dim] → float32 [n, S, classes]."""
        settings, classes, dim = self.weight.shape
        flat = torch.addmm(self.bias.view(-1), features, self.weight.view(-1, dim).T)
        return flat.view(-1, settings, classes)

    def accuracy(self, features: Tensor, labels: Tensor) -> Tensor:
        """Share of rows that each head names right, float64 [S]. A head that diverged is never right."""
        return self.right(features, labels).double().mean(0)

    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """Which rows each head names right, bool [n, S]."""
        step = max(1, CHUNK // self.bias.numel())
        right = torch.empty(len(labels), len(self.bias), dtype=torch.bool, device=labels.device)
        for start in range(0, len(labels), step):
            rows = slice(start, start + step)
            scores = self.scores(features[rows])
            right[rows] = (scores.argmax(2) == labels[rows, None]) & scores.isfinite().all(2)
        return right


@full_precision
@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    rates: Sequence[float],
    decays: Sequence[float],
    epochs: int,
    batch_size: int,
    seed: int,
    included: Tensor | None = None,
    progress: Progress = silent,
) -> Heads:
    """Trains S heads by cross-entropy: SGD with momentum 0.9, a cosine to 0, no decay of the bias.

    Args:
        features: float32 [n, dim], standardised.
        labels: int64 [n].
        classes: Number of classes.
        rates, decays: Learning rate and weight decay of each of the S heads, at the start of the cosine.
        epochs: Passes over the rows.
        batch_size: Rows of a step.
        seed: Of the order of the rows, which is the same for all heads.
        included: bool [n, S]: rows that a head learns from; all by default. (Cross-validation trains the
            heads of all folds at once.)
        progress: Called with (steps done, steps).

    Raises:
        InvalidField: epochs or batch_size is below 1.
    """
    if epochs < 1 or batch_size < 1:
        raise InvalidField(f"epochs={epochs} and batch_size={batch_size} must be at least 1.", param="epochs")
    (n, dim), heads, device = features.shape, len(rates), features.device
    weight, bias = (
        torch.zeros(heads * classes, dim, device=device),
        torch.zeros(heads * classes, device=device),
    )
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    rate = torch.tensor(rates, device=device).repeat_interleave(classes)
    decay = torch.tensor(decays, device=device).repeat_interleave(classes)[:, None]
    target = torch.nn.functional.one_hot(labels, classes).float()[:, None]
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * math.ceil(n / batch_size), 0
    for _ in range(epochs):
        order = torch.randperm(n, generator=generator).to(device)
        for start in range(0, n, batch_size):
            rows = order[start : start + batch_size]
            batch = features[rows]
            logits = torch.addmm(bias, batch, weight.T).view(-1, heads, classes)
            slope = logits.softmax(2).sub_(target[rows])  # of the cross-entropy, with respect to the logits
            if included is None:
                slope /= len(rows)
            else:
                counts = included[rows].float()
                slope *= (counts / counts.sum(0).clamp(min=1))[:, :, None]
            slope = slope.view(-1, heads * classes)
            weight_speed.mul_(MOMENTUM).addmm_(slope.T, batch).addcmul_(weight, decay)
            bias_speed.mul_(MOMENTUM).add_(slope.sum(0))
            now = rate * (1 + math.cos(math.pi * step / steps)) / 2
            weight.sub_(weight_speed * now[:, None])
            bias.sub_(bias_speed * now)
            step += 1
            progress(step, steps)
    return Heads(weight.view(heads, classes, dim), bias.view(heads, classes))


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting of a sweep."""

    rate: float
    decay: float
    accuracy: float | None
    """Share of held-out training images that it names right; None where none could be held out."""


def assign_folds(labels: Tensor, folds: int, seed: int) -> Tensor:
    """Deals the rows of each class out over folds: int64 [n] on the CPU, 0..folds-1.

    -1 for the rows of a class with a single row: it is always learned from. A class of fewer rows than folds
    fills as many folds as it has rows; which, is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    fold = torch.empty_like(labels)
    for label in range(int(labels.max()) + 1):
        rows = (labels == label).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)]
        first = int(torch.randint(folds, (), generator=generator))
        fold[rows] = (first + torch.arange(len(rows))) % folds if len(rows) > 1 else -1
    return fold


def sweep(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    epochs: int,
    batch_size: int,
    seed: int,
    fold: Tensor | None = None,
    progress: Progress = silent,
) -> tuple[Heads, list[Trial], Trial]:
    """Chooses rate and decay on held-out rows, then trains one head with them on all rows.

    From `MANY` rows on a tenth is held out for choosing. With fewer it is cross-validation in five folds,
    whose heads are all trained at once.

    Args:
        features, labels, classes, epochs, batch_size, seed: As in `train_heads`.
        fold: int64 [n] with parts 0..4: cross-validation in these folds instead. Rows of one image belong
            into one fold.
        progress: Called with (steps done, steps), for the sweep and then for the last head.

    Returns:
        The one head, all trials, and the chosen one: the most accurate, and of equals the strongest decay.
    """
    settings = [(rate, decay) for rate in RATES for decay in DECAYS]
    folds, used = (10, 1) if len(labels) >= MANY and fold is None else (5, 5)
    fold = (assign_folds(labels, folds, seed) if fold is None else fold).to(labels.device)
    held = [part for part in range(used) if bool((fold == part).any())]
    train = partial(
        train_heads,
        features,
        labels,
        classes=classes,
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    if held:
        included = torch.cat([(fold != part)[:, None].expand(-1, len(settings)) for part in held], dim=1)
        heads = train(
            rates=[rate for rate, _ in settings] * len(held),
            decays=[decay for _, decay in settings] * len(held),
            included=included,
        )
        right = heads.right(features, labels) & ~included
        found = right.view(len(labels), len(held), -1).sum((0, 1)) / (~included[:, :: len(settings)]).sum()
        trials = [Trial(rate, decay, float(one)) for (rate, decay), one in zip(settings, found, strict=True)]
        best = max(trials, key=lambda trial: (trial.accuracy or 0.0, trial.decay))
    else:
        best = Trial(*USUAL, None)
        trials = [best]
    return train(rates=[best.rate], decays=[best.decay]), trials, best
