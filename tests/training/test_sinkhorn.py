"""Sinkhorn-Knopp against the paper's own steps, alone and on several ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tests.training.ranks import on_ranks
from training.distributed import rank
from training.sinkhorn import sinkhorn

SCORES = torch.nn.functional.normalize(
    torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
)


def literal(scores: NDArray[np.float64], epsilon: float, iterations: int) -> NDArray[np.float64]:
    """Caron et al. 2020, appendix A.1: Q [K, B] with rows of sum 1/K and columns of sum 1/B in turn."""
    q = np.exp(scores.T / epsilon)
    q /= q.sum()
    prototypes, rows = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] /= q[k].sum() * prototypes
        for b in range(rows):
            q[:, b] /= q[:, b].sum() * rows
    return (q * rows).T


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.05, 1), (0.5, 10)])
def test_it_takes_the_steps_of_the_paper(epsilon: float, iterations: int) -> None:
    found = sinkhorn(SCORES, epsilon=epsilon, iterations=iterations)
    expected = literal(SCORES.numpy().copy(), epsilon, iterations)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-10, atol=1e-12)


def test_every_row_sums_to_one_and_in_the_end_every_prototype_has_an_equal_share() -> None:
    found = sinkhorn(SCORES, epsilon=0.2, iterations=100)
    torch.testing.assert_close(found.sum(1), torch.ones(12, dtype=torch.float64))
    torch.testing.assert_close(found.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64))


def test_a_prototype_that_all_rows_like_best_does_not_take_them_all() -> None:
    scores = SCORES.clone()
    scores[:, 0] += 2
    assert (scores.argmax(1) == 0).all()
    found = sinkhorn(scores, epsilon=0.05, iterations=50)
    assert found.argmax(1).unique().numel() > 2
    assert abs(found[:, 0].sum() - 12 / 5) < 0.05


def test_scores_whose_exponential_is_no_float32_do_not_overflow() -> None:
    scores = (SCORES * 100).float()
    found = sinkhorn(scores, epsilon=0.05, iterations=3)
    assert found.dtype == torch.float32
    assert torch.isfinite(found).all()
    exact = sinkhorn(scores.double(), epsilon=0.05, iterations=3)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-3)


def test_half_precision_is_widened_and_no_gradient_flows() -> None:
    scores = SCORES.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sinkhorn(scores, epsilon=0.05, iterations=3)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(found, sinkhorn(scores.detach().float(), epsilon=0.05, iterations=3))


def _share(starts: tuple[int, ...]) -> Tensor:
    own = SCORES[starts[rank()] : starts[rank() + 1]]
    return sinkhorn(own, epsilon=0.05, iterations=3)


@pytest.mark.parametrize("starts", [(0, 6, 12), (0, 9, 12), (0, 12, 12)])
def test_two_ranks_assign_as_one_process_does_however_many_rows_each_has(starts: tuple[int, ...]) -> None:
    expected = sinkhorn(SCORES, epsilon=0.05, iterations=3)
    torch.testing.assert_close(torch.cat(on_ranks(_share, starts)), expected)
