"""What the machine can do: decode + session.run with no server, no queue and no HTTP around them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from embedserve.config import Limits
from embedserve.encoder import Encoder

Session = onnxruntime.InferenceSession
Work = Callable[[Session, int, int], None]
"""(session, batch size, position of the first input) → one run of the session."""
Arrangement = tuple[Session, int, int]
"""(session, threads that call it, batch size)"""


class Limit:
    """The best of several arrangements of the same work: one thread whose session uses every core, or one
    thread for each core whose session uses that core alone; on batches of the sizes asked for.

    The arrangement is chosen in the first measurement and kept: the fastest of several noisy measurements,
    taken anew each time, would be too high.
    """

    def __init__(self, encoder: Encoder) -> None:
        described = encoder.bundle.description
        if described.image is None or described.text is None:
            raise ValueError(f"'{encoder.name}' lacks a tower; measure an encoder of images and texts")
        self.encoder = encoder
        self.cores = len(os.sched_getaffinity(0))
        self._chosen: dict[object, Arrangement] = {}
        self.image_sessions = self._sessions(encoder.bundle.path(described.image.file))
        self.text_sessions = self._sessions(encoder.bundle.path(described.text.file))

    def images_per_second(self, photos: Sequence[bytes], seconds: float) -> float:
        def work(session: Session, batch: int, first: int) -> None:
            chosen = [photos[(first + i) % len(photos)] for i in range(batch)]
            pixels = [self.encoder.read_image(data, Limits()) for data in chosen]
            session.run(None, {session.get_inputs()[0].name: np.stack(pixels)})

        return self._best(("images", len(photos[0])), self.image_sessions, work, seconds, batches=(1, 8))

    def texts_per_second(self, texts: Sequence[str], batch: int, seconds: float) -> float:
        def work(session: Session, batch: int, first: int) -> None:
            tokens = self.encoder.tokenize([texts[(first + i) % len(texts)] for i in range(batch)])
            padded = np.zeros((batch, max(map(len, tokens))), np.int64)
            for row, ids in zip(padded, tokens, strict=True):
                row[: len(ids)] = ids
            session.run(None, {session.get_inputs()[0].name: padded})

        return self._best(("texts", batch), self.text_sessions, work, seconds, batches=(batch,))

    def _sessions(self, path: Path) -> dict[int, Session]:
        """By number of threads."""
        sessions = {}
        for threads in {1, self.cores}:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            options.log_severity_level = 3
            sessions[threads] = Session(path, options, providers=["CPUExecutionProvider"])
        return sessions

    def _best(
        self,
        what: tuple[str, int],
        sessions: dict[int, Session],
        work: Work,
        seconds: float,
        *,
        batches: Sequence[int],
    ) -> float:
        if what not in self._chosen:
            arrangements: list[Arrangement] = [(sessions[self.cores], 1, batch) for batch in batches]
            arrangements += [(sessions[1], self.cores, batch) for batch in batches]
            share = seconds / len(arrangements)
            self._chosen[what] = max(arrangements, key=lambda one: _rate(*one, work, share))
        return _rate(*self._chosen[what], work, seconds)


def _rate(session: Session, workers: int, batch: int, work: Work, seconds: float) -> float:
    work(session, batch, 0)
    done = [0] * workers
    start = time.perf_counter()

    def loop(worker: int) -> None:
        while time.perf_counter() - start < seconds:
            work(session, batch, done[worker])
            done[worker] += batch

    threads = [threading.Thread(target=loop, args=(worker,)) for worker in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - start)
