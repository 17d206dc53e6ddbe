"""Networks written out in functions, by their authors' names, to compare features with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["byol_resnet", "vision_transformer"]

State = dict[str, Tensor]


def vision_transformer(state: State, images: Tensor, *, heads: int, antialias: bool = False) -> Tensor:
    """The class token of DINO's and DINOv2's transformers (with layer scale, registers and SwiGLU where the
    state has them), positions resampled as their code does where the grid differs. Any device, [B, dim]."""
    patch = state["patch_embed.proj.weight"].shape[-1]
    tokens = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    grid = tokens.shape[2:]
    tokens = tokens.flatten(2).transpose(1, 2)
    batch, _, dim = tokens.shape
    tokens = torch.cat([state["cls_token"].expand(batch, -1, -1), tokens], 1)
    tokens = tokens + resampled(state["pos_embed"], grid[0], antialias=antialias)
    if "register_tokens" in state:
        registers = state["register_tokens"].expand(batch, -1, -1)
        tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], 1)
    for number in range(sum(name.endswith("norm1.weight") for name in state)):
        block = {
            name.removeprefix(f"blocks.{number}."): tensor
            for name, tensor in state.items()
            if name.startswith(f"blocks.{number}.")
        }
        normed = F.layer_norm(tokens, (dim,), block["norm1.weight"], block["norm1.bias"], 1e-6)
        tokens = tokens + attended(block, normed, heads) * block.get("ls1.gamma", torch.ones(dim))
        normed = F.layer_norm(tokens, (dim,), block["norm2.weight"], block["norm2.bias"], 1e-6)
        tokens = tokens + fed_forward(block, normed) * block.get("ls2.gamma", torch.ones(dim))
    return F.layer_norm(tokens, (dim,), state["norm.weight"], state["norm.bias"], 1e-6)[:, 0]


def attended(block: State, tokens: Tensor, heads: int) -> Tensor:
    qkv = F.linear(tokens, block["attn.qkv.weight"], block["attn.qkv.bias"])
    query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
    return F.linear(
        (weights @ value).transpose(1, 2).flatten(2), block["attn.proj.weight"], block["attn.proj.bias"]
    )


def fed_forward(block: State, tokens: Tensor) -> Tensor:
    if "mlp.w12.weight" in block:
        gate, value = F.linear(tokens, block["mlp.w12.weight"], block["mlp.w12.bias"]).chunk(2, -1)
        return F.linear(F.silu(gate) * value, block["mlp.w3.weight"], block["mlp.w3.bias"])
    hidden = F.gelu(F.linear(tokens, block["mlp.fc1.weight"], block["mlp.fc1.bias"]))
    return F.linear(hidden, block["mlp.fc2.weight"], block["mlp.fc2.bias"])


def resampled(positions: Tensor, side: int, *, antialias: bool) -> Tensor:
    old = math.isqrt(positions.shape[1] - 1)
    if old == side:
        return positions
    grid = positions[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    if antialias:  # as with registers: to a size
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    else:  # by a scale, whose tenth is in the coordinates that are sampled
        grid = F.interpolate(grid, scale_factor=((side + 0.1) / old,) * 2, mode="bicubic")
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def byol_resnet(params: dict[str, State], averages: dict[str, State], images: Tensor) -> Tensor:
    """BYOL's ResNet by haiku's names, weights [height, width, in, out], "SAME" padding; gives [B, dim]."""

    def convolved(maps: Tensor, name: str, stride: int) -> Tensor:
        weight = params[name]["w"].permute(3, 2, 0, 1)
        return F.conv2d(same(maps, weight.shape[-1], stride), weight, stride=stride)

    def normed(maps: Tensor, name: str) -> Tensor:
        mean, var = (
            averages[f"{name}/~/{kind}_ema"]["average"].reshape(1, -1, 1, 1) for kind in ("mean", "var")
        )
        scale, offset = (params[name][kind].reshape(1, -1, 1, 1) for kind in ("scale", "offset"))
        return (maps - mean) / torch.sqrt(var + 1e-5) * scale + offset

    root = next(iter(params)).partition("/")[0]
    maps = torch.relu(normed(convolved(images, f"{root}/~/initial_conv", 2), f"{root}/~/initial_batchnorm"))
    maps = F.max_pool2d(same(maps, 3, 2), 3, 2)
    for group in range(4):
        number = 0
        while f"{root}/~/block_group_{group}/~/block_{number}/~/conv_0" in params:
            block = f"{root}/~/block_group_{group}/~/block_{number}/~"
            stride = 2 if group and not number else 1
            shortcut = maps
            if f"{block}/shortcut_conv" in params:
                shortcut = normed(
                    convolved(maps, f"{block}/shortcut_conv", stride), f"{block}/shortcut_batchnorm"
                )
            out = torch.relu(normed(convolved(maps, f"{block}/conv_0", 1), f"{block}/batchnorm_0"))
            out = torch.relu(normed(convolved(out, f"{block}/conv_1", stride), f"{block}/batchnorm_1"))
            maps = torch.relu(normed(convolved(out, f"{block}/conv_2", 1), f"{block}/batchnorm_2") + shortcut)
            number += 1
    return maps.mean((2, 3))


def same(maps: Tensor, kernel: int, stride: int) -> Tensor:
    """As TensorFlow's documentation of "SAME" computes it, one side after the other."""
    for side in (2, 3):
        size = maps.shape[side]
        total = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
        before = maps.new_zeros([n if d != side else total // 2 for d, n in enumerate(maps.shape)])
        after = maps.new_zeros([n if d != side else total - total // 2 for d, n in enumerate(maps.shape)])
        maps = torch.cat([before, maps, after], side)
    return maps
