"""Pairs/s of training CLIP: the whole loop, and open_clip's own trainer, on one device in one run.

    python -m benchmarks.clip_speed            # with a GPU: ViT-B/32, 224 pixels, batch 512, bf16
    python -m benchmarks.clip_speed            # without: a small model at 64 pixels, batch 64, float32

- *open_clip*: `open_clip_train.train.train_one_epoch` with the optimiser of its `main`. Its batches are
  ready: normalised float32 images and ids of 77 tokens, on the device; it reads, crops and cuts nothing.
- *ours*: `training.train` as a user runs it, on image files and captions in a CSV: order, a caption drawn for
  each image, crops, both towers, loss, optimiser, logs. Read from its metrics.jsonl, after the first quarter.

Both train the same model with the same batch, precision, loss and AdamW (each as its own code builds it: ours
is torch's fused one), in turns; a figure is the median of the rounds. Captions that fill the context give
both the same work; those of a dozen words are what people write, and ours are cut to the longest of a batch.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.machine import machine
from training.open_clip_models import library
from training.train import train

TINY = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 192, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 192, "heads": 3, "layers": 4},
}
"""For two cores: both towers a few million numbers."""
WORDS = """
a the red green blue old small large photo drawing of on under beside with and dog cat house tree boat car
street child hand apple table chair window river mountain bird flower bread clock lamp shoe hat book road
"""
CONTEXT = 77
LR = 5e-4
THEIRS = f"open_clip, {CONTEXT} tokens"
OURS = {f"ours, captions that fill {CONTEXT} tokens": 90, "ours, 12 words": 12}
"""What is measured → words of a caption."""


def main() -> None:
    """Prints the table as Markdown and, with --json, writes it."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    speeds: dict[str, list[float]] = {name: [] for name in (THEIRS, *OURS)}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if arguments.model == "tiny":
            (place / "tiny.json").write_text(json.dumps(TINY))
            library().add_model_config(place / "tiny.json")
        for what, words in OURS.items():
            _write(_folder(place, what), max(4 * arguments.batch, 256), arguments.size, words)
        for turn in range(arguments.rounds):
            speeds[THEIRS].append(_open_clip(arguments, device))
            for what in OURS:
                _forget(device)
                speeds[what].append(_ours(_folder(place, what), turn, arguments))
            _forget(device)
            now = ", ".join(f"{what}: {values[-1]:,.0f}" for what, values in speeds.items())
            print(f"round {turn + 1}: {now}", file=sys.stderr, flush=True)
    _print(speeds, arguments, device)


def _print(speeds: dict[str, list[float]], arguments: Namespace, device: torch.device) -> None:
    found = {what: statistics.median(values) for what, values in speeds.items()}
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"\n{machine()}, torch {torch.__version__}, open_clip {library().__version__}; {where}")
    print(
        f"{arguments.model}, {arguments.size} px, batch {arguments.batch}, {arguments.precision}, "
        f"{torch.get_num_threads()} threads, medians of {arguments.rounds} rounds\n"
    )
    print("| trainer | pairs/s | ratio |\n|---|---:|---:|")
    for what, speed in found.items():
        print(f"| {what} | {speed:,.0f} | {speed / found[THEIRS]:.2f} |")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(speeds, indent=2) + "\n")


def _arguments() -> Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--model", default="ViT-B-32" if on_gpu else "tiny", help="open_clip's name, or tiny")
    parser.add_argument("--size", type=int, default=224 if on_gpu else 64, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=512 if on_gpu else 64)
    parser.add_argument("--steps", type=int, default=32 if on_gpu else 12, help="steps that are timed")
    parser.add_argument("--rounds", type=int, default=1 if on_gpu else 3)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16" if on_gpu else "fp32")
    parser.add_argument("--json", default="", help="write the figures of every round to this file")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------- open_clip


