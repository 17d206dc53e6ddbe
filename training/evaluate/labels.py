"""Which labelled images an evaluation learns from, and which it is judged on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedserve.errors import InvalidField
from training.data import Source, split
from training.evaluate.embedding import Embedded, EvaluationEncoder
from training.evaluate.report import Progress, silent

__all__ = [
    "HOLDOUT",
    "Images",
    "Task",
    "embed_chosen",
    "judged_rows",
    "labelled_rows",
    "labelled_task",
    "unseen_rows",
]

Rows = NDArray[np.int64]

Images = Literal["auto", "all"]
"""Which images an evaluation without learning judges: those of `unseen_rows`, or all."""

HOLDOUT = 0.1
"""Share held out where neither the data nor a training has decided."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A classification: features and labels to learn from, and those to be judged on."""

    embedded: Embedded
    """All images that could be read."""
    train: Tensor
    """float32 [n, dim]."""
    train_labels: Tensor
    """int64 [n], 0..classes-1."""
    test: Tensor
    """float32 [m, dim]."""
    test_labels: Tensor
    class_names: tuple[str, ...]
    train_rows: Rows
    """Where the n lie in the source."""
    test_rows: Rows

    @property
    def classes(self) -> int:
        return len(self.class_names)


def unseen_rows(source: Source, encoder: EvaluationEncoder, images: Images = "auto") -> Rows:
    """The data's own test part, else what the encoder's training held out, else all."""
    if images == "auto":
        test = split(source, holdout=encoder.holdout or 0.0, seed=encoder.seed)[1]
        if len(test):
            return test
    return np.arange(len(source), dtype=np.int64)


def judged_rows(
    source: Source, encoder: EvaluationEncoder, images: Images = "auto", *, evaluation: str
) -> Rows:
    """The labelled ones of `unseen_rows`.

    Raises:
        InvalidField: There is none, or there is one class to choose from.
    """
    _check_labels(source, evaluation)
    if len(source.class_names) < 2:
        raise InvalidField(
            f"{evaluation} tells classes apart, and '{source.name}' has only '{source.class_names[0]}'; it "
            "takes two classes at least.",
            param="data",
        )
    rows = unseen_rows(source, encoder, images)
    rows = rows[source.labels[rows] >= 0]
    if not len(rows):
        raise InvalidField(
            f"None of the images of '{source.name}' that are held out has a label; set images=all.",
            param="images",
        )
    return rows


def embed_chosen(
    encoder: EvaluationEncoder, source: Source, choose: Callable[[Source], Rows], progress: Progress = silent
) -> Embedded:
    """Embeds the rows that `choose` takes of a source, and no more where that is possible.

    Which images a training held out follows from all images that can be read, so these are read first.
    """
    if encoder.holdout is None or source.test.any():
        return encoder.embed(source.select(choose(source)), progress=progress)
    choose(source)  # says what is wrong before the work
    embedded = encoder.embed(source, progress=progress)
    rows = choose(embedded.source)
    return Embedded(
        embedded.vectors[torch.from_numpy(rows).to(embedded.vectors.device)],
        embedded.source.select(rows),
        embedded.skipped,
    )


def labelled_rows(
    source: Source, encoder: EvaluationEncoder, *, evaluation: str, holdout: float = 0.0
) -> tuple[Rows, Rows]:
    """Rows with labels, to learn from and to be judged on.

    The data's own test part is the second; else the images that the encoder's training held out; else a drawn
    share of 10%.

    Args:
        source: The images.
        encoder: Whose training decided what was held out.
        evaluation: Its name, for the message.
        holdout: Overrides the share that is held out; 0 does not.

    Raises:
        InvalidField: No labels, a single class, or nothing on one of the sides.
    """
    _check_labels(source, evaluation)
    share = holdout or (HOLDOUT if encoder.holdout is None else encoder.holdout)
    train, test = split(source, holdout=share, seed=encoder.seed)
    train, test = train[source.labels[train] >= 0], test[source.labels[test] >= 0]
    present = np.unique(source.labels[train])
    if len(present) < 2:
        only = f"only '{source.class_names[present[0]]}'" if len(present) else "no class"
        raise InvalidField(
            f"{evaluation} tells classes apart, and {only} of '{source.name}' has images to learn from; "
            "it takes two classes at least.",
            param="data",
        )
    if not len(test):
        raise InvalidField(
            f"No labelled image of '{source.name}' is held out to be judged on; set holdout=0.1, and "
            "have two images or more of some class.",
            param="holdout",
        )
    return train, test


def _check_labels(source: Source, evaluation: str) -> None:
    if not source.class_names or not (source.labels >= 0).any():
        raise InvalidField(
            f"{evaluation} needs labels, and '{source.name}' has none. Put the images into one folder "
            "for each class, or give a list with a label column (label_by=NAME). Without labels there are "
            "near_duplicates and attention, and retrieval over groups (group_by).",
            param="data",
        )


def labelled_task(
    encoder: EvaluationEncoder,
    source: Source,
    *,
    evaluation: str,
    holdout: float = 0.0,
    progress: Progress = silent,
) -> Task:
    """Embeds a source and takes its `labelled_rows`. Raises as these do, before anything is embedded."""
    labelled_rows(source, encoder, evaluation=evaluation, holdout=holdout)
    embedded = encoder.embed(source, progress=progress)
    source, vectors = embedded.source, embedded.vectors
    train, test = labelled_rows(source, encoder, evaluation=evaluation, holdout=holdout)
    labels = torch.from_numpy(source.labels).to(vectors.device)
    return Task(
        embedded=embedded,
        train=vectors[train],
        train_labels=labels[train],
        test=vectors[test],
        test_labels=labels[test],
        class_names=source.class_names,
        train_rows=train,
        test_rows=test,
    )
