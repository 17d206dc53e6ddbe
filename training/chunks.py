"""Large batches on small memory: a network sees a batch in chunks, one of which is in memory at a time.

    vectors = in_chunks(network, batch, 64)

GradCache (Gao et al. 2021): first the vectors of all chunks without what gradients need, then the loss over
all of them, then for its gradients each chunk once more. Here torch's checkpointing does the last part; it
replays the random numbers, so that dropout falls on the same values. The gradients are those of one pass in
which each chunk had its own random numbers. The price is a second forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

__all__ = ["in_chunks"]


def in_chunks(network: nn.Module, batch: Tensor, chunk: int) -> Tensor:
    """`network(batch)`, computed `chunk` rows at a time; all at once where chunk is 0.

    Args:
        network: [n, …] → [n, dim]. Its batch norms see one chunk at a time, and count it once.
        batch: [B, …].
        chunk: Rows; 0 for B.
    """
    if not chunk or chunk >= len(batch):
        whole: Tensor = network(batch)
        return whole
    if not torch.is_grad_enabled() or not any(one.requires_grad for one in network.parameters()):
        return torch.cat([network(rows) for rows in torch.split(batch, chunk)])
    contexts = partial(_contexts, network)
    return torch.cat(
        [
            checkpoint(network, rows, use_reentrant=False, preserve_rng_state=True, context_fn=contexts)
            for rows in torch.split(batch, chunk)
        ]
    )


def _contexts(
    network: nn.Module,
) -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """Around the first pass, and around the second."""
    return contextlib.nullcontext(), _statistics_kept(network)


@contextlib.contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[None]:
    """Batch norms do not count a chunk that they have counted."""
    norms = [one for one in network.modules() if isinstance(one, _BatchNorm) and one.track_running_stats]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
