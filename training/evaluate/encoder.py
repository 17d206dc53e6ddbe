"""From the name of a run, a checkpoint or a bundle to the encoder that is evaluated."""

from __future__ import annotations

from pathlib import Path

import torch

from embedserve.bundle import MANIFEST
from embedserve.errors import InvalidField, NotFound
from training.backbones import build
from training.distributed import device_named
from training.evaluate.bundle import BundleEncoder
from training.evaluate.embedding import Embedded, EvaluationEncoder, Reader, Reading
from training.evaluate.network import NetworkEncoder, PixelEncoder, RunEncoder

__all__ = [
    "BundleEncoder",
    "Embedded",
    "EvaluationEncoder",
    "NetworkEncoder",
    "PixelEncoder",
    "Reader",
    "RunEncoder",
    "baselines",
    "open_encoder",
    "require_network",
    "require_reader",
]

STARTER = "starter"


def open_encoder(path: str, *, device: torch.device | str = "auto") -> RunEncoder | BundleEncoder:
    """The encoder of a run, a checkpoint or a bundle.

    Args:
        path: A run's folder (its best checkpoint, else its last), a checkpoint file, a bundle's folder, or
            'starter'.
        device: auto, cpu, cuda or cuda:0; bundles run on the CPU.

    Raises:
        NotFound: There is nothing at `path`.
        InvalidField: It is none of these, the device is unknown, or the bundle has no image tower.
        BundleError: The bundle is damaged.
    """
    if path == STARTER or (Path(path) / MANIFEST).is_file():
        return BundleEncoder(path)
    if not Path(path).exists():
        raise NotFound(
            f"There is no '{path}'. Name a run's folder, a checkpoint, a bundle's folder, or '{STARTER}'.",
            param="path",
        )
    return RunEncoder(path, device_named(str(device)))


def baselines(encoder: EvaluationEncoder) -> list[EvaluationEncoder]:
    """What an encoder is compared with: raw pixels, and a network with random weights.

    The random network is the encoder's own architecture where that is known, else a ResNet-18 at 64 pixels.
    """
    if isinstance(encoder, NetworkEncoder):
        name, size, stored_size = encoder.backbone.name, encoder.size, encoder.stored_size
        cache, workers = encoder.cache, encoder.workers
    else:
        name, size, stored_size, cache, workers = "resnet18", 64, 64, None, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build(name, size)
    untrained = NetworkEncoder(
        f"{name} with random weights",
        backbone,
        size=size,
        stored_size=stored_size,
        device=encoder.device,
        holdout=encoder.holdout,
        seed=encoder.seed,
        cache=cache,
        workers=workers,
    )
    return [PixelEncoder(untrained), untrained]


def require_network(encoder: EvaluationEncoder, evaluation: str) -> NetworkEncoder:
    """The encoder as a torch network. Raises InvalidField for a bundle, which cannot be looked into."""
    if isinstance(encoder, NetworkEncoder):
        return encoder
    raise InvalidField(
        f"'{encoder.name}' is a bundle, which gives finished vectors only; {evaluation} needs the network. "
        "Name the folder of the run that the bundle was exported from.",
        param="path",
    )


def require_reader(encoder: EvaluationEncoder, evaluation: str) -> Reader:
    """The encoder's text side. Raises InvalidField for one that knows images alone."""
    reader = encoder.reader if isinstance(encoder, Reading) else None
    if reader is None:
        raise InvalidField(
            f"'{encoder.name}' has no text tower, and {evaluation} compares images with texts. Name a run "
            f"of clip, siglip or lit, a bundle with both towers, or '{STARTER}'; for images alone there are "
            "knn, linear and retrieval.",
            param="path",
            code="no_text_tower",
        )
    return reader
