"""From the order of an epoch to what a rank's networks see: rows → pixels → views."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.augment import Plan, augment, plan
from training.augment.drawing import shaped, uniforms
from training.augment.recorded import RecordedViews
from training.captions import Captions
from training.data import EpochOrder, Partners, Pixels
from training.data.ahead import in_order
from training.distributed import rank, world_size
from training.method import Texts
from training.seeding import generator
from training.views import View

__all__ = ["Batches", "Part"]

AHEAD = 2
"""Steps that are drawn before their turn."""

VIEWS = 1
"""Sets the views' random numbers apart from others of the same seed and step."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one call of `Method.loss` sees: the views of this rank's images, and the images' ids."""

    views: list[Tensor]
    ids: Tensor
    last: bool
    """Whether the step's batch is complete with this part."""
    texts: Texts | None = None
    """A caption of each image."""


@dataclass(frozen=True, slots=True)
class _Work:
    """All of a part that the CPU works out."""

    drawn: list[Plan] | Tensor
    """A plan for each view; for a GPU what `RecordedViews` takes."""
    ids: Tensor
    last: bool
    texts: Texts | None


class Batches:
    """The batches of a run from any step on; nothing of it needs to be saved.

    Order, partners and views are drawn for the joined batch of all ranks from (seed, step), and each rank
    takes its share: several ranks see exactly what one would. A background thread draws the steps that come
    while the device works on this one.

    Args:
        pixels: All images.
        rows: int64 [images], those to train on.
        views: What the method wants to see.
        batch_size: Images of a step, over all ranks and parts.
        parts: Parts that a step's batch is cut into.
        seed: The run's.
        groups: Whether partners are drawn from groups.
        compile: Whether a GPU makes views with compiled code.
        captions: Of all images, where they are learned from.
    """

    def __init__(
        self,
        pixels: Pixels,
        rows: NDArray[np.int64],
        views: Sequence[View],
        *,
        batch_size: int,
        parts: int,
        seed: int,
        groups: bool,
        compile: bool = False,
        captions: Captions | None = None,
    ) -> None:
        self.pixels, self.rows, self.views, self.captions = pixels, rows, views, captions
        self.batch_size, self.parts, self.seed = batch_size, parts, seed
        self.order = EpochOrder(len(rows), batch_size, seed)
        group = pixels.source.groups
        self._groups = group[rows] if groups and group is not None else None
        self._partners = Partners(self._groups, seed)
        self._share = batch_size // parts // world_size()
        self._rank, self._ranks = rank(), world_size()
        self._compile = compile
        self._recorded: RecordedViews | None = None

    def from_step(self, step: int, steps: int) -> Generator[Part, None, None]:
        """The parts of every step from `step` to the last; close it when leaving early."""
        if self.pixels.device.type == "cuda" and self._recorded is None:
            self._recorded = RecordedViews(
                self.views,
                count=self._share,
                stored_size=self.pixels.size,
                device=self.pixels.device,
                compile=self._compile,
            )
        with (
            contextlib.closing(self.pixels.prefetch(self._wanted(step, steps))) as pixels,
            contextlib.closing(in_order(self._work, range(step, steps), threads=1, ahead=AHEAD)) as works,
        ):
            for parts in works:
                for work in parts:
                    yield self._part(next(pixels), work)

    def _choose(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions in `rows`, for the joined batch: the images, and their partners."""
        chosen = self.order.rows(step)
        return chosen, self._partners.rows(chosen, step) if self._groups is not None else chosen

    def _mine(self, part: int) -> slice:
        start = (part * self._ranks + self._rank) * self._share
        return slice(start, start + self._share)

    def _wanted(self, step: int, steps: int) -> Iterator[NDArray[np.int64]]:
        for at in range(step, steps):
            chosen, partners = self._choose(at)
            for part in range(self.parts):
                mine = self._mine(part)
                both = [chosen[mine]] if self._groups is None else [chosen[mine], partners[mine]]
                yield self.rows[np.concatenate(both)]

    def _work(self, step: int) -> list[_Work]:
        """What the CPU can do of a step before its turn: this rank's share of every part."""
        chosen, partners = self._choose(step)
        source = generator(self.seed, VIEWS, step)
        uniform = [uniforms(len(chosen), source) for _ in self.views]
        aspect = torch.from_numpy(self.pixels.aspect[self.rows])
        of = {"image": aspect[chosen], "partner": aspect[partners]}
        ids = chosen if self._groups is None else self._groups[chosen]
        said = None if self.captions is None else self.captions.drawn(self.rows[chosen], step)
        works = []
        for part in range(self.parts):
            mine = self._mine(part)
            drawn = self._drawn(
                [values[mine] for values in uniform], [of[view.of][mine] for view in self.views]
            )
            texts = None if said is None else self._texts(said[mine])
            works.append(_Work(drawn, self.pixels.sendable(ids[mine]), part == self.parts - 1, texts))
        return works

    def _texts(self, said: NDArray[np.int64]) -> Texts | None:
        if self.captions is None:
            return None
        return Texts(self.pixels.sendable(self.captions.tokens(said)), self.pixels.sendable(said))

    def _drawn(self, uniform: Sequence[Tensor], aspects: Sequence[Tensor]) -> list[Plan] | Tensor:
        if self._recorded is not None:
            return self._recorded.pack(uniform, aspects)
        size, device = self.pixels.size, self.pixels.device
        return [
            plan(view, shaped(view, aspect, values), stored_size=size, device=device)
            for view, aspect, values in zip(self.views, aspects, uniform, strict=True)
        ]

    def _part(self, pixels: Tensor, work: _Work) -> Part:
        of = {"image": pixels[: self._share], "partner": pixels[-self._share :]}
        if self._recorded is not None and isinstance(work.drawn, Tensor):
            views = self._recorded(of, work.drawn)
        else:
            views = [augment(of[view.of], one) for view, one in zip(self.views, work.drawn, strict=True)]
        there = pixels.device
        texts = work.texts and Texts(
            work.texts.tokens.to(there, non_blocking=True), work.texts.ids.to(there, non_blocking=True)
        )
        return Part(views, work.ids.to(there, non_blocking=True), work.last, texts)
