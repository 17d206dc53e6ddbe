"""Measurements that take long: each in a process of its own, so that one which fails takes no other with it.

    OUT/settings.json        what is measured; a call with other settings is refused
    OUT/results/NAME.json    what a job found: it is not run again
    OUT/unfinished/NAME/     what a job goes on from when it was stopped
    OUT/logs/NAME.txt        what it printed

A benchmark calls itself once for each job, with its own arguments and `--only NAME`. A time limit stops the
job that runs; the same command, given again, goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from training.run import read_json, write_json

__all__ = ["LEAST_LIMIT_S", "Jobs", "Stopped", "Usage", "stop_requested"]

STOPPED = 75
"""Exit status of a job that was stopped and has saved what it needs (EX_TEMPFAIL)."""
GRACE_S = 30.0
"""Seconds before the time limit at which a job is asked to stop."""


LEAST_LIMIT_S = 4 * GRACE_S
"""A time limit below which nothing would be done."""


class Stopped(Exception):
    """A job was asked to stop, and can go on later."""


@dataclass(frozen=True)
class Jobs:
    """The jobs of one benchmark.

    Args:
        out: The folder that everything is kept in.
        module: The benchmark, such as "benchmarks.training_quality".
    """

    out: Path
    module: str

    def require(self, settings: Mapping[str, Any]) -> None:
        """Exits when `out` holds results under other settings."""
        file = self.out / "settings.json"
        self.out.mkdir(parents=True, exist_ok=True)
        wanted = json.loads(json.dumps(settings))
        if not file.exists():
            write_json(file, wanted)
            return
        for key, then in read_json(file).items():
            if then != wanted.get(key):
                raise SystemExit(
                    f"'{self.out}' holds results with {key}={then}, not {wanted.get(key)}; repeat that "
                    "command to go on, or give another --out."
                )

    def work(self, name: str) -> Path:
        """The folder of a job, made when missing."""
        folder = self.out / "unfinished" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def result(self, name: str) -> dict[str, Any] | None:
        """What a job found, once it is done."""
        file = self.out / "results" / f"{name}.json"
        return read_json(file) if file.exists() else None

    def execute(self, name: str, measure: Callable[[], Mapping[str, Any]]) -> None:
        """Runs one job in this process and keeps its result; exits with `STOPPED` where it raises Stopped."""
        try:
            found = measure()
        except Stopped:
            sys.exit(STOPPED)
        (self.out / "results").mkdir(exist_ok=True)
        write_json(self.out / "results" / f"{name}.json", found)

    def run(self, names: Sequence[str], *, time_limit: float) -> bool:
        """Runs the jobs that have no result yet, one after the other.

        Args:
            names: The jobs.
            time_limit: Seconds after which it stops; 0 for none.

        Returns:
            Whether it got to the end. Jobs that failed are named on the way, and have no result.
        """
        deadline = time.monotonic() + time_limit if time_limit else float("inf")
        (self.out / "logs").mkdir(exist_ok=True)
        for name in names:
            if self.result(name) is not None:
                continue
            if deadline - time.monotonic() <= 2 * GRACE_S:
                return False
            started = time.monotonic()
            status = self._spawn(name, deadline - GRACE_S)
            if status == STOPPED:
                print(f"{name}: stopped, to be gone on with", flush=True)
                return False
            said = "done" if status == 0 else f"FAILED, see {self.out / 'logs' / f'{name}.txt'}"
            print(f"{name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
        return True

    def _spawn(self, name: str, stop_at: float) -> int:
        command = [sys.executable, "-m", self.module, *sys.argv[1:], "--only", name]
        with (self.out / "logs" / f"{name}.txt").open("a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"}
            )
            left = None if stop_at == float("inf") else max(stop_at - time.monotonic(), 0.0)
            try:
                return process.wait(left)
            except subprocess.TimeoutExpired:
                process.terminate()
            except KeyboardInterrupt:  # the terminal has told the job as well
                process.wait()
                raise
            try:
                process.wait(GRACE_S - 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            # What it could not save is measured again.
            return STOPPED


@dataclass(frozen=True)
class Usage:
    """Time and memory that a job takes, added up over all its parts.

    Args:
        folder: The job's.
        device: The memory of a GPU is what torch had in use at most; that of a CPU the process's.
    """

    folder: Path
    device: torch.device

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Adds what happens inside, even where it ends with an exception."""
        started = time.perf_counter()
        try:
            yield
        finally:
            before = self.read()
            used = {
                "seconds": before["seconds"] + time.perf_counter() - started,
                "gb": max(before["gb"], self._memory() / 1e9),
            }
            write_json(self.folder / "usage.json", used)

    def read(self) -> dict[str, float]:
        """'seconds' and 'gb' so far."""
        file = self.folder / "usage.json"
        return read_json(file) if file.exists() else {"seconds": 0.0, "gb": 0.0}

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C or SIGTERM has come; neither ends the process meanwhile."""
    event = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        event.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