def _open_clip(arguments: Namespace, device: torch.device) -> float:
    library()  # before torchvision is imported
    from open_clip_train.train import train_one_epoch

    logging.getLogger().setLevel(logging.ERROR)
    torch.manual_seed(0)
    model = library().create_model(
        arguments.model, load_weights=False, output_dict=True, force_image_size=arguments.size
    )
    model.to(device)
    named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    vectors = [one for name, one in named if _is_vector(name, one)]
    weights = [one for name, one in named if not _is_vector(name, one)]
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": weights, "weight_decay": 0.1}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.98), eps=1e-6)
    loader = _Loader(arguments, device)
    settings = Namespace(
        device=str(device),
        precision="amp_bf16" if arguments.precision == "bf16" else "fp32",
        distill=False,
        accum_freq=1,
        skip_scheduler=True,
        horovod=False,
        grad_clip_norm=None,
        rank=0,
        world_size=1,
        local_rank=0,
        log_local=False,
        batch_size=arguments.batch,
        log_every_n_steps=100,
        wandb=False,
    )
    loss = library().loss.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True)
    train_one_epoch(model, {"train": loader}, loss, 0, optimizer, None, None, None, settings)
    return float(arguments.steps * arguments.batch / loader.seconds)


def _is_vector(name: str, parameter: Tensor) -> bool:
    """As open_clip's `main` splits them."""
    return parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))


class _Loader:
    """What `train_one_epoch` takes for data: batches that lie on the device; it times all but the first."""

    def __init__(self, arguments: Namespace, device: torch.device) -> None:
        self.device, self.warm = device, max(3, arguments.steps // 4)
        self.num_batches = self.warm + arguments.steps
        self.num_samples = self.num_batches * arguments.batch
        shape = (arguments.batch, 3, arguments.size, arguments.size)
        self.batches = [(torch.randn(shape, device=device), _ids(arguments.batch, device)) for _ in range(2)]
        self.seconds = math.nan
        self.dataloader = self

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        started = _now(self.device)
        for step in range(self.num_batches):
            if step == self.warm:
                started = _now(self.device)
            yield self.batches[step % 2]
        self.seconds = _now(self.device) - started


def _ids(count: int, device: torch.device) -> Tensor:
    ids = torch.randint(1, 49_000, (count, CONTEXT), device=device)
    ids[:, 0], ids[:, -1] = 49406, 49407
    return ids


# ------------------------------------------------------------------------------------------------ ours


def _ours(folder: Path, turn: int, arguments: Namespace) -> float:
    steps = arguments.steps + max(4, arguments.steps // 3)
    per_epoch = max(4 * arguments.batch, 256) // arguments.batch
    given: dict[str, Any] = {
        "backbone": f"open_clip:{arguments.model}",
        "size": arguments.size,
        "stored_size": arguments.size,
        "batch_size": arguments.batch,
        "epochs": -(-steps // per_epoch),
        "holdout": 0,
        "device": arguments.device,
        "precision": arguments.precision,
        "lr": LR * 256 / arguments.batch,
        "clip": 0,
        "log_every": max(1, arguments.steps // 8),
        "checkpoint_every": 10**6,
        "knn_every": 10**6,
        "cache_folder": folder / "cache",
    }
    out = folder / f"run-{turn}"
    train("clip", str(folder / "pairs.csv"), out, {key: str(value) for key, value in given.items()})
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    speeds = [line["images_per_second"] for line in lines if "images_per_second" in line]
    return statistics.median(speeds[len(speeds) // 4 :])


def _folder(place: Path, what: str) -> Path:
    return place / str(OURS[what])


def _write(folder: Path, count: int, size: int, words: int) -> None:
    """Smooth noise as JPEG files, and sentences of chance words."""
    folder.mkdir()
    chance, pick = np.random.default_rng(0), random.Random(0)
    lines = ["path,caption"]
    for number in range(count):
        coarse = Image.fromarray(chance.integers(0, 256, (8, 8, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BILINEAR).save(folder / f"{number}.jpg")
        lines.append(f"{number}.jpg,{' '.join(pick.choices(WORDS.split(), k=words))} {number}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")


def _forget(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
