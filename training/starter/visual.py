"""How the 256 visual dimensions were fitted: `python -m training.starter.visual`.

The square roots of the pooled features (1280 numbers, none negative) of the drawings in Open Clip Art, less
the 600 kept for measuring, are centred and turned to their principal axes. Each of the first 256 is divided
by the square root of its standard deviation: half-way to whitening, which measured better than none (the
first few axes decide alone) and as good as all (the last ones are noise). The result is kept in `visual.npz`,
so building the starter needs no pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from embedserve.bundle import Preprocessing
from training.starter import clipart, sources
from training.starter.towers import VISUAL, ImageNetwork

__all__ = ["FITTED", "PREPROCESSING", "fit", "load"]

FITTED = Path(__file__).parent / "visual.npz"
PREPROCESSING = Preprocessing(height=224, width=224, resize="longest", resize_to=224, interpolation="bicubic")
"""The whole picture on white. The weights were trained with the middle of a picture (256, cropped to 224);
showing all of it measured better, because what is at the border is lost otherwise."""

WHITENING = 0.5


def fit(pooled: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean [features] and basis [features, 256] from pooled features [n, features] ≥ 0."""
    roots = np.sqrt(pooled.astype(np.float64))
    mean = roots.mean(axis=0)
    centred = roots - mean
    variance, axes = np.linalg.eigh(centred.T @ centred / len(centred))
    first = np.argsort(-variance)[:VISUAL]
    axes = axes[:, first] / np.sqrt(variance[first]) ** WHITENING
    axes *= np.sign(
        axes[np.abs(axes).argmax(axis=0), np.arange(VISUAL)]
    )  # eigenvectors have no sign of their own
    return mean.astype(np.float32), axes.astype(np.float32)


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and basis as fitted, float32."""
    with np.load(FITTED) as stored:
        return torch.from_numpy(stored["mean"].astype(np.float32)), torch.from_numpy(
            stored["basis"].astype(np.float32)
        )


def _features(folder: Path) -> tuple[list[str], NDArray[np.float32]]:
    network = _bare(sources.classifier())
    names: list[str] = []
    parts: list[NDArray[np.float32]] = []
    for batch in _batches(folder):
        names += [name for name, _ in batch]
        with torch.no_grad():
            parts.append(
                network.features(torch.from_numpy(np.stack([pixels for _, pixels in batch])))[0].numpy()
            )
    return names, np.concatenate(parts)


def _batches(folder: Path) -> Iterator[list[tuple[str, NDArray[np.uint8]]]]:
    found = clipart.pictures(folder, PREPROCESSING)
    while batch := list(islice(found, 32)):
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pictures", type=Path, default=clipart.DEFAULT_FOLDER, help="folder of openclipart-png"
    )
    parser.add_argument("--out", type=Path, default=FITTED)
    arguments = parser.parse_args()
    names, pooled = _features(arguments.pictures)
    kept = set(clipart.held_out(names))
    rows = [index for index, name in enumerate(names) if name not in kept]
    mean, basis = fit(pooled[rows])
    np.savez_compressed(arguments.out, mean=mean, basis=basis.astype(np.float16))
    print(f"fitted on {len(rows)} of {len(names)} pictures: {arguments.out}")


def _bare(network: nn.Module) -> ImageNetwork:
    """Only for its `features`: the rest is what is being fitted."""
    empty = torch.zeros(0)
    return ImageNetwork(network, empty, empty, empty, looks=0.0)


if __name__ == "__main__":
    main()
