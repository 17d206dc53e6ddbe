"""What is measured while training goes on: k-NN on held-out images, and whether features still spread out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.augment import IMAGENET_MEAN, IMAGENET_STD, centre, evaluation_share
from training.captions import Captions
from training.data import Pixels
from training.evaluate.knn import knn_accuracy
from training.evaluate.ranking import recall, same
from training.method import Method
from training.watch import feature_statistics
from training.watch.quality import RETRIEVAL

__all__ = ["Measured", "OnlineEvaluation", "evaluation_views"]

MOST_BANK, MOST_QUERIES, BATCH = 20_000, 5_000, 256
NEIGHBOURS = 20
"""k, as Wu et al. 2018 and DINO's evaluation use; at most half the bank."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement: figures for the log, and the features they came from."""

    figures: dict[str, float]
    """feature_std, feature_rank, and of held-out images knn where there are labels, image_to_text and
    text_to_image where there are captions."""
    bank: Tensor
    queries: Tensor


class OnlineEvaluation:
    """Measures the encoder on clean images: up to 20,000 of training as the bank, 5,000 held out as queries.

    Args:
        pixels: All images.
        train, heldout: int64 rows of them.
        size: Pixels of a side of the view.
        seed: Draws which rows are taken when there are more.
        captions: Of all images: images are then looked for by their captions, and the other way round.
    """

    def __init__(
        self,
        pixels: Pixels,
        train: NDArray[np.int64],
        heldout: NDArray[np.int64],
        *,
        size: int,
        seed: int,
        captions: Captions | None = None,
    ) -> None:
        chance = np.random.default_rng(seed)
        self.pixels, self.size, self.captions = pixels, size, captions
        self.bank = np.sort(chance.permutation(train)[:MOST_BANK])
        self.queries = np.sort(chance.permutation(heldout)[:MOST_QUERIES])

    @property
    def labelled(self) -> bool:
        """Whether k-NN can be measured."""
        labels = self.pixels.source.labels
        known = labels[self.queries]
        return (
            bool(len(known))
            and bool((known >= 0).any())
            and len(set(labels[self.bank][labels[self.bank] >= 0])) > 1
        )

    @torch.no_grad()
    def measure(self, method: Method[Any]) -> Measured:
        """Puts the method in evaluation mode and back; changes nothing else."""
        training = method.training
        method.eval()
        try:
            bank, queries = self._embed(method, self.bank), self._embed(method, self.queries)
            found = self._retrieval(method, queries)
        finally:
            method.train(training)
        figures = feature_statistics(bank) | found
        if self.labelled:
            figures["knn"] = self._knn(bank, queries)
        return Measured(figures, bank, queries)

    def _embed(self, method: Method[Any], rows: NDArray[np.int64]) -> Tensor:
        features = [
            method.embed(evaluation_views(self.pixels, rows[start : start + BATCH], self.size)).float()
            for start in range(0, len(rows), BATCH)
        ]
        return torch.cat(features) if features else torch.zeros(0, 1, device=self.pixels.device)

    def _retrieval(self, method: Method[Any], queries: Tensor) -> dict[str, float]:
        """R@1 both ways among the held-out images and the first caption of each."""
        if self.captions is None or len(self.queries) < 2:
            return {}
        ids = self.captions.first(self.queries)
        texts = torch.cat(
            [
                method.text_vectors(
                    torch.from_numpy(self.captions.tokens(ids[start : start + BATCH])).to(queries.device)
                ).float()
                for start in range(0, len(ids), BATCH)
            ]
        )
        right = same(torch.from_numpy(ids).to(queries.device))
        return {
            name: float(recall(one, other, right, (1,))[0])
            for name, one, other in zip(RETRIEVAL, (queries, texts), (texts, queries), strict=True)
        }

    def _knn(self, bank: Tensor, queries: Tensor) -> float:
        labels = torch.from_numpy(self.pixels.source.labels).to(bank.device)
        bank_labels, query_labels = labels[self.bank], labels[self.queries]
        known, asked = bank_labels >= 0, query_labels >= 0
        return knn_accuracy(
            bank[known],
            bank_labels[known],
            queries[asked],
            query_labels[asked],
            classes=len(self.pixels.source.class_names),
            k=max(1, min(NEIGHBOURS, int(known.sum()) // 2)),
        )


def evaluation_views(pixels: Pixels, rows: NDArray[np.int64], size: int) -> Tensor:
    """The centre view of images as serving makes it: float32 [n, 3, size, size], normalised."""
    aspect = torch.from_numpy(pixels.aspect[rows])
    share = evaluation_share(size, pixels.size)
    return centre(pixels.batch(rows), aspect, size, mean=IMAGENET_MEAN, std=IMAGENET_STD, share=share)
