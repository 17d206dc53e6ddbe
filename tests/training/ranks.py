"""Runs a function on several ranks of a real gloo process group."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["on_ranks"]


def on_ranks(function: Callable[..., Any], *arguments: Any, world: int = 2) -> list[Any]:
    """What `function(*arguments)` returned on each rank. It must be importable: a top-level function.

    Results may hold tensors; an exception on any rank is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _run, (function, arguments, world, folder), nprocs=world, start_method="fork", join=True
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _run(
    rank: int, function: Callable[..., Any], arguments: tuple[Any, ...], world: int, folder: str
) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
