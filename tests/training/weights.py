"""Weights to start from, as runs and others write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.backbones import Backbone, build, describe

__all__ = ["VIT", "State", "assert_same", "behind", "checkpoint", "plain", "saved", "trained", "with_head"]

VIT = "test_vit/8"
"""timm's own test architecture."""
State = dict[str, Tensor]


def trained(name: str, size: int = 32, **options: bool) -> Backbone:
    """An encoder whose every number, also of buffers and of what starts at zero, is like no other's."""
    torch.manual_seed(7)
    backbone = build(name, size, **options)
    with torch.no_grad():
        for tensor in backbone.state_dict().values():
            tensor.add_(torch.rand(tensor.shape) if tensor.is_floating_point() else 3)
    return backbone


def plain(backbone: Backbone) -> State:
    """The weights as the library names them."""
    return dict(backbone.network.state_dict())


def behind(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def checkpoint(backbone: Backbone) -> dict[str, Any]:
    """What the loop writes, as far as starting from it goes; a momentum copy and a head lie beside."""
    other = trained(backbone.name)
    model = (
        behind("teacher.", dict(backbone.state_dict()))
        | behind("student.", {name: tensor + 1 for name, tensor in other.state_dict().items()})
        | {"head.weight": torch.zeros(2, 2)}
    )
    return {
        "method": "dino",
        "settings": {"size": 32},
        "step": 5,
        "model": model,
        "encoder_prefix": "teacher.",
        "backbone": describe(backbone),
        "optimizer": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}},
    }


def saved(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return str(path)


def assert_same(found: nn.Module, expected: nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def with_head(state: State) -> State:
    return state | {"fc.weight": torch.zeros(10, 8), "fc.bias": torch.zeros(10)}
