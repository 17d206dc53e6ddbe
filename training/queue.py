"""A memory of embeddings from earlier steps (He et al. 2020, section 3.2), saved with the checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.distributed import gather

if TYPE_CHECKING:
    from training.method import Facts

__all__ = ["FeatureQueue", "suited_queue"]


class FeatureQueue(nn.Module):
    """The last `length` embeddings, oldest overwritten first. Rows keep the id of the image they came from.

    `stage` takes what the loss has seen, and the loop adds it after the step with `flush`: a key that is
    scored is never in the queue yet, and autograd never finds its inputs overwritten.

    Attributes:
        rows: float32 [length, dim], unit vectors; random directions until they are filled.
        ids: int64 [length], the id given with a row; −1 for rows that are still random.
        filled: int64 [], rows that hold embeddings.
        next: int64 [], where the next row goes.
    """

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.Buffer(F.normalize(torch.randn(length, dim), dim=1))
        self.ids = nn.Buffer(torch.full((length,), -1))
        self.filled = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.next = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self._staged: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return self.rows.shape[0]

    @torch.no_grad()
    def stage(self, rows: Tensor, ids: Tensor) -> None:
        """Takes float [B, dim] and int64 [B] of this rank; `flush` will add those of all ranks.

        Must be called on every rank, as it gathers.
        """
        self._staged.append((gather(rows.detach().to(self.rows.dtype)), gather(ids)))

    @torch.no_grad()
    def flush(self) -> None:
        """Adds what was staged, in order. Of more rows than the queue has, the last ones stay."""
        for rows, ids in self._staged:
            count = rows.shape[0]
            # Modular indices instead of slices: nothing is dropped where the ring closes, and no number
            # has to come back from the GPU.
            at = (self.next + torch.arange(count, device=rows.device)) % len(self)
            if count > len(self):
                rows, ids, at = rows[-len(self) :], ids[-len(self) :], at[-len(self) :]  # noqa: PLW2901
            self.rows[at] = rows
            self.ids[at] = ids
            self.next.add_(count).remainder_(len(self))
            self.filled.add_(count).clamp_(max=len(self))
        self._staged.clear()


def suited_queue(most: int, facts: Facts) -> int:
    """Rows of a queue: whole batches, no more than `most` or half the images, but one batch at least.

    A longer one would hold most images twice and the oldest as an encoder of epochs ago saw them.
    """
    return max(min(most, facts.images // 2) // facts.batch_size, 1) * facts.batch_size
