"""Which part of a tower learns: all of it, its last blocks, low-rank additions, or nothing.

A locked tower is in evaluation mode for good: its batch norms keep their statistics and its dropout is off,
as LiT has it (Zhai et al. 2022).

LoRA (Hu et al. 2022) is written here in a few lines on torch's parametrizations. The library `peft` would do
as well for linear layers, but open_clip's attention keeps its three projections in one weight, which peft
merges in place for every pass; a parametrization is a plain sum, under checkpointing and in DDP as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from embedserve.errors import InvalidField

__all__ = [
    "LowRank",
    "Tuning",
    "add_low_rank",
    "blocks_of",
    "fill",
    "keep_locked",
    "merge_low_rank",
    "merged",
    "tune",
]

Tuning = Literal["all", "blocks", "lora", "nothing"]

BLOCKS = ("blocks", "resblocks", "layers", "layer", "stages", "h")
"""What libraries call the list of a network's blocks."""
RESNET = ("layer1", "layer2", "layer3", "layer4")
AFTER = {
    "norm", "fc_norm", "ln_final", "ln_post", "head_norm", "norm_head", "conv_head", "bn2", "proj",
    "projection", "text_projection", "head", "last_norm", "attnpool", "attn_pool",
}  # fmt: skip
"""What may come behind the blocks: it learns with the last of them. Stems use some of these names too."""

PARAMETRIZED, ORIGINAL = ".parametrizations.", ".original"
"""In the names that torch gives to parametrized weights."""


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
        if not found:
            raise InvalidField(
                f"{name}=blocks needs a tower that is a row of blocks, and this one is none that is known "
                f"here; use {name}=all, or a ResNet or transformer.",
                param=name,
            )
        if blocks > len(found):
            raise InvalidField(
                f"last_blocks={blocks}, but the tower has only {len(found)}; give at most that, or "
                f"{name}=all.",
                param="last_blocks",
            )
        for module in [*found[len(found) - blocks :], *behind]:
            module.requires_grad_(True)


def keep_locked(tower: nn.Module) -> None:
    """Puts what is locked into evaluation mode: batch norms of locked blocks keep their statistics."""
    for module in tower.modules():
        own = list(module.parameters())
        if own and not any(one.requires_grad for one in own):
            module.eval()


def blocks_of(tower: nn.Module) -> tuple[list[nn.Module], list[Any]]:
    """The blocks of a network in their order, and the modules and parameters behind them."""
    for module in tower.modules():
        children = dict(module.named_children())
        if all(one in children for one in RESNET):
            blocks = [children[one] for one in RESNET]
            return blocks, _behind(tower, blocks)
        for one in BLOCKS:
            inside = children.get(one)
            if isinstance(inside, nn.ModuleList | nn.Sequential) and len(inside) > 0:
                return list(inside), _behind(tower, list(inside))
    return [], []


def _behind(tower: nn.Module, blocks: Sequence[nn.Module]) -> list[Any]:
    """Modules after the last block, and parameters beside the blocks, with a name that says they follow."""
    inside = {id(one) for block in blocks for one in block.modules()}
    modules = list(tower.named_modules())
    last = max(at for at, (_, module) in enumerate(modules) if id(module) in inside)
    found: list[Any] = [module for path, module in modules[last + 1 :] if path.rpartition(".")[2] in AFTER]
    for _, module in modules[:last]:
        if id(module) not in inside and any(one is blocks[-1] for one in module.modules()):
            found += [one for name, one in module.named_parameters(recurse=False) if name in AFTER]
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


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a state dict under the names that they have without additions, which are in them."""
    found = dict(state)
    for name in [one for one in found if one.endswith(ORIGINAL)]:
        module, _, matrix = name.removesuffix(ORIGINAL).rpartition(PARAMETRIZED)
        steps = f"{module}{PARAMETRIZED}{matrix}.0."
        if not {f"{steps}first", f"{steps}second"} <= found.keys():
            continue
        weight, first, second = (found.pop(one) for one in (name, f"{steps}first", f"{steps}second"))
        found[f"{module}.{matrix}"] = weight + len(first) ** -0.5 * (second @ first)
    return found


@torch.no_grad()
def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies what fits of a state dict without additions; a module's own additions stay."""
    for own, value in module.state_dict().items():
        name = own.removesuffix(ORIGINAL).replace(PARAMETRIZED, ".") if own.endswith(ORIGINAL) else own
        if name in state and state[name].shape == value.shape:
            value.copy_(state[name])
