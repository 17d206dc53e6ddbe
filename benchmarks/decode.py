"""What decoding a 12-megapixel JPEG costs with and without shrink-on-load, and what it does to the embedding.

    python -m benchmarks.decode [--photos FOLDER]

Columns: the size that is decoded, median milliseconds of processor time for decoding and for preprocessing,
the mean absolute difference of the encoder's input (of 255) from the unshrunk one, and the worst cosine
between the two embeddings over all photos. The photos are synthetic unless a folder of JPEGs is given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.machine import machine
from benchmarks.photos import photo
from embedserve.config import Limits
from embedserve.decode import decode
from embedserve.encoder import Encoder
from embedserve.preprocess import OVERSAMPLING, preprocess, shrink_target, thumbnail

LIMITS = Limits()


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """The median processor time of `work` on this thread, after one round to warm up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        work()
        times.append(time.thread_time() - start)
    return statistics.median(times) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default="starter", help="'starter' or a bundle's folder")
    parser.add_argument("--photos", type=Path, help="folder of JPEGs instead of synthetic ones")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()

    if arguments.photos:
        files = [path.read_bytes() for path in sorted(arguments.photos.glob("*.jp*g"))]
    else:
        files = [photo(4000, 3000, seed) for seed in range(4)]
    encoder = Encoder.load(arguments.encoder)
    tower = encoder.bundle.description.image
    if tower is None or not files:
        parser.error("needs an encoder with an image tower and at least one JPEG")
    spec = tower.preprocessing
    unit = shrink_target(spec) // OVERSAMPLING  # the pixels that the resize ends with

    whole = [preprocess(decode(file, LIMITS), spec) for file in files]
    reference = encoder.embed_images(whole)
    print(machine())
    print(
        f"{len(files)} JPEGs, the first of {len(files[0]) / 1e6:.1f} MB; "
        f"{encoder.name}, which resizes to {unit} pixels\n"
    )
    print("| shortest side kept | decoded to | decode ms | preprocess ms | input differs by | worst cosine |")
    print("|---|---|---|---|---|---|")
    for factor in (None, 4, 2, 1):
        shrink_to = None if factor is None else factor * unit
        image = decode(files[0], LIMITS, shrink_to=shrink_to)
        decoding = milliseconds(lambda to=shrink_to: decode(files[0], LIMITS, shrink_to=to), arguments.rounds)
        preparing = milliseconds(lambda picture=image: preprocess(picture, spec), arguments.rounds)
        pixels = [preprocess(decode(file, LIMITS, shrink_to=shrink_to), spec) for file in files]
        differences = np.abs(np.stack(pixels).astype(int) - np.stack(whole))
        cosine = (encoder.embed_images(pixels) * reference).sum(axis=1).min()
        kept = "all" if factor is None else f"{factor} × {unit}{' (used)' if factor == OVERSAMPLING else ''}"
        print(
            f"| {kept} | {image.width} × {image.height} | {decoding:.1f} | {preparing:.1f} "
            f"| {differences.mean():.2f} | {cosine:.4f} |"
        )
    image = decode(files[0], LIMITS, shrink_to=shrink_target(spec))
    making = milliseconds(lambda: thumbnail(image), arguments.rounds)
    print(f"\nthumbnail of the one used: {making:.1f} ms, {len(thumbnail(image)):,} bytes")


if __name__ == "__main__":
    main()
