"""Data sets that are arrays of decoded images, in one or more files."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embedserve.errors import BadRequest
from training.data.listing import Column, Listing

__all__ = ["Stack", "list_stacks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """The images of one file."""

    prefix: str
    """Keys are this, a slash, and a number."""
    pixels: NDArray[np.uint8]
    """[N, height, width] or [N, height, width, 3]."""
    columns: Mapping[str, Column]
    test: bool
    modified: int
    """Nanoseconds."""


@dataclass(frozen=True, slots=True)
class _Slices:
    """Fetches images from arrays that follow one another."""

    starts: NDArray[np.int64]
    arrays: Sequence[NDArray[np.uint8]]

    def __call__(self, row: int) -> NDArray[np.uint8]:
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        image: NDArray[np.uint8] = self.arrays[number][row - int(self.starts[number])]
        return image


def list_stacks(stacks: Sequence[Stack], *, label: str, class_names: tuple[str, ...] = ()) -> Listing:
    """One listing of several files. `label` and `class_names` are as in `Listing`.

    A column that only some files have is empty in the others. Raises BadRequest where there is no image.
    """
    stacks = [stack for stack in stacks if len(stack.pixels)]
    if not stacks:
        raise BadRequest("The files hold no image: their header says 0. Download them again.")
    counts = [len(stack.pixels) for stack in stacks]
    names = dict.fromkeys(name for stack in stacks for name in stack.columns)
    columns = {
        name: list(
            itertools.chain.from_iterable(
                stack.columns.get(name, [None] * count) for stack, count in zip(stacks, counts, strict=True)
            )
        )
        for name in names
    }
    return Listing(
        keys=[f"{stack.prefix}/{row}" for stack in stacks for row in range(len(stack.pixels))],
        stamps=np.concatenate([_stamps(stack) for stack in stacks]),
        fetch=_Slices(np.cumsum([0, *counts[:-1]]), [stack.pixels for stack in stacks]),
        encoded=False,
        columns=columns,
        label=label if label in columns else "",
        class_names=class_names,
        test=np.repeat([stack.test for stack in stacks], counts),
    )


def _stamps(stack: Stack) -> NDArray[np.int64]:
    """In place of the size stands a checksum: MNIST and Fashion-MNIST differ in neither names nor sizes."""
    checks = [zlib.crc32(image.tobytes()) for image in stack.pixels]
    return np.stack([np.array(checks, np.int64), np.full(len(checks), stack.modified)], axis=1)
