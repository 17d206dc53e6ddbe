"""Source images/s of training: the whole loop, the limit, and lightly, on one device in one run.

    python -m benchmarks.training_speed                        # a GPU: ResNet-18, 32 pixels, batch 512, bf16
    python -m benchmarks.training_speed --batch 64 --steps 12 --methods simclr,byol     # two cores

- *whole loop*: `training.train` as a user runs it, on decoded images of CIFAR's form: order, views, forward,
  backward, optimiser, moving averages, logs. Read from its metrics.jsonl, after the first quarter.
- *limit*: forward and backward of the same method alone, on one batch of views that is already there.
- *lightly*: `benchmarks.peers`, the same network, optimiser, precision and batch.

A source image is one image of the data set, whatever the number of its views.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.machine import machine
from benchmarks.peers import PEERS, batches, require_lightly
from training.backbones import build
from training.method import Batch
from training.precision import Precision
from training.run import build_method
from training.schedules import Now
from training.settings import DataFacts, Settings, resolve
from training.train import train

METHODS = ("simclr", "byol", "moco_v2", "swav", "dino")


def main() -> None:
    """Prints the table as Markdown and, with --json, writes it."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    pixels = _pictures(arguments.images, arguments.size)
    version = require_lightly() if arguments.peer else ""
    rows: list[dict[str, Any]] = []
    for name in arguments.methods.split(","):
        settings = _settings(name, arguments, device)
        measurements: dict[str, Callable[[], float]] = {
            "loop": partial(_whole_loop, name, pixels, arguments),
            "limit": partial(_limit, settings, device, arguments.steps),
        }
        if arguments.compile:
            measurements["compiled"] = partial(_whole_loop, name, pixels, arguments, compile="true")
        if arguments.peer:
            measurements["lightly"] = partial(_peer, settings, pixels, device, arguments)
        row: dict[str, Any] = {"method": name}
        rows.append(row)
        for what, measure in measurements.items():
            row[what] = measure()
            print(f"{name} {what}: {row[what]:,.0f} images/s", flush=True)
    print(f"\n{machine()}, torch {torch.__version__}, lightly {version}; {_device_name(device)}")
    print(
        f"{arguments.backbone}, {arguments.size} px, batch {arguments.batch}, {arguments.workers} workers\n"
    )
    print("\n".join(table(rows)))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A Markdown table with a row for each method; the ratio is that of the faster of our two loops."""
    lines = [
        "| method | whole loop, images/s | of forward + backward | with compile=true | lightly | ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        compiled, peer = row.get("compiled"), row.get("lightly")
        best = max(row["loop"], compiled or 0)
        cells = [f"{row['loop']:,.0f}", f"{row['loop'] / row['limit']:.0%}"]
        cells += [f"{one:,.0f}" if one else "–" for one in (compiled, peer)]
        cells += [f"{best / peer:.1f}" if peer else "–"]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return lines


def _arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas between them")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=512 if on_gpu else 64, help="images of a step")
    parser.add_argument("--steps", type=int, default=200 if on_gpu else 12, help="steps that are timed")
    parser.add_argument("--images", type=int, default=50_000 if on_gpu else 2_000)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="lightly's processes"
    )
    parser.add_argument("--compile", action="store_true", help="the loop with compile=true as well")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="without lightly")
    parser.add_argument("--json", default="", help="write the figures to this file")
    return parser.parse_args()


def _pictures(count: int, size: int) -> NDArray[np.uint8]:
    """Smooth noise: decoded already, so that its contents do not matter for the speed."""
    small = np.random.default_rng(0).integers(0, 256, (count, size // 4, size // 4, 3), np.uint8)
    return small.repeat(4, axis=1).repeat(4, axis=2)


def _given(arguments: argparse.Namespace, steps: int) -> dict[str, str]:
    epochs = -(-steps // (arguments.images // arguments.batch))
    return {
        "backbone": arguments.backbone,
        "size": str(arguments.size),
        "stored_size": str(arguments.size),
        "batch_size": str(arguments.batch),
        "epochs": str(epochs),
        "holdout": "0",
        "device": arguments.device,
        "log_every": str(max(1, steps // 8)),
        "checkpoint_every": "1000000",
        "knn_every": "1000000",
        "warmup_epochs": "0",
    }


def _settings(name: str, arguments: argparse.Namespace, device: torch.device) -> Settings:
    on_gpu = device.type == "cuda"
    known = DataFacts(images=arguments.images, heldout=0, native_size=arguments.size, on_gpu=on_gpu)
    return resolve(name, "", _given(arguments, arguments.steps), known)


def _whole_loop(name: str, pixels: NDArray[np.uint8], arguments: argparse.Namespace, **more: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "cifar"
        data.mkdir()
        _write(data, pixels)
        given = {
            **_given(arguments, arguments.steps + arguments.steps // 3),
            "cache_folder": f"{folder}/cache",
            **more,
        }
        train(name, str(data), Path(folder) / "run", given)
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").open()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(speeds[len(speeds) // 4 :])


def _limit(settings: Settings, device: torch.device, steps: int) -> float:
    torch.manual_seed(0)
    method = build_method(settings, start="").to(device)
    method.to(memory_format=torch.channels_last)
    precision = Precision("auto", device, deterministic=False)
    now = Now(0, 1000, 100)
    views = [
        torch.randn(settings.config.batch_size, 3, view.size, view.size, device=device)
        for view in type(method).views(settings.augmentation, settings.options, settings.facts)
    ]
    batch = Batch(
        views,
        torch.arange(settings.config.batch_size, device=device),
        now,
        {name: schedule(now) for name, schedule in method.schedules().items()},
    )
    for step in range(steps + steps // 3):
        if step == steps // 3:
            started = _now(device)
        with precision.autocast():
            loss = method(batch)["loss"]
        loss.backward()
        method.zero_grad(set_to_none=True)
        method.after_step(now, batch.values)
    return steps * settings.config.batch_size / (_now(device) - started)


def _peer(
    settings: Settings, pixels: NDArray[np.uint8], device: torch.device, arguments: argparse.Namespace
) -> float:
    torch.manual_seed(0)
    backbone = build(settings.config.backbone, settings.config.size)
    peer = PEERS[settings.config.method](backbone, backbone.dim, settings.config.size).to(device)
    peer.to(memory_format=torch.channels_last)
    precision = Precision("auto", device, deterministic=False)
    trained = [one for one in peer.parameters() if one.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.06, momentum=0.9, weight_decay=5e-4)
    stream = batches(pixels, peer, batch=settings.config.batch_size, workers=arguments.workers, device=device)
    steps = arguments.steps if device.type == "cpu" else max(20, arguments.steps // 4)
    for step in range(steps + steps // 3):
        if step == steps // 3:
            started = _now(device)
        with precision.autocast():
            loss = peer.loss(next(stream))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        peer.after_step()
    return steps * settings.config.batch_size / (_now(device) - started)


def _write(folder: Path, pixels: NDArray[np.uint8]) -> None:
    """As CIFAR-10's binary files where the images are 32 × 32, else as PNG files."""
    if pixels.shape[1:3] == (32, 32):
        rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
        labelled = np.concatenate([np.zeros((len(rows), 1), np.uint8), rows], axis=1)
        (folder / "data_batch_1.bin").write_bytes(labelled.tobytes())
        return
    for index, one in enumerate(pixels):
        Image.fromarray(one).save(folder / f"{index:06d}.png")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


if __name__ == "__main__":
    main()
