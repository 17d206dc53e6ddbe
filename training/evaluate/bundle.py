"""Encoders that are bundles: what serving computes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from embedserve.bundle import Bundle
from embedserve.encoder import Encoder
from embedserve.errors import EmbedServeError, InvalidField
from embedserve.preprocess import preprocess
from training.data import Source
from training.data.ahead import in_order
from training.data.source import LIMITS
from training.evaluate.embedding import READERS, Embedded, without_failed
from training.evaluate.report import Progress, silent

__all__ = ["BundleEncoder"]

BATCH = 64
TEXTS = 256
"""Texts that are embedded between two reports of progress."""


class BundleEncoder:
    """A bundle in ONNX Runtime: what serving computes, on the pixels that serving sees.

    Raises InvalidField for a bundle without an image tower, BundleError for one that is damaged.
    """

    holdout: float | None = None
    seed = 0

    def __init__(self, path: str) -> None:
        self.encoder = Encoder.load(path)
        tower = self.encoder.bundle.description.image
        if tower is None:
            raise InvalidField(
                f"The bundle '{path}' has no image tower; evaluations need one that embeds images.",
                param="path",
            )
        self.preprocessing = tower.preprocessing
        self.name, self.dim, self.device = self.encoder.name, self.encoder.dim, torch.device("cpu")
        self.reader = _BundleReader(self.encoder) if self.encoder.has_text else None
        self.path = path

    @property
    def bundle(self) -> Bundle:
        """The files."""
        return self.encoder.bundle

    def embed(self, source: Source, *, progress: Progress = silent, cached: bool = True) -> Embedded:
        """As `EvaluationEncoder.embed`; nothing is kept on disk."""
        vectors: list[Tensor] = []
        failed: dict[int, str] = {}
        batch: list[NDArray[np.uint8]] = []
        rows: list[int] = []
        images = in_order(
            lambda row: self._read(source, row), range(len(source)), threads=READERS, ahead=BATCH
        )
        for row, image in enumerate(images):
            if isinstance(image, str):
                failed[row] = image
            else:
                batch.append(image)
                rows.append(row)
            if len(batch) == BATCH or (batch and row == len(source) - 1):
                self._run(batch, rows, vectors, failed)
                batch, rows = [], []
            progress(row + 1, len(source))
        return without_failed(source, vectors, failed)

    def _read(self, source: Source, row: int) -> NDArray[np.uint8] | str:
        """The tensor that the graph takes, or why there is none."""
        try:
            data = source.fetch(row)
            if isinstance(data, bytes):
                return self.encoder.read_image(data, LIMITS)
            return preprocess(Image.fromarray(data).convert("RGB"), self.preprocessing)
        except (OSError, EmbedServeError) as error:
            return str(error)

    def _run(
        self,
        batch: Sequence[NDArray[np.uint8]],
        rows: Sequence[int],
        vectors: list[Tensor],
        failed: dict[int, str],
    ) -> None:
        try:
            vectors.append(torch.from_numpy(self.encoder.embed_images(batch)))
        except EmbedServeError as error:
            if len(batch) == 1:
                failed[rows[0]] = str(error)
                return
            for image, row in zip(batch, rows, strict=True):  # one without direction fails alone
                self._run([image], [row], vectors, failed)


class _BundleReader:
    """A bundle's text tower."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.scoring = encoder.bundle.description.scoring

    def embed(self, texts: Sequence[str], *, progress: Progress = silent) -> Tensor:
        """As `Reader.embed`."""
        parts = []
        for start in range(0, len(texts), TEXTS):
            parts.append(self._embed(texts[start : start + TEXTS]))
            progress(min(start + TEXTS, len(texts)), len(texts))
        return torch.from_numpy(np.concatenate(parts))

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        try:
            return self._encoder.embed_texts(self._encoder.tokenize(texts))
        except EmbedServeError as error:
            if len(texts) > 1:  # find the one that fails
                return np.concatenate([self._embed([text]) for text in texts])
            raise InvalidField(f"The text '{texts[0][:80]}' has no vector: {error}", param="data") from error
