"""The process that `test_crash.py` kills: it writes from several threads and reports every step.

    python -m tests.indexes.crash_writer FOLDER SEED

Each thread has ids of its own, so an id has at most one write under way. Lines on standard output are written
whole by one system call: `begin ROUND-STEP OPERATION ID…` before a write, `done ROUND-STEP` after the store
acknowledged it, `sorry` never.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from indexes.local import LocalStore

DIM = 16
THREADS = 4
IDS = 60


def vector_of(name: str, version: str) -> NDArray[np.float32]:
    """The vector of one version of an item, of any length."""
    seed = list(f"{name} {version}".encode())
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def report(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def work(store: LocalStore, seed: int, thread: int) -> None:
    choose = random.Random(f"{seed} {thread}")
    own = [f"thread {thread}/{i}" for i in range(IDS)]
    step = 0
    while True:
        step += 1
        version = f"{seed}-{thread}-{step}"
        names = choose.sample(own, choose.choice([1, 1, 1, 3, 10, 40]))
        if choose.random() < 0.7:
            report(f"begin\t{version}\tupsert\t" + "\t".join(names))
            numbers = np.stack([vector_of(name, version) for name in names])
            store.upsert(names, numbers, [{"version": version, "name": name} for name in names])
        elif choose.random() < 0.8:
            report(f"begin\t{version}\tdelete\t" + "\t".join(names))
            store.delete(names)
        else:
            names = own
            report(f"begin\t{version}\tdelete\t" + "\t".join(names))
            store.delete(filter={"name": {"$in": names}})
        report(f"done\t{version}")


def main() -> None:
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    # Short tails and frequent saves, for the kill to meet merges and cache files half written.
    store = LocalStore(folder, DIM, tail_rows=64, save_rows=64)
    report("open")
    for thread in range(THREADS):
        threading.Thread(target=work, args=(store, seed, thread), daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
