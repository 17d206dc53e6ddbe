"""Images/s and texts/s of a ViT-B/32 with random weights on the CPU and, where there is one, on a GPU.

    python -m benchmarks.gpu_serving [--seconds 3] [--small] [--batch 64] [--devices cpu,cuda,tensorrt]

Compares the CPU, CUDA in float32 and float16, and TensorRT in float16, each with and without buffers on the
device (I/O binding). A device that does not work here is left out, with the reason. These are bare runs,
without decoding and HTTP, as `embedserve check --device` makes them; the last column is the least cosine to
the vectors of the first row. Without a GPU a small network is taken, unless --full.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import machine
from benchmarks.vit_bundle import CONTEXT, SMALL, VIT_B_32, Shape, write_vit_bundle
from embedserve.bundle import Bundle
from embedserve.device import Device, choose
from embedserve.errors import EmbedServeError
from embedserve.graph import Graph, available_cores

TEXT_TOKENS = 16


class Case(NamedTuple):
    device: Device
    half: bool
    bind: bool

    def __str__(self) -> str:
        precision = "float16" if self.half else "float32"
        return f"{self.device.kind}, {precision}, {'buffers' if self.bind else 'no buffers'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--devices", default="cpu,cuda,tensorrt")
    parser.add_argument("--small", action="store_true", help="a small network, for a try")
    parser.add_argument("--full", action="store_true", help="ViT-B/32 also where there is no GPU")
    arguments = parser.parse_args()
    print(machine())
    devices = list(_working(arguments.devices.split(",")))
    has_gpu = any(device.is_gpu for device in devices)
    shape = SMALL if arguments.small or not (has_gpu or arguments.full) else VIT_B_32
    print(f"{shape.name}, batches of {arguments.batch}, texts of {TEXT_TOKENS} tokens, random weights\n")
    print("| device, precision, I/O | images/s | one image, ms | texts/s | one text, ms | ready s | cosine |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            half: write_vit_bundle(Path(folder) / f"half-{half}", shape, half=half) for half in (False, True)
        }
        measure = Measure(shape, arguments.batch, arguments.seconds, Path(folder) / "engines")
        for device in devices:
            for case in _cases(device):
                print(measure(case, bundles[case.half]), flush=True)


def _working(names: list[str]) -> Iterator[Device]:
    for name in names:
        try:
            yield choose(name).device
        except EmbedServeError as error:
            print(f"left out: {error}")


def _cases(device: Device) -> list[Case]:
    halves = {"cpu": [False], "cuda": [False, True], "tensorrt": [True]}[device.kind]
    return [Case(device, half, bind) for half in halves for bind in (False, True)]


class Measure:
    """Makes rows of the table, from the same random input."""

    def __init__(self, shape: Shape, batch: int, seconds: float, engines: Path) -> None:
        self.shape, self.seconds, self.engines = shape, seconds, engines
        engines.mkdir()
        random = np.random.default_rng(0)
        self.pixels = random.integers(0, 256, (batch, shape.image, shape.image, 3), np.uint8)
        self.tokens = random.integers(1, shape.vocabulary, (batch, TEXT_TOKENS))
        self.longest = random.integers(1, shape.vocabulary, (batch, CONTEXT))
        self.expected: NDArray[np.float32] | None = None

    def __call__(self, case: Case, bundle: Bundle) -> str:
        started = time.perf_counter()
        size = self.shape.image
        form = {"batch": None, "height": size, "width": size, "channels": 3}
        images = self._graph(case, bundle.path("image.onnx"), "tensor(uint8)", form)
        texts = self._graph(case, bundle.path("text.onnx"), "tensor(int64)", {"batch": None, "length": None})
        # Largest and smallest shapes first: TensorRT builds its engines for what it has seen.
        texts.run(self.longest)
        inputs = [
            (graph, batch[:n])
            for graph, batch in ((images, self.pixels), (texts, self.tokens))
            for n in (None, 1)
        ]
        for graph, batch in inputs:
            graph.run(batch)
        ready = time.perf_counter() - started
        vectors = np.concatenate([images.run(self.pixels), texts.run(self.tokens)])
        if self.expected is None:
            self.expected = vectors
        cosine = float((vectors * self.expected).sum(axis=1).min())
        many_images, one_image, many_texts, one_text = (self._per_second(*one) for one in inputs)
        return (
            f"| {case} | {many_images:,.0f} | {1000 / one_image:.2f} | {many_texts:,.0f} | "
            f"{1000 / one_text:.2f} | {ready:.1f} | {cosine:.5f} |"
        )

    def _graph(self, case: Case, path: Path, element: str, form: Mapping[str, int | None]) -> Graph:
        return Graph(
            path,
            available_cores(),
            element,
            form,
            self.shape.dim,
            device=case.device,
            half=case.half,
            engines=self.engines,
            bind=case.bind,
        )

    def _per_second(self, graph: Graph, batch: NDArray[np.generic]) -> float:
        runs, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < self.seconds or not runs:
            graph.run(batch)
            runs += 1
        return runs * len(batch) / elapsed


if __name__ == "__main__":
    main()
