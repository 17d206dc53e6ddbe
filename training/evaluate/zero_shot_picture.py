"""The picture of a zero-shot classification: what is taken for what, and whether confidence is earned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.evaluate.calibration import Bin
from training.evaluate.drawing import bars, chart, heatmap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MOST_CLASSES", "worst_classes", "zero_shot_picture"]

MOST_CLASSES = 30
"""Classes that are drawn, those of least recall; the rest becomes one row and one column."""
OTHERS = "(others)"

Counts = NDArray[np.int64]


def worst_classes(confusion: Counts, names: Sequence[str]) -> tuple[Counts, list[str]]:
    """At most `MOST_CLASSES` rows and columns of a confusion matrix, those with the least recall.

    What the others were and were named is added up in a last row and column, so that no image is lost.
    """
    images = confusion.sum(1)
    seen = np.flatnonzero(images + confusion.sum(0))
    if len(seen) <= MOST_CLASSES:
        return confusion[np.ix_(seen, seen)], [names[one] for one in seen.tolist()]
    judged = np.flatnonzero(images)
    recall = np.diag(confusion)[judged] / images[judged]
    worst = np.sort(judged[np.argsort(recall, kind="stable")[:MOST_CLASSES]])
    place = np.full(len(confusion), len(worst))
    place[worst] = np.arange(len(worst))
    joined = np.zeros((len(worst) + 1, len(worst) + 1), np.int64)
    np.add.at(joined, (place[:, None], place[None, :]), confusion)
    return joined, [*(names[one] for one in worst), OTHERS]


def zero_shot_picture(
    confusion: Counts, names: Sequence[str], bins: tuple[Sequence[Bin], Sequence[Bin]] | None
) -> Image.Image:
    """Confusion, recall by class, and a reliability diagram.

    Args:
        confusion: [classes, classes], true by named class.
        bins: Of the encoder's own scale, and of the fitted one; None where there is no calibration.
    """
    shown, shown_names = worst_classes(confusion, names)
    recall = np.diag(shown) / np.maximum(shown.sum(1), 1)
    order = [
        one for one in np.argsort(recall, kind="stable") if shown[one].sum() and shown_names[one] != OTHERS
    ]
    judged = int((confusion.sum(1) > 0).sum())
    worst = f"the {len(order)} worst of {judged}" if judged > len(order) else "all"

    def draw(left: Axes, middle: Axes, *right: Axes) -> None:
        heatmap(left, shown.astype(float), shown_names, f"true and named class ({worst})")
        bars(middle, [shown_names[one] for one in order], recall[order].tolist(), "recall, by class")
        for axes, (before, after) in zip(right, [bins] if bins else [], strict=True):
            _reliability(axes, before, after)

    return chart(draw, panels=3 if bins else 2, size=(6, 6))


def _reliability(axes: Axes, before: Sequence[Bin], after: Sequence[Bin]) -> None:
    """Accuracy over confidence; on the diagonal it is what the encoder says (Guo et al. 2017, figure 1)."""
    axes.plot([0, 1], [0, 1], color="lightgray", zorder=0)
    for bins, colour, name in ((before, "tab:gray", "own scale"), (after, "tab:blue", "fitted scale")):
        images = sum(one.images for one in bins)
        where = [one.confidence for one in bins]
        axes.plot(where, [one.accuracy for one in bins], "o-", color=colour, label=name)
        axes.bar(where, [one.images / images for one in bins], width=0.02, color=colour, alpha=0.35)
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1),
        title="calibration (bars: share of the images)",
        xlabel="probability of the named class",
        ylabel="share that is right",
    )
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
