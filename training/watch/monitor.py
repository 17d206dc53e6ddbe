"""Losses between two log lines, and the alarms of a run that goes wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embedserve.errors import EmbedServeError
from training.distributed import all_sum
from training.watch.alarms import Alarm, advice

__all__ = ["Monitor"]

LITTLE_SPREAD = 0.1
"""feature_std below which features count as collapsed. Measured on images of clothes: .14 to .16 for random
ResNets, .3 to .55 for healthy training; a run that collapses falls below .1 and goes on falling."""
NO_SPREAD = 1e-4
"""feature_std of images that a network cannot tell apart at all."""
RISING = 1.1
"""Factor from one measurement to the next above which a small spread is on its way up."""
FEW_DIRECTIONS, LOST_DIRECTIONS = 3.0, 0.2
"""feature_rank that is too small for any data, and the share of its highest value that is."""
NEAR = 0.01
"""Distance from ln K, as a share of it, within which a cross-entropy has learned nothing."""
PATIENCE, STUCK_READS, STUCK_EPOCHS = 2, 20, 2.0
"""Measurements in a row before a collapse is told; log lines at ln K, and epochs, before that is."""
CROSS_ENTROPIES = ("loss", "dino")
"""Losses that are at ln K where every class is equally likely."""


class Monitor:
    """Accumulates losses on the device without waiting for it, and judges whether training goes wrong.

    Args:
        method: A key of `training.methods.METHODS`, for the advice.
        classes: K where the loss is a cross-entropy over K classes that can stay stuck at ln K, else 0.

    Attributes:
        alarms: All that were raised, over all sessions of the run, in their order.
    """

    def __init__(self, method: str, *, classes: int) -> None:
        self.alarms: list[Alarm] = []
        self._method, self._classes = method, classes
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._not_finite: Tensor | None = None
        self._reads_at_ln_k = 0
        self._loss = math.nan
        self._streaks: dict[str, int] = {}
        self._spread: float | None = None
        self._highest_rank = 0.0

    # ------------------------------------------------------------------------------------------ losses

    @torch.no_grad()
    def see(self, losses: Mapping[str, Tensor]) -> None:
        """Takes the losses of one call of `Method.loss`: scalars, 'loss' among them. It does not wait."""
        for name, loss in losses.items():
            value = loss.detach().float()
            before = self._sums.get(name)
            self._sums[name] = value.clone() if before is None else before.to(value.device) + value
            self._counts[name] = self._counts.get(name, 0) + 1
        bad = (~losses["loss"].detach().isfinite()).float()
        self._not_finite = bad if self._not_finite is None else self._not_finite + bad

    def require_finite(self, step: int, lr: float, latest: Path | None) -> None:
        """Raises EmbedServeError (code 'loss_not_finite') if any loss seen so far was not a number.

        Args:
            step: Steps that are done.
            lr: The learning rate now.
            latest: The newest checkpoint, which is unharmed.
        """
        if self._not_finite is None or float(self._not_finite) == 0:
            return
        intact = f"'{latest}' is unharmed" if latest else "No checkpoint had been written yet"
        raise EmbedServeError(
            f"The loss is no longer a number, at step {step} or shortly before it. {intact}. In another "
            f"--out, try a lower learning rate (lr was {lr:.3g} at this step), a longer warmup_epochs, "
            "--set clip=1, or --set precision=fp32.",
            code="loss_not_finite",
        )

    def read(self) -> dict[str, float]:
        """The mean of each loss since the last call, over all ranks; {} where nothing was seen.

        All ranks must call it together.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names])
        counts = sums.new_tensor([self._counts[name] for name in names])
        totals = all_sum(torch.stack([sums, counts])).tolist()
        means = {name: total / count for name, total, count in zip(names, *totals, strict=True)}
        self._sums, self._counts = {}, {}
        self._look_at_loss(means)
        return means

    def _look_at_loss(self, means: Mapping[str, float]) -> None:
        if self._classes > 1:
            chance = math.log(self._classes)
            losses = [means[name] for name in CROSS_ENTROPIES if name in means]
            nearest = min(losses, key=lambda loss: abs(loss - chance))
            near = abs(nearest - chance) <= NEAR * chance
            self._reads_at_ln_k = self._reads_at_ln_k + 1 if near else 0
            self._loss = nearest

    # ------------------------------------------------------------------------------------------ alarms

    def judge(self, figures: Mapping[str, float], epoch: float) -> list[Alarm]:
        """The alarms that are new with a measurement. One that lasts is raised once.

        Args:
            figures: 'feature_std' and 'feature_rank' of `feature_statistics`.
            epoch: Epochs that are done.
        """
        spread, rank = figures["feature_std"], figures["feature_rank"]
        first, rising = self._spread is None, self._spread is not None and spread > RISING * self._spread
        self._highest_rank = max(self._highest_rank, rank)  # max keeps the first where the second is NaN
        too_few = max(FEW_DIRECTIONS, LOST_DIRECTIONS * self._highest_rank)
        same = first and rank > 0 and spread < NO_SPREAD
        collapsed = spread < LITTLE_SPREAD and not rising and not self._lasts("same_images")
        shown = f"they spread {spread:.2g} (1 is evenly over all directions, 0 is all in one)"
        found = {
            "same_images": (
                same or (self._lasts("same_images") and spread < NO_SPREAD),
                1,
                "All images have the same features, from the first measurement on.",
            ),
            "collapsed": (
                collapsed and not same,
                PATIENCE,
                f"The features have collapsed: {shown}, at {PATIENCE} measurements in a row.",
            ),
            "dimensional_collapse": (
                spread >= LITTLE_SPREAD and rank < too_few,
                PATIENCE,
                f"The features use only {rank:.1f} directions (effective rank; its highest was "
                f"{self._highest_rank:.1f}), at {PATIENCE} measurements in a row.",
            ),
            "stuck_at_ln_k": (
                self._reads_at_ln_k >= STUCK_READS and epoch >= STUCK_EPOCHS,
                1,
                f"The loss stays at ln K = ln {self._classes} = {math.log(max(self._classes, 1)):.2f} (it is "
                f"{self._loss:.2f}), which is what guessing gets: every output is equally likely.",
            ),
        }
        if not math.isnan(spread):
            self._spread = spread
        raised = [
            Alarm(code, f"{what} {advice(code, self._method)}", epoch)
            for code, (bad, patience, what) in found.items()
            if self._raises(code, bad, patience, epoch)
        ]
        self.alarms += raised
        return raised

    def _lasts(self, code: str) -> bool:
        return any(one.code == code and one.until is None for one in self.alarms)

    def _raises(self, code: str, bad: bool, patience: int, epoch: float) -> bool:
        self._streaks[code] = self._streaks.get(code, 0) + 1 if bad else 0
        if not bad:
            self.alarms = [
                replace(one, until=epoch) if one.code == code and one.until is None else one
                for one in self.alarms
            ]
        return self._streaks[code] >= patience and not self._lasts(code)

    # ------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """All of it in plain numbers and lists. Losses not yet read are this rank's."""
        return {
            "alarms": [asdict(one) for one in self.alarms],
            "sums": {name: float(total) for name, total in self._sums.items()},
            "counts": dict(self._counts),
            "reads_at_ln_k": self._reads_at_ln_k,
            "loss": self._loss,
            "streaks": dict(self._streaks),
            "spread": self._spread,
            "highest_rank": self._highest_rank,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What `state_dict` gave."""
        self.alarms = [Alarm(**one) for one in state["alarms"]]
        self._sums = {name: torch.tensor(total) for name, total in state["sums"].items()}
        self._counts, self._not_finite = dict(state["counts"]), None
        self._reads_at_ln_k = state["reads_at_ln_k"]
        self._loss = state["loss"]
        self._streaks = dict(state["streaks"])
        self._spread = state["spread"]
        self._highest_rank = state["highest_rank"]
