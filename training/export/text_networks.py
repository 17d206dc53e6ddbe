"""Text towers that take texts of any length, with the vectors they give when filled up to their context.

Where a token only looks back and the vector is read at the end token, whatever follows that token changes
nothing, so texts are cut to the longest in their batch. A tower that looks both ways without a mask, or reads
the last position (SigLIP), sees its padding and keeps getting it.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

__all__ = ["CoCaText", "EndTokenText", "First", "open_clip_text"]


class EndTokenText(nn.Module):
    """open_clip's text transformer, causal, read at the end token. int64 [batch, length] → [batch, dim].

    Args:
        tower: A `TextTransformer`, or a `CLIP`, which carries the parts of one itself.
        pooling: argmax: the largest id, which in CLIP's vocabulary is the end token's; eos: the first
            `eos_id`; first: the first position.
    """

    def __init__(self, tower: nn.Module, pooling: Literal["argmax", "eos", "first"], eos_id: int) -> None:
        super().__init__()
        self.embedding = cast(nn.Embedding, tower.token_embedding)
        self.positions = cast(nn.Parameter, tower.positional_embedding)
        self.transformer = cast(nn.Module, tower.transformer)
        self.norm = cast(nn.Module, tower.ln_final)
        self.projection = cast("nn.Linear | nn.Parameter | None", tower.text_projection)
        self.register_buffer("mask", cast(Tensor, tower.attn_mask), persistent=False)
        self.pooling = pooling
        self.eos_id = eos_id

    mask: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        tokens = self.embedding(ids) + self.positions[:length]
        tokens = self.norm(self.transformer(tokens, attn_mask=self.mask[:length, :length]))
        return _project(
            tokens[torch.arange(ids.shape[0], device=ids.device), self._end(ids)], self.projection
        )

    def _end(self, ids: Tensor) -> Tensor:
        if self.pooling == "first":
            return torch.zeros_like(ids[:, 0])
        return (ids if self.pooling == "argmax" else ids.eq(self.eos_id).int()).argmax(dim=1)


class CoCaText(nn.Module):
    """open_clip's CoCa: a class token behind the context, which looks back at the text.

    Its published weights were trained with a mask that is off by one: the class token sees the text and the
    first padding after it, and itself only where the text fills the context. Both are kept. So one padding is
    put behind the longest text, unless it fills the context, and the class token keeps the last position.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.embedding = cast(nn.Embedding, tower.token_embedding)
        self.positions = cast(nn.Parameter, tower.positional_embedding)
        self.class_token = cast(nn.Parameter, tower.cls_emb)
        self.transformer = cast(nn.Module, tower.transformer)
        self.norm = cast(nn.Module, tower.ln_final)
        self.projection = cast("nn.Linear | nn.Parameter | None", tower.text_projection)
        self.register_buffer("mask", cast(Tensor, tower.attn_mask), persistent=False)
        self.context = cast(int, tower.context_length)
        self.pad_id = cast(int, tower.pad_id)
        self.heads = cast(int, tower.heads)
        self.late = not tower.correct_cls_mask

    mask: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        ids = torch.cat([ids, torch.full_like(ids[:, :1], self.pad_id)], dim=1)[:, : self.context]
        batch, length = ids.shape
        class_token = (self.class_token + self.positions[-1]).expand(batch, 1, -1)
        tokens = torch.cat([self.embedding(ids) + self.positions[:length], class_token], dim=1)
        seen = ids != self.pad_id
        always = torch.ones_like(seen[:, :1])
        seen = torch.cat([always, seen] if self.late else [seen, always], dim=1)
        mask = self.mask[: length + 1, : length + 1].masked_fill(~seen[:, None], float("-inf"))
        tokens = self.transformer(tokens, attn_mask=mask.repeat_interleave(self.heads, dim=0))
        return _project(self.norm(tokens[:, -1]), self.projection)


class First(nn.Module):
    """The first of what a network returns: CoCa's towers give their tokens as well."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Tensor) -> Tensor:
        found = self.network(batch)
        return cast(Tensor, found[0] if isinstance(found, tuple) else found)


def open_clip_text(model: nn.Module) -> tuple[nn.Module, Literal["longest", "context"]]:
    """The text side of an open_clip model (`CLIP`, `CustomTextCLIP`, `CoCa`), and how its rows are padded."""
    from open_clip.hf_model import HFTextEncoder

    tower = cast(nn.Module, getattr(model, "text", model))
    if isinstance(tower, HFTextEncoder):
        # Its padding is masked, in attention and in the mean.
        masked = type(tower.pooler).__name__ in {"MeanPooler", "ClsPooler", "ClsLastHiddenStatePooler"}
        return First(tower), "longest" if masked else "context"
    if tower is not model and tower.cls_emb is not None and tower.attn_mask is not None:
        return CoCaText(tower), "longest"
    pooling = cast(Any, tower.pool_type if tower is not model else tower.text_pool_type)
    # Filling up with zeros leaves the largest id the largest; another pad id might become it.
    ends = pooling in {"first", "eos"} or (pooling == "argmax" and getattr(tower, "pad_id", 0) == 0)
    if tower.attn_mask is not None and ends:
        eos_id = cast(int, tower.eos_id if tower is not model else tower.text_eos_id)
        return EndTokenText(tower, pooling, eos_id), "longest"
    return (First(tower) if tower is not model else _EncodeText(model)), "context"


class _EncodeText(nn.Module):
    """A `CLIP`, which carries its text tower itself, as a network from ids to vectors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.model).encode_text(ids))


def _project(pooled: Tensor, projection: nn.Linear | nn.Parameter | None) -> Tensor:
    if projection is None:
        return pooled
    return cast(Tensor, projection(pooled)) if isinstance(projection, nn.Linear) else pooled @ projection
