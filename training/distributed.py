"""One process or many: the same code. Every function is the identity where there is one process.

The convention of all losses here: each rank computes the mean over *its own* rows, against the rows of
*all* ranks that came through `gather`. DDP then averages the gradients over ranks, and the result is the
gradient of the mean over the joined batch. (A gather without gradient, or a sum that forgets the other ranks'
share, is off by the number of ranks: the peers' best-known mistake.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embedserve.errors import InvalidField

__all__ = [
    "agreed",
    "all_mean",
    "all_sum",
    "any_rank",
    "device_named",
    "gather",
    "in_turn",
    "is_main",
    "process_group",
    "rank",
    "synchronize",
    "world_size",
]

TIMEOUT = timedelta(minutes=60)
"""Rank 0 may decode a large data set while the others wait."""


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """True in the one process that writes files and prints."""
    return rank() == 0


def synchronize() -> None:
    """Waits until every rank is here."""
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """The device of this process, in a process group when `torchrun` started it.

    Args:
        device: 'auto' (CUDA where there is one), 'cpu', 'cuda' or 'cuda:1'.

    Raises:
        InvalidField: The device is unknown, or not there.
    """
    chosen = device_named(device)
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if started:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        yield chosen
    finally:
        if started:
            dist.destroy_process_group()


def device_named(name: str) -> torch.device:
    """'auto' (CUDA where there is one), 'cpu', 'cuda' or 'cuda:1'. Raises InvalidField for others."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidField(
            f"device={name} is unknown; use auto, cpu, cuda or cuda:0.", param="device"
        ) from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidField(
                f"device={name}, but torch {torch.__version__} sees no GPU; "
                "use device=cpu, or install a CUDA build.",
                param="device",
            )
        if ":" not in name:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device


class _Gather(torch.autograd.Function):
    """All-gather along the first axis whose backward sums each rank's gradient where the rows came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        joined = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
        dist.all_gather_single(joined, rows.contiguous())
        return joined

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # gloo has no reduce-scatter; an all-reduce gives the same sum.
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


class _Sum(torch.autograd.Function):
    """All-reduce by sum whose backward sums the gradients as well."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, in the order of ranks: [B, …] → [world · B, …], with gradient.

    Give it `rows.detach()` where the gradient must stop. Every rank needs the same shape.
    """
    if world_size() == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def all_sum(values: Tensor) -> Tensor:
    """The sum over ranks, with gradient: every rank's loss flows back into every rank's values."""
    if world_size() == 1:
        return values
    total: Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
    return total


def all_mean(values: Tensor) -> Tensor:
    """The mean over ranks, with gradient as in `all_sum`."""
    return all_sum(values) / world_size()


@contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 first, then all others together."""
    if not is_main():
        synchronize()
    yield
    if is_main():
        synchronize()


def agreed(value: int) -> bool:
    """Whether all ranks have the same number."""
    if not dist.is_initialized():
        return True
    values: list[int | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return len(set(values)) == 1


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank, so that all ranks stop at the same step."""
    if not dist.is_initialized():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.tensor(int(flag), device=device)
    dist.all_reduce(total)
    return bool(total.item())
