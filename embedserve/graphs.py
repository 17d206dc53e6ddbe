"""A bundle's graphs in their sessions, as `embedserve.encoder` uses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from embedserve.binding import rounded
from embedserve.bundle import Bundle, ImageOutputs, ImageTower, TextTower
from embedserve.device import Device
from embedserve.graph import Graph
from embedserve.tokenizer import Tokenizer

__all__ = ["Images", "Place", "Texts"]

MOST_TEXTS = 64
"""Texts of the largest batch that is warmed up; there are more in one run only where callers send many."""


class Place(NamedTuple):
    """Where and how a tower's graph runs; as `Graph` takes it."""

    threads: int
    device: Device
    half: bool
    engines: Path | None

    def gpu(self) -> dict[str, Any]:
        """The arguments of `Graph` that are about the device."""
        return {"device": self.device, "half": self.half, "engines": self.engines}


class Images:
    def __init__(self, bundle: Bundle, tower: ImageTower, run_on: Place) -> None:
        self.spec = tower.preprocessing
        form = {"batch": None, "height": self.spec.height, "width": self.spec.width, "channels": 3}
        self.graph = Graph(
            bundle.path(tower.file),
            run_on.threads,
            "tensor(uint8)",
            form,
            bundle.dim,
            outputs=_forms(tower.outputs),
            **run_on.gpu(),
        )

    def warm_up(self, most: int) -> int:
        """Runs batches of all sizes up to `most`; returns the largest that fits into memory."""
        shape = (self.spec.height, self.spec.width, 3)
        for count in _sizes(most):
            if not _fits(self.graph, np.zeros((count, *shape), np.uint8)):
                most = max(1, count // 2)
        return most


class Texts:
    def __init__(self, bundle: Bundle, tower: TextTower, run_on: Place) -> None:
        self.tokenizer = Tokenizer(tower, bundle.path(tower.tokenizer))
        form = {"batch": None, "length": tower.context_length if tower.padding == "context" else None}
        file = bundle.path(tower.file)
        self.graph = Graph(file, run_on.threads, "tensor(int64)", form, bundle.dim, **run_on.gpu())

    def warm_up(self, most: int) -> int:
        """As `Images.warm_up`, with the longest and the shortest texts; `most` and the result are tokens."""
        for length in sorted({1, self.tokenizer.context}, reverse=True):
            padded = self.tokenizer.padded_length(length)
            for count in _sizes(max(1, min(MOST_TEXTS, most // padded))):
                if not _fits(self.graph, self.tokenizer.pad([[0] * length] * count)):
                    most = max(padded, count * padded // 2)
        return most


def _forms(outputs: ImageOutputs | None) -> dict[str, dict[str, int | None]]:
    if outputs is None:
        return {}
    cells = outputs.rows * outputs.columns
    forms: dict[str, dict[str, int | None]] = {}
    if outputs.patches is not None:
        forms["patches"] = {"batch": None, "cells": cells, "length": outputs.patches}
    if outputs.attention is not None:
        forms["attention"] = {"batch": None, "heads": outputs.attention, "cells": cells}
    return forms


def _fits(graph: Graph, batch: NDArray[np.generic]) -> bool:
    before = graph.halved
    graph.run(batch)
    return graph.halved == before


def _sizes(largest: int) -> list[int]:
    """The batch sizes that runs of at most `largest` rows have on a GPU, the largest first."""
    return sorted({min(largest, rounded(count)) for count in range(1, largest + 1)}, reverse=True)
