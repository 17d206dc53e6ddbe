"""Linear probing: how well one linear layer on frozen features tells the classes apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from training.data import Source
from training.evaluate.drawing import bars, chart
from training.evaluate.encoder import EvaluationEncoder
from training.evaluate.knn import top_accuracy
from training.evaluate.labels import labelled_task
from training.evaluate.probe import Standard, Trial, sweep
from training.evaluate.report import Progress, silent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LinearResult", "LinearSettings", "draw_trials", "evaluate_linear"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSettings:
    """Settings of `linear`. Learning rate and weight decay are swept, and chosen without the test images."""

    epochs: int = 50
    """Passes over the features to learn from."""
    batch_size: int = 256
    """Images of a step."""
    holdout: float = 0.0
    """Share held out to be judged on, without a test part; 0 takes what training held out, else 0.1."""
    seed: int = 0
    """Of the order of the images, and of which are held out for choosing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearResult:
    """Accuracies are shares of the test images, 0..1."""

    top1: float
    top5: float | None
    """None with five classes or fewer."""
    per_class: dict[str, float]
    """top1 among the test images of each class that has any."""
    rate: float
    """The learning rate that was chosen."""
    decay: float
    """The weight decay that was chosen."""
    trials: tuple[Trial, ...]
    """Everything that was tried, with the accuracy on held-out training images."""
    train: int
    """Images to learn from."""
    test: int
    """Images to be judged on."""
    classes: int
    skipped: int = 0
    """Images that could not be read."""

    def summary(self) -> str:
        """One or two lines for people."""
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.1%}"
        return (
            f"linear top-1 {self.top1:.1%}{top5}: {self.test:,} test images, {self.train:,} to learn from, "
            f"{self.classes} classes\nlearning rate {self.rate:g} and weight decay {self.decay:g} of "
            f"{len(self.trials)} settings, chosen on held-out training images"
        )

    def picture(self) -> Image.Image:
        """Accuracy by learning rate, and by class."""
        ordered = sorted(self.per_class.items(), key=lambda item: item[1])

        def draw(left: Axes, right: Axes) -> None:
            draw_trials(left, self.trials)
            bars(right, [name for name, _ in ordered], [value for _, value in ordered], "right, by class")

        return chart(draw, panels=2, size=(6, 6))


def draw_trials(axes: Axes, trials: Sequence[Trial]) -> None:
    """Accuracy over the learning rate, a line for each weight decay."""
    for decay in sorted({trial.decay for trial in trials}):
        line = [trial for trial in trials if trial.decay == decay]
        rates = [trial.rate for trial in line]
        axes.plot(
            rates,
            [np.nan if one.accuracy is None else one.accuracy for one in line],
            "o-",
            label=f"{decay:g}",
        )
    axes.set(xscale="log", xlabel="learning rate", ylabel="accuracy on held-out training images")
    axes.legend(title="weight decay")
    axes.grid(alpha=0.3)


def evaluate_linear(
    encoder: EvaluationEncoder, source: Source, settings: LinearSettings, progress: Progress = silent
) -> LinearResult:
    """Trains linear heads on frozen, standardised features of clean images (no augmentation).

    Raises:
        InvalidField: No labels, one class, nothing held out, or settings that make no sense.
    """
    task = labelled_task(encoder, source, evaluation="linear", holdout=settings.holdout, progress=progress)
    standard = Standard.of(task.train)
    head, trials, best = sweep(
        standard(task.train),
        task.train_labels,
        classes=task.classes,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )
    test = standard(task.test)
    right = head.right(test, task.test_labels)[:, 0].cpu().numpy()
    labels = task.test_labels.cpu().numpy()
    top5 = top_accuracy(head.scores(test)[:, 0].softmax(1), task.test_labels, 5) if task.classes > 5 else None
    return LinearResult(
        top1=float(right.mean()),
        top5=top5,
        per_class={task.class_names[one]: float(right[labels == one].mean()) for one in np.unique(labels)},
        rate=best.rate,
        decay=best.decay,
        trials=tuple(trials),
        train=len(task.train),
        test=len(task.test),
        classes=task.classes,
        skipped=len(task.embedded.skipped),
    )
