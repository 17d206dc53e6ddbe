"""Which part of a tower learns: all of it, its last blocks, low-rank additions, or nothing.

A locked tower is in evaluation mode for good: its batch norms keep their statistics and its dropout is off,
as LiT has it (Zhai et al. 2022).

LoRA (Hu et al. 2022) is written here in a few lines on torch's parametrizations. The library `peft` would do
as well for linear layers, but open_clip's attention keeps its three projections in one weight, which peft
merges in place for every pass; a parametrization is a plain sum, under checkpointing and in DDP as well.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from embedserve.errors import InvalidField

__all__ = ["LowRank", "Tuning", "add_low_rank", "blocks_of", "merge_low_rank", "tune"]

Tuning = Literal["all", "blocks", "lora", "nothing"]

BLOCKS = ("blocks", "resblocks", "layers", "layer", "stages", "h")
"""What libraries call the list of a network's blocks."""
RESNET = ("layer1", "layer2", "layer3", "layer4")
AFTER = {
    "norm", "fc_norm", "ln_final", "ln_post", "head_norm", "norm_head", "conv_head", "bn2", "proj",
    "projection", "text_projection", "head", "last_norm",
}  # fmt: skip
"""What comes behind the blocks: it learns with the last of them."""


def tune(tower: nn.Module, how: Tuning, *, blocks: int, rank: int, name: str) -> None:
    """Locks what does not learn.

    Args:
        tower: A backbone or text tower.
        how: What learns.
        blocks: For "blocks": how many, from the end.
        rank: For "lora".
        name: The option's, for messages.

    Raises:
        InvalidField: The tower has no blocks, fewer of them, or no matrices that LoRA could add to.
    """
    if how == "all":
        return
    tower.requires_grad_(False)
    if how == "lora":
        if not add_low_rank(tower, rank):
            raise InvalidField(
                f"{name}=lora adds to the matrices of transformers, and this tower has none; use "
                f"{name}=blocks, or a vision transformer.",
                param=name,
            )
    elif how == "blocks":
        found, behind = blocks_of(tower)
        if blocks > len(found) or not found:
            raise InvalidField(
                f"last_blocks={blocks}, but the tower has {len(found)} blocks; give at most that, or "
                f"{name}=all.",
                param="last_blocks",
            )
        for module in [*found[len(found) - blocks :], *behind]:
            module.requires_grad_(True)


def blocks_of(tower: nn.Module) -> tuple[list[nn.Module], list[Any]]:
    """The blocks of a network in their order, and the modules and parameters behind them."""
    for module in tower.modules():
        children = dict(module.named_children())
        if all(one in children for one in RESNET):
            return [children[one] for one in RESNET], []
        for one in BLOCKS:
            inside = children.get(one)
            if isinstance(inside, nn.ModuleList | nn.Sequential) and len(inside) > 0:
                return list(inside), _behind(tower, set(inside.parameters()))
    return [], []


def _behind(tower: nn.Module, inside: set[nn.Parameter]) -> list[Any]:
    """Modules and parameters outside of the blocks with a name that says they follow them."""
    found: list[Any] = []
    for path, module in tower.named_modules():
        if path.rpartition(".")[2] in AFTER and not inside & set(module.parameters()):
            found.append(module)
    for path, parameter in tower.named_parameters():
        if path.rpartition(".")[2] in AFTER and parameter not in inside:
            found.append(parameter)
    return found


# ------------------------------------------------------------------------------------------------ LoRA


class LowRank(nn.Module):
    """W + B·A: weights [out, in] with a learned addition of low rank, which starts at 0.

    The addition is scaled by 1 ÷ √rank (Kalajdzievski 2023), so that its size does not depend on the rank.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        self.first = nn.Parameter(torch.empty(rank, columns))
        self.second = nn.Parameter(torch.zeros(rows, rank))
        nn.init.kaiming_uniform_(self.first, a=math.sqrt(5))
        self.factor = 1 / math.sqrt(rank)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.factor * (self.second @ self.first)


def add_low_rank(tower: nn.Module, rank: int) -> int:
    """Gives the matrices of linear layers and of attention an addition that learns; the rest is locked.

    Returns:
        How many matrices.
    """
    tower.requires_grad_(False)
    found = [
        (module, name)
        for module in tower.modules()
        if isinstance(module, nn.Linear | nn.MultiheadAttention)
        for name in ("weight", "in_proj_weight")
        if isinstance(getattr(module, name, None), nn.Parameter)
    ]
    for module, name in found:
        parametrize.register_parametrization(module, name, LowRank(getattr(module, name), rank))
    return len(found)


def merge_low_rank(tower: nn.Module) -> nn.Module:
    """Adds the additions to their matrices for good, in place: what exports and other runs take."""
    for module in list(tower.modules()):
        added: Any = getattr(module, "parametrizations", {})
        for name in [one for one, steps in added.items() if isinstance(steps[0], LowRank)]:
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    return tower
