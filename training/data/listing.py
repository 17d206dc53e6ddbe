"""What the reader of any form of data set finds; from it come the labels and groups that were asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import InvalidField, closest

__all__ = ["Fetch", "Files", "Listing", "Skipped", "counted", "is_test", "name_column", "shown"]

Fetch = Callable[[int], "bytes | NDArray[np.uint8]"]
"""Row → the bytes of an image file, or decoded pixels: uint8 [height, width] or [height, width, 3].
Safe in threads. Raises OSError or EmbedServeError for an image that cannot be had."""

Column = Sequence[str | None]
"""One text per image; None where there is none."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """One image that is left out, and why."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The images of a data set, N of them, and everything known about each."""

    keys: Sequence[str]
    stamps: NDArray[np.int64]
    """[N, 2]: bytes of the image's file and when it was modified, in nanoseconds."""
    fetch: Fetch
    encoded: bool = True
    """Whether `fetch` gives the bytes of files that are to be decoded, or pixels."""
    columns: Mapping[str, Column] = field(default_factory=dict)
    """What images can be labelled or grouped by."""
    several: Mapping[str, Sequence[tuple[str, ...]]] = field(default_factory=dict)
    """Columns in which an image may have several texts: all of each image's. `columns` has the first."""
    label: str = ""
    """The column that labels are taken from where nothing else is asked for."""
    group: str = ""
    """The same for groups."""
    class_names: tuple[str, ...] = ()
    """The classes of `label` in the order of their numbers, where the data set fixes that order."""
    test: NDArray[np.bool_] | None = None
    skipped: Sequence[Skipped] = ()
    ignored: int = 0
    """Files that are no images."""

    def labels(self, wanted: str) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Labels [N], -1 where there is none, and the names of the classes. `wanted` "" is the default."""
        column = self._column(wanted or self.label, "label_by")
        if column is None:
            return np.full(len(self.keys), -1, np.int64), ()
        fixed = self.class_names if wanted in {"", self.label} else ()
        names = fixed or tuple(in_order({value for value in column if value is not None}))
        number = {name: index for index, name in enumerate(names)}
        labels = (-1 if value is None else number[value] for value in column)
        return np.fromiter(labels, np.int64, len(column)), names

    def groups(self, wanted: str) -> NDArray[np.int64] | None:
        """Groups [N], or None. An image without a value is a group of its own."""
        column = self._column(wanted or self.group, "group_by")
        if column is None:
            return None
        number: dict[str, int] = {}
        groups = np.empty(len(column), np.int64)
        for row, value in enumerate(column):
            groups[row] = -1 if value is None else number.setdefault(value, len(number))
        alone = groups < 0
        groups[alone] = len(number) + np.arange(int(alone.sum()))
        return groups

    def texts(self, column: str) -> list[tuple[str, ...]]:
        """All texts of each image in a column that is there."""
        if column in self.several:
            return [tuple(texts) for texts in self.several[column]]
        return [() if text is None else (text,) for text in self.columns[column]]

    def _column(self, name: str, param: str) -> Column | None:
        if not name:
            return None
        if name not in self.columns:
            known = ", ".join(f"'{one}'" for one in self.columns) or "nothing"
            raise InvalidField(
                f"{param}='{name}' is not known here; {closest(name, self.columns)} "
                f"This data set can be told apart by: {known}.",
                param=param,
            )
        return self.columns[name]


@dataclass(frozen=True, slots=True)
class Files:
    """Fetches images that are a file each."""

    paths: Sequence[Path]

    def __call__(self, row: int) -> bytes:
        return self.paths[row].read_bytes()


def in_order(values: Iterable[str]) -> list[str]:
    """Sorted as people do: whole numbers by their value, everything else as text."""
    values = list(values)
    if all(re.fullmatch(r"-?\d{1,18}", value) for value in values):
        return sorted(values, key=lambda value: (int(value), value))
    return sorted(values)


def name_column(keys: Iterable[str]) -> list[str | None]:
    """The file's name without its extension and a last number: `shoe_2.jpg` and `shoe-17.jpg` are `shoe`."""
    return [re.sub(r"[_-]\d+$", "", PurePosixPath(key).stem) for key in keys]


_TRAIN = frozenset({"train", "training", "unlabeled", "unlabelled", "extra"})
_TEST = frozenset({"test", "testing", "val", "valid", "validation", "eval", "dev"})


def is_test(word: str) -> bool | None:
    """What the name of a part of a data set says; None when it is no such name."""
    word = word.strip().lower()
    return word in _TEST if word in _TRAIN | _TEST else None


def counted(number: int, thing: str) -> str:
    """`1 image`, `2,000 images`, `3 classes`."""
    ending = "" if number == 1 else "es" if thing.endswith("s") else "s"
    return f"{number:,} {thing}{ending}"


def shown(words: Iterable[str], most: int = 5) -> str:
    """`'a', 'b' and 3 more`."""
    words = list(words)
    text = ", ".join(f"'{word}'" for word in words[:most])
    return f"{text} and {len(words) - most:,} more" if len(words) > most else text
