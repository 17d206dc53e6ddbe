"""The embedded store: writing, searching with and without filters, opening.

    python -m benchmarks.store [--rows 100000] [--dim 640] [--folder FOLDER]

Vectors are random; exact search takes the same time whatever they are. Times are medians.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import machine
from indexes.local import LocalStore

BATCH = 1000
SINGLES = 500
CALLERS = 16


def median_ms(call: Callable[[], object], times: int = 15) -> float:
    """Milliseconds of one call."""
    call()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1000 * statistics.median(taken)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def metadata_of(row: int) -> dict[str, Any]:
    return {
        "name": f"picture {row}.jpg",
        "label": "abc"[row % 3],
        "percent": row % 100,
        "year": 1990 + row % 35,
    }


def write(store: LocalStore, vectors: NDArray[np.float32]) -> list[tuple[str, str]]:
    rows = len(vectors)

    def batched() -> None:
        for start in range(0, rows, BATCH):
            some = range(start, min(start + BATCH, rows))
            store.upsert(
                [f"item {i}" for i in some], vectors[some.start : some.stop], [*map(metadata_of, some)]
            )

    def single(caller: int, count: int) -> None:
        for i in range(count):
            row = (caller * count + i) % rows
            store.upsert([f"single {caller} {i}"], vectors[row : row + 1], [metadata_of(row)])

    def many() -> None:
        threads = [threading.Thread(target=single, args=(caller, SINGLES // 4)) for caller in range(CALLERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    lines = [(f"write, batches of {BATCH}", f"{rows / seconds(batched):,.0f} rows/s")]
    lines.append(
        ("write, single rows, 1 caller", f"{SINGLES / seconds(lambda: single(99, SINGLES)):,.0f} rows/s")
    )
    before = store.stats()
    taken = seconds(many)
    after = store.stats()
    shared = (after["writes"] - before["writes"]) / (after["commits"] - before["commits"])
    count = CALLERS * (SINGLES // 4)
    lines.append(
        (f"write, single rows, {CALLERS} callers", f"{count / taken:,.0f} rows/s ({shared:.1f} a commit)")
    )
    names = [f"single 99 {i}" for i in range(SINGLES)]
    lines.append((f"delete, {SINGLES} rows at once", f"{1000 * seconds(lambda: store.delete(names)):.1f} ms"))
    return lines


def search(store: LocalStore, queries: NDArray[np.float32]) -> list[tuple[str, str]]:
    one = queries[:1]
    lines = [("search, k=10", f"{median_ms(lambda: store.search(one, 10)):.1f} ms")]
    batch = median_ms(lambda: store.search(queries, 10), 5)
    lines.append((f"search, {len(queries)} queries in one call", f"{batch / len(queries):.2f} ms a query"))
    for share, wanted in (
        ("33%", {"label": "a"}),
        ("10%", {"percent": {"$lt": 10}}),
        ("1%", {"percent": 7}),
        ("5%", {"$and": [{"label": "b"}, {"year": {"$gte": 2000, "$lt": 2005}}]}),
    ):
        first = 1000 * seconds(lambda: store.search(one, 10, filter=wanted))  # noqa: B023 - called at once
        again = median_ms(lambda: store.search(one, 10, filter=wanted))  # noqa: B023
        lines.append((f"search, filter keeps {share}", f"{first:.0f} ms the first time, then {again:.1f} ms"))
    return lines


def searched_while_writing(store: LocalStore, vectors: NDArray[np.float32]) -> list[tuple[str, str]]:
    stop = threading.Event()
    written = 0

    def keep_writing() -> None:
        nonlocal written
        while not stop.is_set():
            store.upsert([f"moving {i}" for i in range(100)], vectors[:100])
            written += 100

    writer = threading.Thread(target=keep_writing)
    writer.start()
    start = time.perf_counter()
    taken = median_ms(lambda: store.search(vectors[:1], 10), 40)
    rate = written / (time.perf_counter() - start)
    stop.set()
    writer.join()
    return [("search, k=10, while writing", f"{taken:.1f} ms beside {rate:,.0f} rows/s")]


def opened(folder: Path, dim: int) -> list[tuple[str, str]]:
    def reopen() -> float:
        start = time.perf_counter()
        store = LocalStore(folder, dim)
        taken = time.perf_counter() - start
        store.close()
        return taken

    with_cache = statistics.median(reopen() for _ in range(3))
    shutil.rmtree(folder / "index")
    return [
        ("open, index from its cache", f"{1000 * with_cache:.0f} ms"),
        ("open, index rebuilt", f"{1000 * reopen():.0f} ms"),
    ]


def opened_small(folder: Path, vectors: NDArray[np.float32]) -> list[tuple[str, str]]:
    with LocalStore(folder, vectors.shape[1]) as store:
        store.upsert([f"item {i}" for i in range(1000)], vectors[:1000])
    times = []
    for _ in range(9):
        start = time.perf_counter()
        store = LocalStore(folder, vectors.shape[1])
        times.append(time.perf_counter() - start)
        store.close()
    return [("open, 1,000 rows", f"{1000 * statistics.median(times):.0f} ms")]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=640)
    parser.add_argument("--folder", type=Path, help="an empty folder on the disk to measure")
    options = parser.parse_args()
    vectors = np.random.default_rng(0).standard_normal((options.rows, options.dim), dtype=np.float32)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "store"
        with LocalStore(folder, options.dim) as store:
            lines = write(store, vectors)
            lines += search(store, vectors[:64])
            lines += searched_while_writing(store, vectors)
            size = store.stats()["bytes"] / store.count()
        lines += opened(folder, options.dim)
        lines += opened_small(Path(name) / "small", vectors)
        lines.append(("disk, with the index's cache", f"{size:,.0f} bytes a row"))
    print(f"{machine()}; {options.rows:,} rows of {options.dim}; load average {os.getloadavg()[0]:.1f}\n")
    print("| what | measured |\n|---|---|")
    for what, measured in lines:
        print(f"| {what} | {measured} |")


if __name__ == "__main__":
    main()
