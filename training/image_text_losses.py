"""How images and captions are brought together: CLIP's cross-entropy and SigLIP's sigmoid, over all ranks.

Rows are pairs. A caption is right for an image when it is the image's own, when it has the same words as the
image's own, or when both are of one image or group: such pairs are never each other's negatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from training.distributed import gather, world_size
from training.precision import full_precision

__all__ = ["clip_loss", "siglip_loss"]


@full_precision
def clip_loss(
    images: Tensor,
    texts: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    scale: Tensor,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The mean of both cross-entropies, over this rank's rows against the pairs of all ranks.

    Radford et al. 2021, figure 3. Where a row has several right answers they share its probability equally,
    as in UniCL (Yang et al. 2022, eq. 2). With label smoothing ε a share ε is spread over all answers alike.

    Args:
        images, texts: unit vectors [B, dim]; row i of both is a pair.
        image_ids, text_ids: int64 [B]: one number for each image or group, and for each wording.
        scale: float [], what cosines are multiplied with.
        label_smoothing: ε, 0..1.

    Returns:
        float [], in float32 or the float64 of its inputs.
    """
    all_images, all_texts = gather(images), gather(texts)
    right = _right(image_ids, text_ids, gather(image_ids), gather(text_ids))
    return (
        _cross_entropy(scale * images @ all_texts.T, right, label_smoothing)
        + _cross_entropy(scale * texts @ all_images.T, right, label_smoothing)
    ) / 2


@full_precision
def siglip_loss(
    images: Tensor,
    texts: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    scale: Tensor,
    *,
    bias: Tensor,
) -> Tensor:
    """−log σ(±(scale · cosine + bias)), summed over this rank's images with the captions of all ranks, ÷ B.

    Zhai et al. 2023, algorithm 1. As in its section 3.3 no rank ever holds more than B × B logits: the
    captions of each rank are a chunk, computed again for its gradient.

    Args:
        images, texts, image_ids, text_ids: As in `clip_loss`.
        scale, bias: float [].

    Returns:
        float [], in float32 or the float64 of its inputs.
    """
    total = images.new_zeros(())
    ranks = world_size()
    chunks = zip(
        gather(texts).chunk(ranks), gather(image_ids).chunk(ranks), gather(text_ids).chunk(ranks), strict=True
    )
    for some, some_image_ids, some_text_ids in chunks:
        right = _right(image_ids, text_ids, some_image_ids, some_text_ids)
        if ranks == 1:
            total = total + _sigmoid(images, some, right, scale, bias)
        else:
            total = total + checkpoint(
                _sigmoid, images, some, right, scale, bias, use_reentrant=False, preserve_rng_state=False
            )
    return total / len(images)


def _sigmoid(images: Tensor, texts: Tensor, right: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * images @ texts.T + bias
    return -F.logsigmoid(torch.where(right, logits, -logits)).sum()


def _right(image_ids: Tensor, text_ids: Tensor, other_images: Tensor, other_texts: Tensor) -> Tensor:
    """bool [B, M]: which of the M pairs' images and captions are right for which rows."""
    return (image_ids[:, None] == other_images) | (text_ids[:, None] == other_texts)


def _cross_entropy(logits: Tensor, right: Tensor, label_smoothing: float) -> Tensor:
    """−Σ q log p, mean over rows, with q spread over the right answers."""
    wanted = (logits * right).sum(1) / right.sum(1)
    if label_smoothing:
        wanted = (1 - label_smoothing) * wanted + label_smoothing * logits.mean(1)
    return (logits.logsumexp(1) - wanted).mean()
