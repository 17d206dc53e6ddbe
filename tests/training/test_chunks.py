"""Gradients of chunks against one pass over everything, and a literal GradCache with its own dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.training.agreement import gradients
from tests.training.ranks import on_ranks
from tests.training.tiny import TinyConv, batch_for, tiny_method
from training.batch_norm import synchronize_batch_norms
from training.chunks import in_chunks
from training.image_text_losses import clip_loss


def contrast(one: Tensor, other: Tensor) -> Tensor:
    """A loss in which every row depends on every other, as CLIP's does."""
    ids = torch.arange(len(one))
    return clip_loss(F.normalize(one, dim=1), F.normalize(other, dim=1), ids, ids, one.new_tensor(5.0))


def layered(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), *between, nn.Linear(12, 5)).double()


def rows(count: int = 10, seed: int = 1) -> Tensor:
    return torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slopes(network: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


@pytest.mark.parametrize("chunk", [1, 3, 5, 9])
def test_chunks_have_the_gradients_of_the_whole_batch(chunk: int) -> None:
    network, batch, other = layered(nn.LayerNorm(12)), rows(), torch.randn(10, 5, dtype=torch.float64)
    whole = contrast(network(batch), other)
    chunked = contrast(in_chunks(network, batch, chunk), other)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=0)
    for found, expected in zip(slopes(network, chunked), slopes(network, whole), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunk", [0, 10, 11])
def test_a_chunk_of_nothing_or_everything_is_one_plain_pass(chunk: int) -> None:
    calls: list[int] = []
    network = layered()
    network.register_forward_hook(lambda module, given, made: calls.append(len(made)))
    in_chunks(network, rows(), chunk).sum().backward()
    assert calls == [10]


def literal_grad_cache(
    network: nn.Module, batch: Tensor, chunk: int, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Gao et al. 2021, section 3: vectors without a graph, the loss's gradient for them, then chunk by chunk
    the same vectors again, from the random numbers that were recorded, multiplied with that gradient."""
    parts, states, vectors = torch.split(batch, chunk), [], []
    for part in parts:
        states.append(torch.get_rng_state())
        with torch.no_grad():
            vectors.append(network(part))
    cache = torch.cat(vectors).requires_grad_()
    value = loss(cache)
    [arriving] = torch.autograd.grad(value, [cache])
    found = [torch.zeros_like(one) for one in network.parameters()]
    for part, state, slope in zip(parts, states, torch.split(arriving, chunk), strict=True):
        torch.set_rng_state(state)
        own = torch.autograd.grad(network(part), list(network.parameters()), slope)
        found = [one + more for one, more in zip(found, own, strict=True)]
    return value.detach(), found


def test_dropout_falls_on_the_same_values_in_both_passes() -> None:
    network, batch, other = layered(nn.Dropout(0.5)), rows(), torch.randn(10, 5, dtype=torch.float64)
    torch.manual_seed(11)
    expected, wanted = literal_grad_cache(network, batch, 4, lambda vectors: contrast(vectors, other))
    torch.manual_seed(11)
    found = contrast(in_chunks(network, batch, 4), other)
    torch.rand(7)  # what else draws between the passes
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=0)
    for one, slope in zip(slopes(network, found), wanted, strict=True):
        torch.testing.assert_close(one, slope, rtol=1e-10, atol=1e-14)


def test_random_numbers_after_the_gradients_are_those_without_them() -> None:
    network = layered(nn.Dropout(0.5))
    torch.manual_seed(3)
    vectors = in_chunks(network, rows(), 4)
    before = torch.get_rng_state()
    vectors.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_norm_sees_each_chunk_and_counts_it_once() -> None:
    network, plain = layered(nn.BatchNorm1d(12)), layered(nn.BatchNorm1d(12))
    other = torch.randn(9, 5, dtype=torch.float64)
    found = contrast(in_chunks(network, rows(9), 3), other)
    expected = contrast(torch.cat([plain(part) for part in torch.split(rows(9), 3)]), other)
    for one, slope in zip(slopes(network, found), slopes(plain, expected), strict=True):
        torch.testing.assert_close(one, slope, rtol=1e-10, atol=1e-14)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name), rtol=1e-12, atol=0)
    assert int(network.get_buffer("2.num_batches_tracked")) == 3


def test_a_network_that_does_not_learn_needs_one_pass_alone() -> None:
    network = layered().requires_grad_(False)
    assert not in_chunks(network, rows(), 3).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(layered(), rows(), 3), layered()(rows()))


def test_less_is_kept_for_gradients_than_by_one_pass() -> None:
    kept: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    network = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU())])
    batch, sizes = torch.randn(64, 64), {}
    for chunk in (0, 8):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            in_chunks(network, batch, chunk)
        sizes[chunk] = sum(kept)
    assert sizes[8] < sizes[0] / 5


@pytest.mark.parametrize("name", ["clip", "siglip", "lit"])
def test_a_method_in_chunks_has_the_gradients_of_the_whole(name: str) -> None:
    found = {}
    for chunk in (0, 3):
        method = tiny_method(name, chunk=chunk).double()
        method.backbone.eval()  # batch norms over fewer rows are another network
        batch = batch_for(method)
        batch.views[0] = batch.views[0].double()  # type: ignore[index]
        found[chunk] = gradients(method, method(batch)["loss"])
    assert found[3].keys() == found[0].keys()
    for key, expected in found[0].items():
        torch.testing.assert_close(found[3][key], expected, rtol=1e-9, atol=1e-12)


def _joined(chunk: int) -> dict[str, Tensor]:
    """Statistics and gradients of a synchronized network on this rank, whose backward talks to the others."""
    torch.manual_seed(0)
    network = synchronize_batch_norms(TinyConv(), torch.device("cpu")).double()
    batch = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    in_chunks(network, batch, chunk).square().sum().backward()
    return {
        **{key: value.clone() for key, value in network.named_buffers()},
        **{key: value.grad.clone() for key, value in network.named_parameters() if value.grad is not None},
    }


def test_batch_norms_over_ranks_are_replayed_together() -> None:
    first, second = on_ranks(_joined, 3)
    assert int(first["network.1.num_batches_tracked"]) == 2
    for key, value in first.items():
        torch.testing.assert_close(second[key], value)
    [alone] = on_ranks(_joined, 3, world=1)  # both ranks had the same images: means and gradients are its own
    for key, value in alone.items():
        if "running_var" not in key:  # unbiased over twice as many
            torch.testing.assert_close(first[key], value, rtol=1e-9, atol=1e-12)
