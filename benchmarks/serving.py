"""Images/s and texts/s over HTTP as a share of what decode + session.run can do on the same cores.

    python -m benchmarks.serving [--seconds 4] [--rounds 5] [--connections 8]

Each round measures the limit (`benchmarks/limit.py`) and the server one after the other, so that the
machine's drift cancels in the ratio. The load generator runs on the same cores and is counted against the
server. Start-up time and resident memory come from the same server process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.limit import Limit
from benchmarks.load import Load, fire, json_request, multipart_request
from benchmarks.machine import machine, resident_bytes
from benchmarks.photos import photo
from benchmarks.server_process import Server, server
from embedserve.encoder import Encoder

PHOTOS = {"256×256": (256, 256), "640×480": (640, 480), "12 megapixel": (4000, 3000)}
COLOURS, THINGS = ("red", "green", "blue"), ("apple", "cup", "cat")
TEXTS = [f"a {colour} {thing} on the table" for colour in COLOURS for thing in THINGS]


@dataclass(frozen=True)
class Case:
    """One row of the table: prebuilt requests, and the same work without a server."""

    name: str
    unit: str
    inputs_per_request: int
    requests: Sequence[bytes]
    limit: Callable[[float], float]
    """seconds → inputs/s"""


def cases(limit: Limit) -> Iterator[Case]:
    for name, (width, height) in PHOTOS.items():
        photos = [photo(width, height, seed) for seed in range(4)]
        requests = [multipart_request("/v1/embed", data) for data in photos]
        label = f"one {name} JPEG, {len(photos[0]) // 1000} kB"
        yield Case(label, "images/s", 1, requests, lambda s, p=photos: limit.images_per_second(p, s))
    for batch in (1, 32):
        inputs = [(TEXTS * 5)[first : first + batch] for first in range(len(TEXTS))]
        requests = [json_request("/v1/embeddings", _openai(texts)) for texts in inputs]
        label = "one short text" if batch == 1 else f"{batch} short texts"
        yield Case(label, "texts/s", batch, requests, lambda s, n=batch: limit.texts_per_second(TEXTS, n, s))


def _openai(texts: Sequence[str]) -> dict[str, object]:
    return {"model": "starter", "input": texts, "encoding_format": "base64"}


def measure(case: Case, running: Server, arguments: argparse.Namespace) -> str:
    """The table row of `case`: medians over the rounds, and the median of the rounds' ratios."""
    loads: list[Load] = []
    limits: list[float] = []
    for _ in range(arguments.rounds + 1):
        limits.append(case.limit(2 * arguments.seconds))
        fired = fire(
            running.port, case.requests, connections=arguments.connections, seconds=arguments.seconds
        )
        loads.append(asyncio.run(fired))
    loads, limits = loads[1:], limits[1:]  # the first round warms up
    rates = [load.per_second * case.inputs_per_request for load in loads]
    ratio = statistics.median(rate / limit for rate, limit in zip(rates, limits, strict=True))
    p50, p99 = (statistics.median(load.percentile(share) for load in loads) * 1000 for share in (0.5, 0.99))
    return (
        f"| {case.name} | {statistics.median(rates):.0f} {case.unit} | {statistics.median(limits):.0f} "
        f"| {ratio:.0%} | {p50:.1f} | {p99:.1f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=8)
    arguments = parser.parse_args()

    starts = []
    for _ in range(arguments.rounds):
        with server() as started:
            starts.append(started.seconds_to_ready)
    print(machine())
    print(f"starter encoder, {arguments.rounds} rounds of {arguments.seconds:g} s, medians\n")
    print(f"start to ready: {statistics.median(starts):.2f} s (worst {max(starts):.2f} s)\n")
    print("| one request holds | HTTP | limit | HTTP / limit | p50 ms | p99 ms |\n|---|---|---|---|---|---|")
    limit = Limit(Encoder.load("starter"))
    with server() as running:
        at_rest = resident_bytes(running.pid)
        for case in cases(limit):
            print(measure(case, running, arguments), flush=True)
        loaded = resident_bytes(running.pid)
    print(
        f"\nresident memory: {at_rest / 2**20:.0f} MiB when ready, {loaded / 2**20:.0f} MiB after that load"
    )


if __name__ == "__main__":
    main()
