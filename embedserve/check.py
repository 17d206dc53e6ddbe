"""`embedserve check`: is this bundle what it says, and how fast is it on this machine?"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedserve.encoder import Encoder, Proof

__all__ = ["Report", "Speed", "check_bundle", "measure", "resident_bytes"]

TEXT_TOKENS = 16
"""Length of the texts that are timed: a caption or a query."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Throughput of the bare towers, without decoding, queues and HTTP. None where a tower is missing."""

    images_per_second: float | None
    texts_per_second: float | None
    text_tokens: int
    """Tokens of the texts that were timed."""
    threads: int
    resident_bytes: int
    """Memory of this process after the runs; 0 where the system does not say."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `embedserve check` says about a bundle. That it exists means that hashes and probe hold."""

    name: str
    folder: str
    fingerprint: str
    dim: int
    towers: tuple[str, ...]
    files: int
    """Files whose sha256 is the one described."""
    load_seconds: float
    proof: Proof
    speed: Speed


def check_bundle(folder: Path | str, *, seconds: float = 1.0, threads: int = 0) -> Report:
    """Verifies every hash, loads the bundle, proves its probe and times its towers for `seconds` each.

    Raises:
        BundleError: Something about the bundle is not as described.
    """
    started = time.perf_counter()
    encoder = Encoder.load(folder, threads=threads)
    loaded = time.perf_counter() - started
    bundle = encoder.bundle
    towers = [name for name, has in (("image", encoder.has_images), ("text", encoder.has_text)) if has]
    return Report(
        name=encoder.name,
        folder=str(bundle.folder),
        fingerprint=bundle.fingerprint,
        dim=encoder.dim,
        towers=tuple(towers),
        files=len(bundle.description.files),
        load_seconds=loaded,
        proof=encoder.prove(),
        speed=measure(encoder, seconds),
    )


def measure(encoder: Encoder, seconds: float) -> Speed:
    """Runs each tower for `seconds` with full batches of random input."""
    random = np.random.default_rng(0)
    images = texts = None
    image = encoder.bundle.description.image
    if image is not None:
        shape = (encoder.images_per_run, image.preprocessing.height, image.preprocessing.width, 3)
        pixels = list(random.integers(0, 256, shape, dtype=np.uint8))
        images = _per_second(lambda: encoder.embed_images(pixels), len(pixels), seconds)
    if encoder.has_text:
        length = min(TEXT_TOKENS, encoder.tokenizer.context)
        count = max(1, encoder.tokens_per_run // encoder.tokenizer.padded_length(length))
        text = encoder.tokenize(["probe " * length])[0][:length] or [encoder.tokenizer.vocabulary - 1]
        texts = _per_second(lambda: encoder.embed_texts([text] * count), count, seconds)
    return Speed(images, texts, TEXT_TOKENS, encoder.threads, resident_bytes())


def resident_bytes() -> int:
    """Memory that this process has in RAM now; on systems other than Linux the most it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _per_second(run: Callable[[], object], count: int, seconds: float) -> float:
    run()  # the first one allocates
    runs, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds or not runs:
        run()
        runs += 1
    return runs * count / elapsed
