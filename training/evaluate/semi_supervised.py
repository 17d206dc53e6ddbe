"""Few labels: what an encoder makes of 1% and 10% of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedserve.errors import InvalidField
from training.data import Source
from training.evaluate.drawing import chart
from training.evaluate.encoder import EvaluationEncoder, NetworkEncoder, require_network
from training.evaluate.finetune import FinetuneSettings, classify, fine_tune, starting_classifier
from training.evaluate.knn import NEIGHBOURS, TEMPERATURE, knn_accuracy, top_accuracy
from training.evaluate.labels import Task, labelled_task
from training.evaluate.probe import Heads, Standard, sweep
from training.evaluate.report import Progress, silent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SemiResult", "SemiSettings", "ShareResult", "Spread", "draw_labels", "evaluate_semi_supervised"]

Rows = NDArray[np.int64]

SHARES = (0.01, 0.1)
"""Shares of the labels that are kept, as in SimCLR's table 7 (Chen et al. 2020)."""
LEAST_STEPS = 500
"""Steps of the linear heads and of fine-tuning at least: few images make short epochs."""
BATCH = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class SemiSettings:
    """Settings of `semi_supervised`."""

    draws: int = 3
    """How often the labels are drawn anew; the figures are means over the draws."""
    epochs: int = 50
    """Passes of the linear heads over the labelled images, more where they are few."""
    finetune: bool = False
    """Train the whole network on the few labels as well."""
    finetune_epochs: int = 20
    """Passes of fine-tuning, more where the images are few."""
    holdout: float = 0.0
    """Share held out to be judged on, without a test part; 0 takes what training held out, else 0.1."""
    seed: int = 0
    """Of the first draw; the others follow."""

    def __post_init__(self) -> None:
        for name in ("draws", "epochs", "finetune_epochs"):
            if getattr(self, name) < 1:
                raise InvalidField(f"{name}={getattr(self, name)}; it must be at least 1.", param=name)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over several draws."""

    mean: float
    deviation: float
    """Sample standard deviation; 0 of a single draw."""
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), deviation, tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:.1%} ± {self.deviation:.1%}"


@dataclass(frozen=True, slots=True)
class ShareResult:
    """top-1 on the test images with a share of the labels."""

    share: float
    """Of the labels of each class; at least one is kept."""
    images: int
    """Labelled images of one draw."""
    knn: Spread
    linear: Spread
    finetune: Spread | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SemiResult:
    """Accuracies are shares of the test images, 0..1."""

    shares: tuple[ShareResult, ...]
    train: int
    """Images that labels are drawn from."""
    test: int
    """Images to be judged on."""
    classes: int
    draws: int
    skipped: int = 0
    """Images that could not be read."""

    def summary(self) -> str:
        """One or two lines for people."""
        lines = []
        for one in self.shares:
            tuned = "" if one.finetune is None else f", fine-tuned {one.finetune}"
            lines.append(
                f"{one.share:.0%} of labels ({one.images:,} images): linear {one.linear}, "
                f"k-NN {one.knn}{tuned}"
            )
        return "\n".join(lines)

    def picture(self) -> Image.Image:
        """Bars with their spread."""

        def draw(axes: Axes) -> None:
            kinds = [("k-NN", "knn"), ("linear", "linear"), ("fine-tuned", "finetune")]
            kinds = [(words, name) for words, name in kinds if getattr(self.shares[0], name) is not None]
            for place, (words, name) in enumerate(kinds):
                spreads = [getattr(one, name) for one in self.shares]
                places = np.arange(len(spreads)) + (place - (len(kinds) - 1) / 2) * 0.25
                means = [one.mean for one in spreads]
                deviations = [one.deviation for one in spreads]
                axes.bar(places, means, 0.22, yerr=deviations, capsize=4, label=words)
            names = [f"{one.share:.0%}\n{one.images:,} images" for one in self.shares]
            axes.set_xticks(np.arange(len(names)), names)
            axes.set(ylim=(0, 1), ylabel="top-1", title=f"few labels, {self.draws} draws")
            axes.legend(loc="upper left")

        return chart(draw)


def draw_labels(labels: Rows, share: float, seed: int) -> Rows:
    """Draws a share of each class, rounded, at least one image of it: ascending places in `labels`."""
    chance = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        drawn.append(chance.permutation(places)[: max(1, round(share * len(places)))])
    return np.sort(np.concatenate(drawn)).astype(np.int64)


def evaluate_semi_supervised(
    encoder: EvaluationEncoder, source: Source, settings: SemiSettings, progress: Progress = silent
) -> SemiResult:
    """k-NN and linear heads on frozen features, and fine-tuning if asked for, with few labels.

    Features are standardised by all training images, which needs no labels. Learning rates are chosen by
    cross-validation among the few labels alone.

    Raises:
        InvalidField: No labels, one class, nothing held out, or a bundle that is to be fine-tuned.
    """
    network = require_network(encoder, "finetune=true") if settings.finetune else None
    task = labelled_task(
        encoder, source, evaluation="semi_supervised", holdout=settings.holdout, progress=progress
    )
    standard = Standard.of(task.train)
    shares: list[ShareResult] = []
    total = len(SHARES) * settings.draws
    for share in SHARES:
        knn, linear, tuned, images = [], [], [], 0
        for draw in range(settings.draws):
            chosen = draw_labels(task.train_labels.cpu().numpy(), share, settings.seed + draw)
            images = len(chosen)
            head = _head(task, chosen, standard, settings, draw)
            linear.append(float(head.accuracy(standard(task.test), task.test_labels)))
            knn.append(_knn(task, chosen))
            if network is not None:
                tuned.append(_tuned(network, task, chosen, starting=(head, standard), settings=settings))
            progress(len(shares) * settings.draws + draw + 1, total)
        shares.append(
            ShareResult(share, images, Spread.of(knn), Spread.of(linear), Spread.of(tuned) if tuned else None)
        )
    return SemiResult(
        shares=tuple(shares),
        train=len(task.train),
        test=len(task.test),
        classes=task.classes,
        draws=settings.draws,
        skipped=len(task.embedded.skipped),
    )


def _head(task: Task, chosen: Rows, standard: Standard, settings: SemiSettings, draw: int) -> Heads:
    head, _, _ = sweep(
        standard(task.train[chosen]),
        task.train_labels[chosen],
        classes=task.classes,
        epochs=_epochs(settings.epochs, len(chosen), BATCH),
        batch_size=BATCH,
        seed=settings.seed + draw,
    )
    return head


def _knn(task: Task, chosen: Rows) -> float:
    return knn_accuracy(
        task.train[chosen],
        task.train_labels[chosen],
        task.test,
        task.test_labels,
        task.classes,
        # More neighbours than a class has would let the frequent classes win.
        k=max(1, min(NEIGHBOURS, len(chosen) // task.classes)),
        temperature=TEMPERATURE,
    )


def _tuned(
    network: NetworkEncoder,
    task: Task,
    chosen: Rows,
    *,
    starting: tuple[Heads, Standard],
    settings: SemiSettings,
) -> float:
    pixels = network.pixels(task.embedded.source)
    how = FinetuneSettings()
    how = replace(
        how, epochs=_epochs(settings.finetune_epochs, len(chosen), how.batch_size), seed=settings.seed
    )
    classifier = starting_classifier(network, *starting)
    fine_tune(classifier, pixels, task.train_rows[chosen], size=network.size, settings=how)
    return top_accuracy(classify(classifier, network, pixels, task.test_rows), task.test_labels)


def _epochs(wanted: int, images: int, batch_size: int) -> int:
    steps_per_epoch = max(1, images // batch_size)
    return max(wanted, -(-LEAST_STEPS // steps_per_epoch))
