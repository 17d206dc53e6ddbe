"""Encoders that are torch networks: those of runs, and what they are compared with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.augment import IMAGENET_MEAN, IMAGENET_STD, centre, evaluation_share
from training.backbones import Backbone
from training.data import Pixels, Residence, Source, open_pixels
from training.data.ahead import in_order
from training.data.squares import decode_rows
from training.evaluate.embedding import READERS, Embedded, finite, without_failed
from training.evaluate.report import Progress, silent

if TYPE_CHECKING:
    from training.captions.wording import CaptionRules
    from training.evaluate.run_reader import RunReader

__all__ = ["MethodEmbedding", "NetworkEncoder", "PixelEncoder", "RunEncoder"]

Rows = NDArray[np.int64]

BASELINE_SIZE = 32
"""Pixels of a side of the images whose raw pixels are compared, as in Tiny Images (Torralba et al. 2008)."""


class NetworkEncoder:
    """A torch network, with access to its inside.

    Args:
        name: For people.
        backbone: What has patch features and attention; it is put into evaluation mode.
        size: Pixels of a side of the images that it sees.
        stored_size: Pixels of a side of the decoded images that these are cut from.
        embed: The module whose output is evaluated, [B, 3, size, size] → [B, dim]; the backbone by default.
        device: Where it runs.
        holdout, seed: As in `EvaluationEncoder`.
        residence: Where decoded images live; see `training.data.open_pixels`.
        cache: Folder of decoded images; the user's cache folder by default.
        workers: Threads that decode; 0 takes one for each core.
    """

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        *,
        size: int,
        stored_size: int,
        embed: nn.Module | None = None,
        device: torch.device | str = "cpu",
        holdout: float | None = None,
        seed: int = 0,
        residence: Residence | Literal["auto"] = "auto",
        cache: Path | None = None,
        workers: int = 0,
    ) -> None:
        self.name, self.size, self.stored_size = name, size, stored_size
        self.device = torch.device(device)
        self.backbone = backbone.to(self.device).eval()
        self.holdout, self.seed, self.residence, self.cache, self.workers = (
            holdout,
            seed,
            residence,
            cache,
            workers,
        )
        self.module: nn.Module = (backbone if embed is None else embed).to(self.device).eval()
        self.batch = max(8, min(512, 2**22 // size**2))
        """Images of one forward pass."""
        self.dim = self._forward(torch.zeros(1, 3, size, size, device=self.device)).shape[1]

    def embed(self, source: Source, *, progress: Progress = silent, cached: bool = True) -> Embedded:
        """As `EvaluationEncoder.embed`."""
        if not cached:
            return self._embed_uncached(source, progress)
        pixels = self.pixels(source, progress)
        return Embedded(self.embed_pixels(pixels, progress=progress), pixels.source, pixels.skipped)

    def embed_pixels(self, pixels: Pixels, *, progress: Progress = silent) -> Tensor:
        """The features of all decoded images, float32 [n, dim]."""
        done, parts = 0, []
        for images in self.batches(pixels, np.arange(len(pixels))):
            parts.append(self._forward(images))
            done += len(images)
            progress(done, len(pixels))
        return finite(torch.cat(parts), pixels.source)

    def pixels(self, source: Source, progress: Progress = silent) -> Pixels:
        """The decoded images of a source, from the cache where they are there."""
        return open_pixels(
            source,
            self.stored_size,
            device=self.device,
            residence=self.residence,
            folder=self.cache,
            workers=self.workers,
            progress=progress,
        )

    def batches(self, pixels: Pixels, rows: Rows) -> Iterator[Tensor]:
        """The evaluation views of some images, float32 [B, 3, size, size] at a time."""
        parts = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
        for part, batch in zip(parts, pixels.prefetch(iter(parts)), strict=True):
            yield self.view(batch, torch.from_numpy(pixels.aspect[part]))

    def view(self, pixels: Tensor, aspect: Tensor) -> Tensor:
        """What the network sees of stored squares: the centre crop, normalised.

        Args:
            pixels: uint8 [B, S, S, 3].
            aspect: float32 [B] on the CPU, width ÷ height of the originals.

        Returns:
            float32 [B, 3, size, size] on the device.
        """
        # As in training: images stored larger than they are seen lose that margin (224 of 256).
        share = evaluation_share(self.size, pixels.shape[1])
        return centre(
            pixels.to(self.device), aspect, self.size, mean=IMAGENET_MEAN, std=IMAGENET_STD, share=share
        )

    @torch.no_grad()
    def patches(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, dim] and the patch map [B, channels, h, w] of the backbone, float32."""
        pooled, patches = self.backbone.features(images)
        return pooled.float(), patches.float()

    @torch.no_grad()
    def _forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.module(images)
        return features.float()

    def _embed_uncached(self, source: Source, progress: Progress) -> Embedded:
        parts = [range(start, min(start + 32, len(source))) for start in range(0, len(source), 32)]
        decoded = in_order(
            lambda part: decode_rows(source, part, self.stored_size),
            parts,
            threads=READERS,
            ahead=2 * READERS,
        )
        vectors: list[Tensor] = []
        failed: dict[int, str] = {}
        for part, found in zip(parts, decoded, strict=True):
            failed |= {one.row: one.reason for one in found.failures}
            if len(found.pixels):
                squares, aspect = torch.from_numpy(found.pixels), torch.from_numpy(found.aspect)
                vectors.append(self._forward(self.view(squares, aspect)))
            progress(part.stop, len(source))
        return without_failed(source, vectors, failed)


