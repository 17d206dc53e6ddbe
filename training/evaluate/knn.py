"""Classification by the nearest neighbours: the quickest measure of an encoder, and the training's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from embedserve.errors import InvalidField
from training.data import Source
from training.evaluate.drawing import bars, chart, heatmap
from training.evaluate.encoder import EvaluationEncoder, baselines
from training.evaluate.labels import Task, labelled_task
from training.evaluate.report import PICTURE_ONLY, Progress, silent
from training.precision import full_precision

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["KnnResult", "KnnSettings", "evaluate_knn", "knn_accuracy", "knn_votes", "top_accuracy"]

CHUNK = 2**25
"""Similarities held at once: 128 MB of float32."""
NEIGHBOURS, TEMPERATURE = 20, 0.07


@full_precision
@torch.no_grad()
def knn_votes(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, *, classes: int, k: int, temperature: float
) -> tuple[Tensor, Tensor]:
    """What the k nearest images of a bank say about each query (Wu et al. 2018, section 3.4).

    A neighbour with cosine c votes for its class with weight exp(c / temperature).

    Args:
        bank: [n, dim], of any length; normalised here.
        bank_labels: int64 [n], 0..classes-1.
        queries: [m, dim], on the bank's device.
        classes: Number of classes.
        k: Neighbours that vote; at most n of them.
        temperature: The lower, the more the nearest count.

    Returns:
        float32 [m, classes] twice: the weighted votes of each query as shares that sum to 1, and plain counts
        where half of the weighted share breaks ties.

    Raises:
        InvalidField: The bank is empty, or k or the temperature is not positive.
    """
    if not len(bank):
        raise InvalidField("The bank of the nearest-neighbour vote is empty; it needs labelled images.")
    if k < 1:
        raise InvalidField(f"k={k} neighbours cannot vote; use 1 or more.", param="k")
    if not temperature > 0:
        raise InvalidField(f"temperature={temperature} is not above 0.", param="temperature")
    bank, queries = F.normalize(bank.float(), dim=1), F.normalize(queries.float(), dim=1)
    weighted = queries.new_zeros(len(queries), classes)
    counts = torch.zeros_like(weighted)
    step = max(1, CHUNK // len(bank))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        cosines, nearest = (queries[rows] @ bank.T).topk(min(k, len(bank)), dim=1)
        labels = bank_labels[nearest]
        # A common factor in a row changes no share: without the best, exp() cannot overflow.
        weights = ((cosines - cosines[:, :1]) / temperature).exp()
        weighted[rows].scatter_add_(1, labels, weights / weights.sum(1, keepdim=True))
        counts[rows].scatter_add_(1, labels, torch.ones_like(weights))
    return weighted, counts + weighted / 2


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    classes: int,
    *,
    k: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> float:
    """Share of queries whose weighted vote is right, 0..1. Arguments as `knn_votes`; `labels` is int64 [m].

    Raises:
        InvalidField: As `knn_votes`, or there is no query.
    """
    if not len(queries):
        raise InvalidField("There is no image to classify by its neighbours; hold some out.", param="holdout")
    votes, _ = knn_votes(bank, bank_labels, queries, classes=classes, k=k, temperature=temperature)
    return top_accuracy(votes, labels)


def top_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Share of rows whose label is among the k best classes, 0..1.

    Args:
        scores: [m, classes]. A class that no neighbour voted for (score 0 in `knn_votes`) is never right.
        labels: int64 [m].
        k: At most `classes`.
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    right = (best.indices == labels[:, None]) & (best.values != 0)
    return float(right.any(1).double().mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnSettings:
    """Settings of `knn`."""

    k: int = NEIGHBOURS
    """Neighbours that vote; at most half of the images to learn from."""
    temperature: float = TEMPERATURE
    """A neighbour with cosine c counts exp(c / temperature)."""
    holdout: float = 0.0
    """Share held out to be judged on, without a test part; 0 takes what training held out, else 0.1."""
    baseline: bool = False
    """Measure raw pixels and a network with random weights as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnnResult:
    """Accuracies are shares of the test images, 0..1."""

    top1: float
    """Of the weighted vote."""
    top5: float | None
    """None with five classes or fewer."""
    plain_top1: float
    """Every neighbour counts the same."""
    k: int
    """Neighbours that voted."""
    train: int
    """Images to learn from."""
    test: int
    """Images to be judged on."""
    classes: int
    chance: float
    """Accuracy of always naming the class that is most frequent among the images to learn from."""
    baselines: dict[str, float] = field(default_factory=dict)
    """top1 of what the encoder is compared with."""
    skipped: int = 0
    """Images that could not be read."""
    confusion: NDArray[np.int64] = field(metadata=PICTURE_ONLY)
    """[classes, classes]: test images by true class (rows) and named class."""
    class_names: tuple[str, ...] = field(metadata=PICTURE_ONLY)

    def summary(self) -> str:
        """One or two lines for people."""
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.1%}"
        others = "".join(f"\n{name}: top-1 {value:.1%}" for name, value in self.baselines.items())
        return (
            f"k-NN top-1 {self.top1:.1%}{top5} (plain vote {self.plain_top1:.1%}; most frequent class "
            f"{self.chance:.1%}): {self.test:,} test images, {self.train:,} to learn from, "
            f"{self.classes} classes, k={self.k}{others}"
        )

    def picture(self) -> Image.Image:
        """The confusion matrix, and the share that is right of each class."""
        per_class = np.diag(self.confusion) / np.maximum(self.confusion.sum(1), 1)
        seen = np.flatnonzero(self.confusion.sum(1))
        seen = seen[np.argsort(per_class[seen], kind="stable")]

        def draw(left: Axes, right: Axes) -> None:
            heatmap(left, self.confusion.astype(float), self.class_names, "k-NN: true and named class")
            bars(right, [self.class_names[one] for one in seen], per_class[seen].tolist(), "right, by class")

        return chart(draw, panels=2, size=(6, 6))


