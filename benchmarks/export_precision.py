"""What other precisions do to speed and to vectors: `python -m benchmarks.export_precision`.

Real architectures with random weights (no download): open_clip's ViT-B-32, both towers, and timm's ResNet-50.
PyTorch and every graph take turns within one run, one thread each, in batches of 8. Cosines of random weights
say less than those of trained ones: their layers have no outliers, and all inputs have nearly one vector.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine
from embedserve.config import Limits
from embedserve.encoder import Encoder
from training.export import export
from training.export.calibration import built_in
from training.export.original import Choices, Original
from training.export.precision import Inputs
from training.export.precision.choosing import LEAST_COSINE, LEAST_OVERLAP
from training.export.precision.forms import FLOAT16, INT8, layers
from training.export.precision.judging import embed, judge, speeds
from training.export.sources import open_clip, timm
from training.export.towers import ImageGraph, TextGraph

SOURCES = {"open_clip": (open_clip, "ViT-B-32"), "timm": (timm, "resnet50")}
ROUNDS = 3


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sources", default=",".join(SOURCES), help="with commas between them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}, torch {torch.__version__}; one thread, batches of 8\n")
    print(
        "| encoder | tower | computed in | inputs/s | of PyTorch | least cosine | top-10 | alone–batch | MB |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    for name in arguments.sources.split(","):
        module, rest = SOURCES[name]
        torch.manual_seed(0)
        original = module.original(rest, Choices(random=True))
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            bundle = export(f"{name}:{rest}", Path(folder) / "bundle", choices=Choices(random=True))
            for tower, inputs, network in towers(Encoder.load(bundle.folder), original):
                measure(f"{rest} | {tower}", bundle.folder / f"{tower}.onnx", inputs, network, Path(folder))


def towers(encoder: Encoder, original: Original) -> list[tuple[str, Inputs, torch.nn.Module]]:
    """Each tower with the calibration set as it takes it, and its network in PyTorch."""
    found: list[tuple[str, Inputs, torch.nn.Module]] = []
    calibration = built_in()
    if original.images is not None:
        rows = [encoder.read_image(one.data, Limits()) for one in calibration.pictures]
        images = original.images
        found.append(("image", Inputs(rows, np.stack), ImageGraph(images.network, images.mean, images.std)))
    if original.texts is not None:
        tokens = [np.array(ids, np.int64) for ids in encoder.tokenize(calibration.texts)]
        pad = encoder.tokenizer.pad
        found.append(
            (
                "text",
                Inputs(tokens, lambda some: pad([row.tolist() for row in some])),
                TextGraph(original.texts.network),
            )
        )
    return found


def measure(what: str, path: Path, inputs: Inputs, network: torch.nn.Module, folder: Path) -> None:
    """A line for PyTorch, float32 and every form, with all layers brought to it."""
    expected = embed(path, inputs.batches(8))
    written: dict[str, Path] = {"float32": path}
    for form in (FLOAT16, *INT8):
        names: Sequence[str] = layers(path, form)
        if form is FLOAT16 or names:
            out = folder / f"{path.stem}-{form.name.replace(' ', '-')}.onnx"
            form.write(path, out, inputs.batches(8), names)
            written[form.name] = out
    pytorch = _torch_speed(network, inputs)
    rates = speeds(list(written.values()), inputs)
    print(f"| {what} | PyTorch float32 | {pytorch:.1f} | 1.0 | | | | |", flush=True)
    for (form_name, file), rate in zip(written.items(), rates, strict=True):
        found = judge(file, inputs, expected)
        kept = found.min_cosine >= LEAST_COSINE and found.top10_overlap >= LEAST_OVERLAP
        print(
            f"| {what} | {form_name}{'' if kept else ' (refused)'} | {rate:.1f} | {rate / pytorch:.1f} | "
            f"{found.min_cosine:.5f} | {found.top10_overlap:.3f} | {found.batch_cosine:.6f} | "
            f"{graph_size(file) / 1e6:.0f} |",
            flush=True,
        )


def graph_size(path: Path) -> int:
    """Bytes of a graph and of the weights beside it."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def _torch_speed(network: Any, inputs: Inputs) -> float:
    batches = [torch.from_numpy(batch) for batch in inputs.batches(8)[:4]]
    run: Callable[[], None] = lambda: [network(batch) for batch in batches] and None  # noqa: E731
    seconds = []
    with torch.no_grad():
        run()
        for _ in range(ROUNDS):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
    return sum(len(batch) for batch in batches) / statistics.median(seconds)


if __name__ == "__main__":
    main()
