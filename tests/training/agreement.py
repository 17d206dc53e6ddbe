"""Holds a method to a slow, literal version of its loss, and two ranks to what one process does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.ranks import on_ranks
from tests.training.tiny import batch_for, tiny_method
from training.batch_norm import synchronize_batch_norms
from training.distributed import rank, world_size
from training.method import Batch, Method, Texts

__all__ = ["assert_same_gradients", "assert_two_ranks_train_as_one", "doubled", "gradients"]


def doubled(batch: Batch) -> Batch:
    """The batch with views in float64."""
    return replace(batch, views=[view.double() for view in batch.views])


def gradients(method: Method[Any], loss: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter that has one."""
    method.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: one.grad.clone() for name, one in method.named_parameters() if one.grad is not None}
    method.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(method: Method[Any], loss: Tensor, expected: Tensor) -> None:
    """Both losses have one value and one gradient for every parameter that learns."""
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-10)
    found, wanted = gradients(method, loss), gradients(method, expected)
    assert found.keys() == wanted.keys()
    assert any(one.abs().max() > 1e-6 for one in wanted.values())
    for name, one in wanted.items():
        torch.testing.assert_close(
            found[name], one, rtol=1e-6, atol=1e-9, msg=lambda text, of=name: f"{of}: {text}"
        )


def _train(name: str, options: dict[str, Any], steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """Some steps in float64 on noise, as the loop does them; each rank takes its share of the batch.

    Returns:
        The loss of each step, mean over ranks, and all parameters and buffers at the end.
    """
    method = tiny_method(name, **options).double()
    if world_size() > 1:
        synchronize_batch_norms(method, torch.device("cpu"))
    learning = [one for one in method.parameters() if one.requires_grad]
    losses = []
    for step in range(steps):
        batch = doubled(batch_for(method, seed=step, step=step))
        share = slice(rank() * len(batch.ids) // world_size(), (rank() + 1) * len(batch.ids) // world_size())
        texts = batch.texts and Texts(batch.texts.tokens[share], batch.texts.ids[share])
        batch = replace(batch, views=[view[share] for view in batch.views], ids=batch.ids[share], texts=texts)
        loss = method(batch)["loss"]
        loss.backward()
        mean = loss.detach().clone()
        if world_size() > 1:
            for tensor in [mean, *(one.grad for one in learning)]:
                dist.all_reduce(tensor)
                tensor /= world_size()
        losses.append(float(mean))
        method.before_step(batch.now)
        with torch.no_grad():
            for one in learning:
                if one.grad is not None:
                    one -= 0.05 * one.grad
        method.zero_grad()
        method.after_step(batch.now, batch.values)
    return losses, method.state_dict()


def assert_two_ranks_train_as_one(name: str, steps: int = 3, **options: Any) -> None:
    """Losses, parameters, moving averages, queues and batch norms agree after some steps."""
    shares = on_ranks(_train, name, options, steps)
    losses, state = _train(name, options, steps)
    for rank_losses, rank_state in shares:
        assert torch.allclose(torch.tensor(rank_losses), torch.tensor(losses), rtol=1e-6), (
            rank_losses,
            losses,
        )
        assert rank_state.keys() == state.keys()
        for key, one in state.items():
            torch.testing.assert_close(
                rank_state[key], one, rtol=1e-6, atol=1e-8, msg=lambda text, of=key: f"{of}: {text}"
            )
