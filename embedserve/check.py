"""`embedserve check`: is this bundle what it says, and how fast is it on this machine?"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embedserve.device import AUTO
from embedserve.encoder import Encoder, OutputName, Proof
from embedserve.errors import BundleError

__all__ = ["Output", "Report", "Speed", "check_bundle", "measure", "resident_bytes"]

TEXT_TOKENS = 16
"""Length of the texts that are timed: a caption or a query."""

SUM_TOLERANCE = 1e-2
"""How far above 1 the attention of one head may sum up to; half precision stays within 1e-3."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Throughput of the bare towers, without decoding, queues and HTTP. None where a tower is missing."""

    images_per_second: float | None
    """In batches of `image_batch`."""
    texts_per_second: float | None
    """In batches of `text_batch`."""
    image_batch: int | None
    text_batch: int | None
    single_images_per_second: float | None
    """One at a time: 1000 divided by it are the milliseconds of a lone image."""
    single_texts_per_second: float | None
    text_tokens: int
    """Tokens of the texts that were timed."""
    threads: int
    resident_bytes: int
    """Memory of this process after the runs; 0 where the system does not say."""


@dataclass(frozen=True, slots=True)
class Output:
    """An output beside the embedding, as it came: [cells, length] or [heads, cells] of one image."""

    name: OutputName
    shape: tuple[int, ...]
    rows: int
    columns: int
    text_space: bool


@dataclass(frozen=True, slots=True)
class Report:
    """Everything `embedserve check` says about a bundle. That it exists means that hashes and probe hold."""

    name: str
    folder: str
    fingerprint: str
    dim: int
    dims: tuple[int, ...]
    """Prefix lengths that work on their own."""
    precision: str
    towers: tuple[str, ...]
    files: int
    """Files whose sha256 is the one described."""
    bytes: int
    """Of these files."""
    device: str
    """Where the graphs ran, such as `cpu` or `cuda:0`."""
    provider: str
    """ONNX Runtime's name of the execution provider that it really took."""
    load_seconds: float
    loaded_bytes: int
    """By how much loading let this process grow in RAM."""
    proof: Proof
    outputs: tuple[Output, ...]
    speed: Speed


def check_bundle(
    folder: Path | str,
    *,
    seconds: float = 1.0,
    threads: int = 0,
    device: str = AUTO,
    engines: Path | None = None,
) -> Report:
    """Verifies every hash, loads the bundle, proves its probe and its optional outputs, and times its towers
    for `seconds` each, once in batches and once one by one.

    Raises:
        BundleError: Something about the bundle is not as described.
        InvalidField: A `device` that does not exist or does not work here.
    """
    before = resident_bytes()
    started = time.perf_counter()
    encoder = Encoder.load(folder, threads=threads, device=device, engines=engines)
    loaded = time.perf_counter() - started
    grown = max(0, resident_bytes() - before)
    bundle = encoder.bundle
    described = bundle.description
    towers = [name for name, has in (("image", encoder.has_images), ("text", encoder.has_text)) if has]
    return Report(
        name=encoder.name,
        folder=str(bundle.folder),
        fingerprint=bundle.fingerprint,
        dim=encoder.dim,
        dims=described.dims,
        precision=described.precision,
        towers=tuple(towers),
        files=len(described.files),
        bytes=sum(bundle.path(name).stat().st_size for name in described.files),
        device=str(encoder.device),
        provider=encoder.provider,
        load_seconds=loaded,
        loaded_bytes=grown,
        proof=encoder.prove(),
        outputs=check_outputs(encoder),
        speed=measure(encoder, seconds),
    )


def check_outputs(encoder: Encoder) -> tuple[Output, ...]:
    """Runs what the bundle offers beside its vectors, on a random image.

    Raises:
        BundleError: An output of another form than described, with values that are not finite, or attention
            that is not one.
    """
    image = encoder.bundle.description.image
    outputs = image.outputs if image else None
    if image is None or outputs is None:
        return ()
    spec = image.preprocessing
    names: list[OutputName] = [
        name for name in ("patches", "attention") if getattr(outputs, name) is not None
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, 3), dtype=np.uint8)
    looks = encoder.look([pixels], names)
    alone = encoder.embed_images([pixels])
    if not np.allclose(looks.vectors, alone, atol=1e-3):
        raise BundleError(
            f"'{encoder.bundle.folder}' gives another vector when '{names[0]}' is fetched with it. "
            "Export the bundle again."
        )
    cells = outputs.rows * outputs.columns
    found = []
    for name in names:
        one = looks.outputs[name][0]
        wanted = (cells, outputs.patches) if name == "patches" else (outputs.attention, cells)
        if one.shape != wanted or not np.isfinite(one).all():
            raise BundleError(
                f"The output '{name}' of '{encoder.bundle.folder}' is {list(one.shape)}, or not finite; "
                f"{list(wanted)} is described. Export the bundle again."
            )
        if name == "attention" and (one.min() < 0 or one.sum(axis=1).max() > 1 + SUM_TOLERANCE):
            raise BundleError(
                f"The output 'attention' of '{encoder.bundle.folder}' holds negative weights, or a head "
                "whose weights sum up to more than 1. Export the bundle again."
            )
        found.append(Output(name, one.shape, outputs.rows, outputs.columns, outputs.text_space))
    return tuple(found)


def measure(encoder: Encoder, seconds: float) -> Speed:
    """Runs each tower for `seconds` with full batches of random input, and as long with single inputs."""
    random = np.random.default_rng(0)
    images = texts = single_image = single_text = image_batch = text_batch = None
    image = encoder.bundle.description.image
    if image is not None:
        image_batch = encoder.images_per_run
        shape = (image_batch, image.preprocessing.height, image.preprocessing.width, 3)
        pixels = list(random.integers(0, 256, shape, dtype=np.uint8))
        images = _per_second(lambda: encoder.embed_images(pixels), image_batch, seconds)
        single_image = _per_second(lambda: encoder.embed_images(pixels[:1]), 1, seconds)
    if encoder.has_text:
        length = min(TEXT_TOKENS, encoder.tokenizer.context)
        text_batch = count = max(1, encoder.tokens_per_run // encoder.tokenizer.padded_length(length))
        text = encoder.tokenize(["probe " * length])[0][:length] or [encoder.tokenizer.vocabulary - 1]
        texts = _per_second(lambda: encoder.embed_texts([text] * count), count, seconds)
        single_text = _per_second(lambda: encoder.embed_texts([text]), 1, seconds)
    return Speed(
        images_per_second=images,
        texts_per_second=texts,
        image_batch=image_batch,
        text_batch=text_batch,
        single_images_per_second=single_image,
        single_texts_per_second=single_text,
        text_tokens=TEXT_TOKENS,
        threads=encoder.threads,
        resident_bytes=resident_bytes(),
    )


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
