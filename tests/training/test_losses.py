"""InfoNCE in its three forms against the papers' sums, term by term in float64; on one rank and on two."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.training.ranks import on_ranks
from training.distributed import all_mean, rank
from training.losses import info_nce, nt_xent, query_key_loss

TEMPERATURE = 0.3
BETAS = (0.0, 0.5, 2.0)

# ---------------------------------------------------------------- the papers, term by term


def share_of_the_positive(positive: Tensor, negatives: list[Tensor], beta: float) -> Tensor:
    """−log of it; a negative weighs e^(β·logit) ÷ the mean of that (Robinson et al. 2021, eq. 4, τ⁺ = 0)."""
    if not negatives:
        return 0 * positive
    mean = sum(torch.exp(beta * one) for one in negatives) / len(negatives)
    repulsion = sum(torch.exp(beta * one) / mean * torch.exp(one) for one in negatives)
    return -torch.log(torch.exp(positive) / (torch.exp(positive) + repulsion))


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum() / (first.square().sum().sqrt() * second.square().sum().sqrt())


def literal_nt_xent(first: Tensor, second: Tensor, ids: Tensor, beta: float) -> Tensor:
    """Chen et al. 2020, eq. 1, averaged over all 2N views."""
    views = [*first, *second]
    owner = ids.tolist() * 2
    total = torch.zeros((), dtype=torch.float64)
    for i, view in enumerate(views):
        partner = views[(i + len(first)) % len(views)]
        negatives = [
            cosine(view, other) / TEMPERATURE
            for other, id_ in zip(views, owner, strict=True)
            if id_ != owner[i]
        ]
        total = total + share_of_the_positive(cosine(view, partner) / TEMPERATURE, negatives, beta)
    return total / len(views)


def literal_query_key(queries: Tensor, keys: Tensor, ids: Tensor, beta: float) -> Tensor:
    """Chen et al. 2021, algorithm 1: each query against every key."""
    total = torch.zeros((), dtype=torch.float64)
    for i, query in enumerate(queries):
        negatives = [
            cosine(query, key) / TEMPERATURE for key, id_ in zip(keys, ids, strict=True) if id_ != ids[i]
        ]
        total = total + share_of_the_positive(cosine(query, keys[i]) / TEMPERATURE, negatives, beta)
    return total / len(queries)


Loss = Callable[..., Tensor]


def embeddings(count: int = 6, dim: int = 4, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, count, dim, generator=generator, dtype=torch.float64).to(dtype)
    return first.requires_grad_(), second.requires_grad_()


GROUPED = torch.tensor([0, 1, 2, 1, 4, 0])
"""The ids of six images, of which two and two are of one group; 0 and 1 lie on both of two ranks."""

# ---------------------------------------------------------------- InfoNCE


@pytest.mark.parametrize("beta", BETAS)
def test_info_nce_and_its_gradients_are_those_of_the_paper(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    negatives = (3 * torch.randn(5, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    excluded = torch.rand(5, 7, generator=generator) < 0.3
    expected = (
        sum(
            share_of_the_positive(
                positive[i], [negatives[i, j] for j in range(7) if not excluded[i, j]], beta
            )
            for i in range(5)
        )
        / 5
    )
    found = info_nce(positive, negatives, excluded, beta=beta)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (positive, negatives)),
        torch.autograd.grad(expected, (positive, negatives)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_harder_a_negative_the_more_it_weighs() -> None:
    negatives = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    none = torch.zeros(1, 2, dtype=torch.bool)
    shares = []
    for beta in BETAS:
        (gradient,) = torch.autograd.grad(
            info_nce(torch.ones(1, dtype=torch.float64), negatives, none, beta=beta), negatives
        )
        shares.append((gradient[0, 1] / gradient.sum()).item())
    assert shares[0] < shares[1] < shares[2]


def test_beta_changes_nothing_where_all_negatives_are_alike() -> None:
    positive, negatives = torch.tensor([1.0]), torch.full((1, 9), 0.5)
    none = torch.zeros(1, 9, dtype=torch.bool)
    torch.testing.assert_close(
        info_nce(positive, negatives, none, beta=2.0), info_nce(positive, negatives, none)
    )


@pytest.mark.parametrize("beta", BETAS)
def test_a_row_without_any_negative_costs_nothing_and_has_no_gradient(beta: float) -> None:
    positive = torch.tensor([0.7, -2.0], requires_grad=True)
    negatives = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    loss = info_nce(positive, negatives, torch.ones(2, 3, dtype=torch.bool), beta=beta)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(positive.grad, torch.zeros(2))
    assert torch.equal(negatives.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("beta", BETAS)
def test_logits_of_a_thousand_stay_finite(beta: float) -> None:
    positive = torch.tensor([1000.0, -1000.0], requires_grad=True)
    negatives = torch.tensor([[-1000.0, 900.0], [1000.0, -1000.0]], requires_grad=True)
    loss = info_nce(positive, negatives, torch.zeros(2, 2, dtype=torch.bool), beta=beta)
    loss.backward()
    # The hardest negative is all there is: with β > 0 it has the weight of both.
    assert loss.item() == pytest.approx(1000 + (math.log(2) / 2 if beta else 0), rel=1e-6)
    assert torch.isfinite(positive.grad).all()
    assert torch.isfinite(negatives.grad).all()


# ---------------------------------------------------------------- the forms over a batch

FORMS = pytest.mark.parametrize(
    ("loss", "literal"),
    [(nt_xent, literal_nt_xent), (query_key_loss, literal_query_key)],
    ids=["nt_xent", "query_key"],
)


@FORMS
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("ids", [torch.arange(6), GROUPED], ids=["images", "groups"])
def test_a_form_and_its_gradients_are_those_of_the_paper(
    loss: Loss, literal: Loss, ids: Tensor, beta: float
) -> None:
    pair = embeddings()
    found = loss(*pair, ids, temperature=TEMPERATURE, beta=beta)
    expected = literal(*pair, ids, beta)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, pair), torch.autograd.grad(expected, pair), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@FORMS
def test_images_of_one_group_do_not_repel_each_other(loss: Loss, literal: Loss) -> None:
    first, second = torch.eye(2), torch.eye(2)
    assert loss(first, second, torch.tensor([7, 7]), temperature=1.0).item() == 0
    assert loss(first, second, torch.tensor([7, 8]), temperature=1.0).item() > 0.1


@FORMS
def test_the_length_of_embeddings_does_not_matter(loss: Loss, literal: Loss) -> None:
    first, second = embeddings()
    torch.testing.assert_close(
        loss(first * 100, second / 100, GROUPED, temperature=TEMPERATURE),
        loss(first, second, GROUPED, temperature=TEMPERATURE),
    )


def test_nt_xent_of_embeddings_that_are_all_alike_is_the_logarithm_of_2n_minus_1() -> None:
    alike = torch.ones(8, 4)
    assert nt_xent(alike, alike, torch.arange(8), temperature=0.1).item() == pytest.approx(math.log(15))


def test_detached_keys_get_no_gradient_and_others_do() -> None:
    queries, keys = embeddings()
    query_key_loss(queries, keys.detach(), GROUPED, temperature=TEMPERATURE).backward()
    assert queries.grad is not None
    assert keys.grad is None
    query_key_loss(queries, keys, GROUPED, temperature=TEMPERATURE).backward()
    assert keys.grad is not None


@FORMS
def test_under_autocast_a_loss_is_computed_in_float32(loss: Loss, literal: Loss) -> None:
    pair = embeddings(dtype=torch.float32)
    plain = loss(*pair, GROUPED, temperature=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert (pair[0] @ pair[1].T).dtype == torch.bfloat16  # what would happen to the cosines otherwise
        under = loss(*pair, GROUPED, temperature=0.02)
    assert under.dtype == torch.float32
    assert under.item() == plain.item()


@FORMS
def test_embeddings_in_half_precision_are_widened_first(loss: Loss, literal: Loss) -> None:
    half = embeddings(dtype=torch.bfloat16)
    wide = [one.float() for one in half]
    found = loss(*half, GROUPED, temperature=TEMPERATURE)
    assert found.dtype == torch.float32
    assert found.item() == loss(*wide, GROUPED, temperature=TEMPERATURE).item()


# ---------------------------------------------------------------- two ranks


def on_own_rows(cases: list[tuple[Loss, float]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Loss and gradients on this rank's half of the batch, averaged over ranks as DDP does."""
    results = []
    for loss, beta in cases:
        own = slice(3 * rank(), 3 * rank() + 3)
        first, second = embeddings()
        value = loss(first[own], second[own], GROUPED[own], temperature=TEMPERATURE, beta=beta)
        gradients = torch.autograd.grad(value, (first, second))
        results.append((all_mean(value.detach()), *(all_mean(one) for one in gradients)))
    return results


def test_two_ranks_have_the_loss_and_gradients_of_one_with_the_joined_batch() -> None:
    cases = [(loss, beta) for loss in (nt_xent, query_key_loss) for beta in (0.0, 0.5)]
    for result in on_ranks(on_own_rows, cases):
        for (loss, beta), found in zip(cases, result, strict=True):
            pair = embeddings()
            value = loss(*pair, GROUPED, temperature=TEMPERATURE, beta=beta)
            expected = (value.detach(), *torch.autograd.grad(value, pair))
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs)
