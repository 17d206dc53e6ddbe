"""Quantities that change during training, each a function of the share of training that is done."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Now", "Schedule", "constant", "cosine", "warmup"]

Schedule = Callable[["Now"], float]
"""From where training stands to a value."""


@dataclass(frozen=True, slots=True)
class Now:
    """Where training stands at the start of a step."""

    step: int
    """Steps that are done, of `steps`."""
    steps: int
    steps_per_epoch: int

    @property
    def epoch(self) -> float:
        """Epochs that are done; 2.5 in the middle of the third."""
        return self.step / self.steps_per_epoch

    @property
    def progress(self) -> float:
        """The share of training that is done, 0 at the first step and 1 after the last."""
        return self.step / self.steps


def constant(value: float) -> Schedule:
    return lambda now: value


def cosine(start: float, end: float) -> Schedule:
    """Half a cosine from `start` at the first step to `end` after the last (Loshchilov & Hutter 2017)."""
    return lambda now: end + (start - end) * (1 + math.cos(math.pi * now.progress)) / 2


def warmup(epochs: float, then: Schedule, *, start: float = 0.0) -> Schedule:
    """Linear from `start` to `then` over the first `epochs`; `then` runs over what is left.

    A warm-up longer than the training is cut to it.
    """

    def value(now: Now) -> float:
        length = min(round(epochs * now.steps_per_epoch), now.steps)
        if now.step < length:
            first = then(Now(0, max(now.steps - length, 1), now.steps_per_epoch))
            # As in Goyal et al. 2017, the first step moves already.
            return start + (first - start) * (now.step + 1) / length
        return then(Now(now.step - length, max(now.steps - length, 1), now.steps_per_epoch))

    return value