class RunEncoder(NetworkEncoder):
    """The encoder of a run or checkpoint.

    Attributes:
        data, group_by, label_by, captions: What the run was trained on, as `open_source` takes it.
        reader: The text side of a run that learned from captions.
    """

    data: str
    group_by: str
    label_by: str
    captions: CaptionRules | None
    reader: RunReader | None

    def __init__(self, path: str, device: torch.device | str) -> None:
        from training.evaluate.run_reader import caption_rules_of, reader_of
        from training.method import Method
        from training.run import open_run

        trained = open_run(path, device)
        config = trained.settings.config
        super().__init__(
            f"{path} (step {trained.step})",
            trained.method.encoder,
            embed=MethodEmbedding(trained.method) if type(trained.method).embed is not Method.embed else None,
            size=config.size,
            stored_size=config.stored_size,
            device=device,
            holdout=config.holdout,
            seed=config.seed,
            residence=config.cache,
            cache=Path(config.cache_folder) if config.cache_folder else None,
            workers=config.workers,
        )
        self.data, self.group_by, self.label_by = config.data, config.group_by, config.label_by
        self.captions = caption_rules_of(trained.method)
        self.reader = reader_of(trained.method, self.device)


class PixelEncoder:
    """No encoder: the pixels themselves, which every encoder has to beat.

    Args:
        like: The encoder whose decoded images are taken, scaled down to `BASELINE_SIZE`.
    """

    name = "raw pixels"

    def __init__(self, like: NetworkEncoder) -> None:
        self._like = like
        self.size = min(BASELINE_SIZE, like.stored_size)
        self.dim, self.device = 3 * self.size**2, like.device
        self.holdout, self.seed = like.holdout, like.seed

    def embed(self, source: Source, *, progress: Progress = silent, cached: bool = True) -> Embedded:
        """As `EvaluationEncoder.embed`; the vectors are centred on middle gray, so that cosines differ."""
        pixels = self._like.pixels(source, progress)
        parts = [
            nn.functional.adaptive_avg_pool2d(
                images.permute(0, 3, 1, 2).float() / 255 - 0.5, self.size
            ).flatten(1)
            for images in pixels.prefetch(
                iter(np.array_split(np.arange(len(pixels)), len(pixels) // 512 + 1))
            )
        ]
        return Embedded(torch.cat(parts), pixels.source, pixels.skipped)


class MethodEmbedding(nn.Module):
    """A method's `embed` as a module."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.method.embed(images)  # type: ignore[operator]
        return features
