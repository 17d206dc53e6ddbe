"""`embedserve train probe`: reads a collection, fits, and saves a label set, all through the API's client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from embedserve.bundle import pack_vector
from embedserve.client import Client
from training.probe.fitting import Fit, Wanted, fit
from training.probe.labelled import Labelled, labelled

__all__ = ["Saved", "train_probe"]

PAGE = 250
"""Items of one answer; each vector is some kilobytes of JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """What became of the collection's labels."""

    name: str
    collection: str
    field: str
    data: Labelled
    chosen: Fit
    tried: list[Fit]

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "label_set": self.name,
            "collection": self.collection,
            "field": self.field,
            "kind": self.chosen.kind,
            "items": len(self.data.rows),
            "counts": self.data.counts,
            "judged": self.chosen.judged,
            "tried": [
                {
                    "kind": one.kind,
                    "setting": one.setting,
                    "accuracy": one.accuracy,
                    "cross_entropy": one.cross_entropy,
                    "ece": one.ece,
                }
                for one in self.tried
            ],
            "skipped": {"without_label": self.data.without, "several_labels": self.data.several},
            "single": list(self.data.single),
        }

    def lines(self) -> list[str]:
        """For people."""
        data = self.data
        lines = [f"{self.collection}: {len(data.rows):,} items with one of {len(data.labels):,} labels"]
        if data.without or data.several:
            lines.append(
                f"passed over: {data.without:,} items without '{self.field}', {data.several:,} with several "
                "labels"
            )
        for one in self.tried:
            mark = "→" if one is self.chosen else " "
            what = "decay" if one.kind == "linear" else "scale"
            figures = (
                "not judged: no label has two items"
                if one.accuracy is None
                else f"{one.accuracy:.1%} of {one.judged:,} held-out items right, calibration error "
                f"{one.ece:.3f}"
            )
            lines.append(f"{mark} {one.kind:11}{figures} ({what} {one.setting:.3g})")
        if data.single and self.chosen.judged:
            shown = ", ".join(f"'{label}'" for label in data.single[:5])
            more = ", …" if len(data.single) > 5 else ""
            lines.append(
                f"labels with one item, which is learned from but cannot be judged: {len(data.single)} "
                f"({shown}{more})"
            )
        return lines


async def train_probe(client: Client, collection: str, *, label: str, save: str, kind: Wanted) -> Saved:
    """Fits a classifier to the items' metadata field `label` and saves it as the label set `save`.

    Raises InvalidField (no items, no such field, fewer than two labels, a name that is not allowed), NotFound
    (the collection), and what the server answers.
    """
    described = await client.collection(collection)
    items = [
        (item["metadata"], item["vector"])
        async for item in client.all_items(collection, include=("metadata", "vector"), page=PAGE)
    ]
    data = labelled(items, label, collection)
    chosen, tried = fit(data.vectors, data.rows, kind)
    await client.save_label_set(
        save,
        {
            "kind": "linear",
            "labels": list(data.labels),
            "dim": data.vectors.shape[1],
            "weights": pack_vector(chosen.weights.astype(np.float32)),
            "bias": chosen.bias.tolist(),
            "encoder": described["encoder"],
            "fingerprint": described["fingerprint"],
            "fitted": {
                "kind": chosen.kind,
                "counts": data.counts,
                "judged": chosen.judged,
                "accuracy": chosen.accuracy,
                "ece": chosen.ece,
                "collection": collection,
                "field": label,
            },
        },
    )
    return Saved(save, collection, label, data, chosen, tried)
