"""kill -9 while threads write: what was acknowledged is there, what was deleted stays away.

One store lives through all rounds. `EMBEDSERVE_CRASH_ROUNDS=50` runs more; `pytest -s` shows the sums.
"""

from __future__ import annotations

import os
import random
import select
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from indexes.base import check_vectors
from indexes.local import LocalStore
from tests.indexes.crash_writer import DIM, IDS, THREADS, vector_of

ROUNDS = int(os.environ.get("EMBEDSERVE_CRASH_ROUNDS", "5"))
ROOT = Path(__file__).parents[2]


@dataclass
class Expected:
    """By id, the version acknowledged last (None: deleted), and the one under way when the end came."""

    acknowledged: dict[str, str | None] = field(default_factory=dict)
    under_way: dict[str, str | None] = field(default_factory=dict)
    writes: int = 0
    rows: int = 0

    def read(self, lines: list[str]) -> None:
        begun: dict[str, dict[str, str | None]] = {}
        for line in lines:
            match line.split("\t"):
                case ["begin", version, operation, *names]:
                    begun[version] = dict.fromkeys(names, version if operation == "upsert" else None)
                case ["done", version]:
                    outcome = begun.pop(version)
                    self.acknowledged |= outcome
                    self.writes += 1
                    self.rows += len(outcome)
        self.under_way = {name: version for outcome in begun.values() for name, version in outcome.items()}

    def allows(self, name: str, version: str | None) -> bool:
        if version == self.acknowledged.get(name):
            return True
        return name in self.under_way and version == self.under_way[name]


def _run_and_kill(folder: Path, seed: int, choose: random.Random) -> list[str]:
    """The child's lines up to the kill, which comes at a random moment after a random number of them."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.indexes.crash_writer", str(folder), str(seed)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    try:
        received = bytearray()
        enough, deadline = choose.randrange(1, 400), time.monotonic() + 60
        while received.count(b"\n") <= enough:
            ready, _, _ = select.select([child.stdout], [], [], deadline - time.monotonic())
            assert ready, "the writer stood still for a minute"
            piece = os.read(child.stdout.fileno(), 65536)
            assert piece, f"the writer ended by itself: {child.wait()}"
            received += piece
        time.sleep(choose.random() * 0.02)  # anywhere inside a commit, not only just after a report
    finally:
        child.kill()
    received += child.stdout.read()
    child.stdout.close()
    child.wait()
    return received.decode().split("\n")[:-1]


def _check(folder: Path, expected: Expected) -> int:
    with LocalStore(folder, DIM, tail_rows=64, save_rows=64) as store:
        stored = {item.id: item for item in store}
        names = [f"thread {thread}/{i}" for thread in range(THREADS) for i in range(IDS)]
        for name in names:
            found = stored.get(name)
            version = None if found is None else found.metadata["version"]
            assert expected.allows(name, version), (
                f"'{name}' has {version}; acknowledged {expected.acknowledged.get(name)}, "
                f"under way {expected.under_way.get(name, 'nothing')}"
            )
            if found is not None:
                assert found.metadata["name"] == name
                (unit,) = check_vectors([vector_of(name, str(version))], DIM)
                assert found.vector.tolist() == unit.astype(np.float16).tolist()
        assert set(stored) <= set(names)
        assert store.count() == len(stored)
        assert store.stats()["damaged"] == 0
        if stored:
            # The index holds the very same items: each finds itself, and nothing else turns up.
            answers = store.search(np.stack([item.vector for item in stored.values()]), len(names))
            for item, hits in zip(stored.values(), answers, strict=True):
                assert hits.ids[0] == item.id
                assert hits.metadata[0] == item.metadata
                assert set(hits.ids) == set(stored)
        # What the kill left open is settled now.
        expected.acknowledged = {name: item.metadata["version"] for name, item in stored.items()}
        return len(stored)


@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_no_acknowledged_write_is_lost_and_no_deleted_item_comes_back(tmp_path: Path) -> None:
    choose, expected, left_open = random.Random(20), Expected(), 0
    for turn in range(ROUNDS):
        expected.read(_run_and_kill(tmp_path, turn, choose))
        left_open += bool(expected.under_way)
        _check(tmp_path, expected)
    print(
        f"\n{ROUNDS} kills (in {left_open} a write was under way): {expected.writes} writes with "
        f"{expected.rows} rows acknowledged, 0 lost, 0 came back"
    )
    assert expected.rows > 50 * ROUNDS
