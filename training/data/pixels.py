"""The decoded images of a run, on the GPU, in a file, or decoded anew each time.

    pixels = open_pixels(source, 224, device=device)
    for batch in pixels.prefetch(order.rows(step) for step in range(steps)):   # uint8 [B, 224, 224, 3]
        ...

The bytes of a batch are the same wherever they come from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedserve.errors import BadRequest, EmbedServeError, InvalidField, closest
from training.data.ahead import in_order
from training.data.cache import FORMAT, default_folder, load_or_build
from training.data.listing import Skipped, shown
from training.data.source import Source
from training.data.squares import read_square

__all__ = ["Pixels", "Residence", "native_size", "open_pixels"]

Residence = Literal["device", "host", "stream"]
Rows = NDArray[np.int64]

AHEAD = 3
"""Batches made before they are asked for."""


class Pixels:
    """N decoded images, each stored as a square of S × S pixels whatever its shape.

    Args:
        source: The images, row for row.
        size: S.
        aspect: float32 [N], width ÷ height of the originals. Crops are drawn in the original's geometry.
        skipped: Images that are not among the N, and why.
        device: Where batches go.
        stored: uint8 [N, S, S, 3]: a tensor on the device, an array on the host, or None to decode anew.
        threads: How many decode.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        aspect: NDArray[np.float32],
        *,
        skipped: tuple[Skipped, ...] = (),
        device: torch.device,
        stored: Tensor | NDArray[np.uint8] | None,
        threads: int,
    ) -> None:
        self.source, self.size, self.aspect = source, size, aspect
        self.skipped, self.device = skipped, device
        self._stored, self._threads = stored, threads

    def __len__(self) -> int:
        return len(self.source)

    @property
    def residence(self) -> Residence:
        """Where the pixels are between batches."""
        if self._stored is None:
            return "stream"
        return "device" if isinstance(self._stored, Tensor) else "host"

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the source and of how it was decoded; the same for every residence."""
        return hashlib.sha256(f"{FORMAT} {self.size} {self.source.fingerprint}".encode()).hexdigest()

    def batch(self, rows: Rows) -> Tensor:
        """The images of `rows` (int64 [B], any order, repeats allowed): uint8 [B, S, S, 3] on the device.

        Raises IndexError for a row that is not there; streaming, what `Source.read` raises for a file that
        was readable when the pixels were opened and no longer is.
        """
        self._check(rows)
        if isinstance(self._stored, Tensor):
            return self._stored.index_select(0, self.sendable(rows).to(self.device, non_blocking=True))
        with self._readers() as readers:
            return self._gather(rows, readers).to(self.device)

    def sendable(self, numbers: NDArray[np.int64]) -> Tensor:
        """int64 [n] in the host's memory, page-locked for a GPU, so that a copy does not wait for it."""
        tensor = torch.from_numpy(numbers)
        return tensor.pin_memory() if self._on_gpu else tensor

    def prefetch(self, orders: Iterator[Rows]) -> Generator[Tensor, None, None]:
        """The batches of `orders`, in order, made by background threads while the device works.

        Close the iterator to stop them (dropping it does so too). An error is raised at its batch.
        """
        if isinstance(self._stored, Tensor):
            yield from map(self.batch, orders)
            return
        readers = self._readers()
        copies = torch.cuda.Stream(self.device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        batches = in_order(partial(self._ahead, readers, copies), orders, threads=2, ahead=AHEAD)
        try:
            for batch, copied in batches:
                if copied is not None:
                    working = torch.cuda.current_stream(self.device)
                    working.wait_event(copied)
                    batch.record_stream(working)  # its memory is not reused before the work on it is done
                yield batch
        finally:
            readers.shutdown(wait=False, cancel_futures=True)  # whoever waits for these images ends at once
            batches.close()
            readers.shutdown()

    def distinct(self) -> int:
        """How many different images are among up to 1,000 that are spread over all of them."""
        rows = _spread(len(self), 1000)
        return len(
            {row.numpy().tobytes() for part in np.array_split(rows, 10) for row in self.batch(part).cpu()}
        )

    def _check(self, rows: Rows) -> None:
        if rows.size and not (rows.min() >= 0 and rows.max() < len(self)):
            raise IndexError(f"rows {rows.min()} to {rows.max()} of {len(self)} images")

    def _ahead(
        self, readers: ThreadPoolExecutor, copies: torch.cuda.Stream | None, rows: Rows
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        """A batch on the device; on a GPU its copy may still be under way on the stream `copies`."""
        self._check(rows)
        batch = self._gather(rows, readers)
        if copies is None:
            return batch.to(self.device), None
        with torch.cuda.stream(copies):
            return batch.to(self.device, non_blocking=True), copies.record_event()

    def _gather(self, rows: Rows, readers: ThreadPoolExecutor) -> Tensor:
        """[B, S, S, 3] in the host's memory, page-locked for a GPU."""
        shape = (len(rows), self.size, self.size, 3)
        batch = torch.empty(shape, dtype=torch.uint8, pin_memory=self._on_gpu)
        into = batch.numpy()
        if isinstance(self._stored, np.ndarray):
            np.take(self._stored, rows, axis=0, out=into, mode="clip")  # checked; "raise" would copy twice
            return batch

        def read(place: int) -> None:
            into[place] = read_square(self.source, int(rows[place]), self.size)

        for _ in readers.map(read, range(len(rows))):
            pass
        return batch

    def _readers(self) -> ThreadPoolExecutor:
        """Decodes single images; it starts no thread before it is asked to."""
        return ThreadPoolExecutor(self._threads, thread_name_prefix="embedserve-data-reader")

    @property
    def _on_gpu(self) -> bool:
        return self.device.type == "cuda"


def open_pixels(
    source: Source,
    size: int,
    *,
    device: torch.device | str,
    residence: Residence | Literal["auto"] = "auto",
    folder: Path | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pixels:
    """Decodes a source, or finds it decoded in the cache.

    Args:
        size: Pixels of a side of the stored squares.
        residence: "device": all pixels on the device. "host": mapped from the cache's file. "stream": decoded
            anew for each batch and never stored; still every image is decoded once here, to learn its shape
            and whether it is sound, so that rows agree with the other residences. "auto": "device" where half
            of a GPU's free memory holds them, else "host".
        folder: The cache; `default_folder()` where none is given.
        workers: Threads that decode; 0 for one per core.
        progress: Called with (images decoded, images in all).

    Images that cannot be decoded are left out and listed in `skipped`. Raises BadRequest when none can be or
    the cache cannot be written, InvalidField for a size, residence or number of workers that makes no sense,
    TooLarge when the disk is full.
    """
    if size < 1:
        raise InvalidField(f"size={size} is not allowed; give 1 pixel or more.", param="size")
    if workers < 0:
        raise InvalidField(
            f"workers={workers} is not allowed; give 0 (one per core) or more.", param="workers"
        )
    if residence not in {"auto", *get_args(Residence)}:
        allowed = ("auto", *get_args(Residence))
        raise InvalidField(
            f"residence='{residence}' is unknown; {closest(residence, allowed)} Allowed: {shown(allowed)}.",
            param="residence",
        )
    device = torch.device(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = workers or cores
    entry = load_or_build(
        source,
        0 if residence == "stream" else size,
        default_folder() if folder is None else folder,
        threads=threads,
        progress=progress,
    )
    failed = {one.row: Skipped(source.keys[one.row], one.reason) for one in entry.failures}
    if failed:
        kept = np.delete(np.arange(len(source)), list(failed))
        source = source.select(kept)
    stored: Tensor | NDArray[np.uint8] | None = entry.pixels
    if entry.pixels is not None and (
        residence == "device" or (residence == "auto" and _fits(entry.pixels.nbytes, device))
    ):
        stored = _upload(entry.pixels, device)
    return Pixels(
        source,
        size,
        entry.aspect,
        skipped=(*source.skipped, *failed.values()),
        device=device,
        stored=stored,
        threads=threads,
    )


def native_size(source: Source) -> int:
    """The median shorter side, in pixels, of up to 200 images that are spread over the source.

    Raises BadRequest when none of them has a header that can be read.
    """
    sides: list[int] = []
    reasons: list[str] = []
    for row in _spread(len(source), 200):
        try:
            sides.append(min(source.size_of(int(row))))
        except (OSError, EmbedServeError) as error:
            reasons.append(f"{source.keys[row]}: {error}")
    if not sides:
        raise BadRequest(f"No image of '{source.name}' can be read: {shown(reasons, most=3)}.")
    return int(np.median(sides))


def _fits(needed: int, device: torch.device) -> bool:
    return device.type == "cuda" and needed <= torch.cuda.mem_get_info(device)[0] // 2


def _upload(pixels: NDArray[np.uint8], device: torch.device) -> Tensor:
    """In parts, so that the host never holds a second copy."""
    there = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    rows = max(1, 2**28 // max(1, pixels[0].nbytes))
    for start in range(0, len(pixels), rows):
        there[start : start + rows] = torch.from_numpy(np.array(pixels[start : start + rows]))
    return there


def _spread(images: int, most: int) -> Rows:
    """Up to `most` rows, evenly spread."""
    return np.unique(np.linspace(0, images - 1, min(images, most)).astype(np.int64))
