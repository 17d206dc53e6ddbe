"""Which rows match a filter, remembered: a row never changes, so only new rows need looking at."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from indexes.conditions import Condition
from indexes.database import numbers_where
from indexes.faiss_index import Numbers, Positions, View

__all__ = ["Selections"]

BUDGET_BYTES = 64 * 1024 * 1024
MOST = 256


@dataclass(frozen=True, slots=True)
class _Selection:
    ns: Numbers  # the n's up to `covered` that match; some may be deleted by now
    covered: int
    pruned: int  # the commit whose deletions were dropped from `ns`: useless to an older View
    serial: int  # of the View that `located` is for
    located: Sequence[Positions]

    @property
    def bytes(self) -> int:
        return self.ns.nbytes + sum(each.nbytes for each in self.located)


class Selections:
    """The answers to the most recent filters, up to a budget of memory. Safe to use from several threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Condition, _Selection] = OrderedDict()
        self._lock = Lock()

    def locate(self, connection: sqlite3.Connection, view: View, condition: Condition) -> Sequence[Positions]:
        """Where the matching rows lie in the view's parts. `connection` reads the state of `view`."""
        with self._lock:
            kept = self._kept.get(condition)
            if kept is not None:
                self._kept.move_to_end(condition)
        if kept is not None and kept.serial == view.serial:
            return kept.located
        if kept is None or kept.pruned > view.number:
            kept = _Selection(np.empty(0, np.int64), 0, 0, -1, ())
        new = numbers_where(connection, condition, after=kept.covered)
        ns = np.concatenate([kept.ns, new]) if len(new) else kept.ns
        covered = max(kept.covered, int(new[-1]) if len(new) else 0, view.last)
        located = view.locate(ns)
        live = sum(map(len, located))
        pruned = kept.pruned
        if len(ns) > 2 * live + 1024:
            pruned = view.number
            ns = np.concatenate([part.data.ns[at] for part, at in zip(view.parts, located, strict=True)])
        self._keep(condition, _Selection(ns, covered, pruned, view.serial, located))
        return located

    def _keep(self, condition: Condition, selection: _Selection) -> None:
        with self._lock:
            self._kept[condition] = selection
            self._kept.move_to_end(condition)
            size = sum(each.bytes for each in self._kept.values())
            while len(self._kept) > 1 and (size > BUDGET_BYTES or len(self._kept) > MOST):
                size -= self._kept.popitem(last=False)[1].bytes
