"""CLIP's and SigLIP's losses against their papers, pair by pair in float64, and open_clip's; on two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.training.ranks import on_ranks
from training.distributed import rank, world_size
from training.image_text_losses import clip_loss, siglip_loss
from training.open_clip_models import library

SCALE, BIAS = 7.0, -3.0
DIFFERENT = (torch.arange(8), torch.arange(8) + 100)
REPEATED = (torch.tensor([0, 1, 2, 1, 4, 5, 0, 7]), torch.tensor([3, 4, 3, 6, 7, 8, 9, 4]))
"""Two pairs of one image, and captions with the same words; on one and on both of two ranks."""


def pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, 8, 5, generator=generator, dtype=torch.float64)
    return F.normalize(images, dim=1).requires_grad_(), F.normalize(texts, dim=1).requires_grad_()


def numbers() -> tuple[Tensor, Tensor]:
    return (torch.tensor(one, dtype=torch.float64, requires_grad=True) for one in (SCALE, BIAS))  # type: ignore[return-value]


def right(i: int, j: int, ids: tuple[Tensor, Tensor]) -> bool:
    return bool(ids[0][i] == ids[0][j] or ids[1][i] == ids[1][j])


def literal_clip(
    images: Tensor, texts: Tensor, ids: tuple[Tensor, Tensor], scale: Tensor, smoothing: float
) -> Tensor:
    """Figure 3 of the paper, with q spread over the right answers and then over all."""
    total = torch.zeros((), dtype=torch.float64)
    for queries, answers in ((images, texts), (texts, images)):
        for i, query in enumerate(queries):
            odds = [torch.exp(scale * (query * answer).sum()) for answer in answers]
            rights = [right(i, j, ids) for j in range(len(answers))]
            for j, chance in enumerate(odds):
                wanted = (1 - smoothing) * rights[j] / sum(rights) + smoothing / len(answers)
                total = total - wanted * torch.log(chance / sum(odds))
    return total / (2 * len(images))


def literal_siglip(
    images: Tensor, texts: Tensor, ids: tuple[Tensor, Tensor], scale: Tensor, bias: Tensor
) -> Tensor:
    """Algorithm 1 of the paper."""
    total = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(images):
        for j, text in enumerate(texts):
            sign = 1 if right(i, j, ids) else -1
            total = total - torch.log(1 / (1 + torch.exp(-sign * (scale * (image * text).sum() + bias))))
    return total / len(images)


def same(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected)
    ours, theirs = torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ids", [DIFFERENT, REPEATED], ids=["different", "repeated"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_clips_loss_and_its_gradients_are_those_of_the_paper(
    ids: tuple[Tensor, Tensor], smoothing: float
) -> None:
    images, texts = pairs()
    scale, _ = numbers()
    found = clip_loss(images, texts, *ids, scale, label_smoothing=smoothing)
    same(found, literal_clip(images, texts, ids, scale, smoothing), (images, texts, scale))


@pytest.mark.parametrize("ids", [DIFFERENT, REPEATED], ids=["different", "repeated"])
def test_siglips_loss_and_its_gradients_are_those_of_the_paper(ids: tuple[Tensor, Tensor]) -> None:
    images, texts = pairs()
    scale, bias = numbers()
    found = siglip_loss(images, texts, *ids, scale, bias=bias)
    same(found, literal_siglip(images, texts, ids, scale, bias), (images, texts, scale, bias))


def test_both_losses_are_open_clips_on_the_same_vectors() -> None:
    images, texts = pairs()
    scale, bias = numbers()
    losses: Any = library().loss
    same(
        clip_loss(images, texts, *DIFFERENT, scale), losses.ClipLoss()(images, texts, scale), (images, texts)
    )
    theirs = losses.SigLipLoss()(images, texts, scale, bias)
    same(siglip_loss(images, texts, *DIFFERENT, scale, bias=bias), theirs, (images, texts, scale, bias))


def test_label_smoothing_is_torchs_where_every_caption_differs() -> None:
    images, texts = pairs()
    scale, _ = numbers()
    logits, answers = scale * images @ texts.T, torch.arange(8)
    expected = (
        F.cross_entropy(logits, answers, label_smoothing=0.1)
        + F.cross_entropy(logits.T, answers, label_smoothing=0.1)
    ) / 2
    same(clip_loss(images, texts, *DIFFERENT, scale, label_smoothing=0.1), expected, (images, texts, scale))


def test_losses_are_computed_in_float32_under_autocast() -> None:
    images, texts = (one.detach().bfloat16() for one in pairs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = clip_loss(images, texts, *DIFFERENT, torch.tensor(100.0))
    expected = clip_loss(images.float(), texts.float(), *DIFFERENT, torch.tensor(100.0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def _on_a_rank(kind: str, ids: tuple[Tensor, Tensor], open_clips: bool) -> list[Tensor]:
    """This rank's loss, then the gradients that averaging over ranks gives; vectors of all ranks."""
    images, texts = pairs()
    scale, bias = numbers()
    share = slice(rank() * 8 // world_size(), (rank() + 1) * 8 // world_size())
    mine = (images[share], texts[share])
    if open_clips:
        losses: Any = library().loss
        where = {"rank": rank(), "world_size": world_size()}
        loss = (
            losses.ClipLoss(local_loss=True, gather_with_grad=True, **where)(*mine, scale)
            if kind == "clip"
            else losses.SigLipLoss(dist_impl="bidir", **where)(*mine, scale, bias)
        )
    elif kind == "clip":
        loss = clip_loss(*mine, ids[0][share], ids[1][share], scale, label_smoothing=0.2)
    else:
        loss = siglip_loss(*mine, ids[0][share], ids[1][share], scale, bias=bias)
    wanted = (images, texts, scale) if kind == "clip" else (images, texts, scale, bias)
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("ids", [DIFFERENT, REPEATED], ids=["different", "repeated"])
def test_two_ranks_have_the_loss_and_gradients_of_one(kind: str, ids: tuple[Tensor, Tensor]) -> None:
    images, texts = pairs()
    scale, bias = numbers()
    if kind == "clip":
        expected, wanted = literal_clip(images, texts, ids, scale, 0.2), (images, texts, scale)
    else:
        expected, wanted = literal_siglip(images, texts, ids, scale, bias), (images, texts, scale, bias)
    gradients = torch.autograd.grad(expected, wanted)
    first, second = on_ranks(_on_a_rank, kind, ids, False)
    for one, other, whole in zip(first, second, (expected.detach(), *gradients), strict=True):
        torch.testing.assert_close((one + other) / 2, whole)


def test_siglip_on_two_ranks_is_open_clips() -> None:
    ours, theirs = (
        on_ranks(_on_a_rank, "siglip", DIFFERENT, False),
        on_ranks(_on_a_rank, "siglip", DIFFERENT, True),
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