def evaluate_knn(
    encoder: EvaluationEncoder, source: Source, settings: KnnSettings, progress: Progress = silent
) -> KnnResult:
    """Weighted k-NN of held-out images among labelled ones.

    Raises:
        InvalidField: No labels, one class, nothing held out, or settings that make no sense.
    """
    task = labelled_task(encoder, source, evaluation="knn", holdout=settings.holdout, progress=progress)
    k = min(settings.k, max(1, len(task.train) // 2))
    votes, counts = knn_votes(
        task.train,
        task.train_labels,
        task.test,
        classes=task.classes,
        k=k,
        temperature=settings.temperature,
    )
    confusion = torch.bincount(
        task.test_labels * task.classes + votes.argmax(1), minlength=task.classes**2
    ).view(task.classes, task.classes)
    frequent = int(torch.bincount(task.train_labels).argmax())
    return KnnResult(
        top1=top_accuracy(votes, task.test_labels),
        top5=top_accuracy(votes, task.test_labels, 5) if task.classes > 5 else None,
        plain_top1=top_accuracy(counts, task.test_labels),
        k=k,
        train=len(task.train),
        test=len(task.test),
        classes=task.classes,
        chance=float((task.test_labels == frequent).double().mean()),
        baselines=_baselines(encoder, source, settings, k, progress) if settings.baseline else {},
        skipped=len(task.embedded.skipped),
        confusion=confusion.cpu().numpy(),
        class_names=task.class_names,
    )


def _baselines(
    encoder: EvaluationEncoder, source: Source, settings: KnnSettings, k: int, progress: Progress
) -> dict[str, float]:
    found = {}
    for other in baselines(encoder):
        task = labelled_task(other, source, evaluation="knn", holdout=settings.holdout, progress=progress)
        found[other.name] = _top1(task, k, settings.temperature)
    return found


def _top1(task: Task, k: int, temperature: float) -> float:
    return knn_accuracy(
        task.train,
        task.train_labels,
        task.test,
        task.test_labels,
        task.classes,
        k=k,
        temperature=temperature,
    )
