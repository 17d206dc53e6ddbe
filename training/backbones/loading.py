"""Weights into an encoder, without leaving anything random silently.

Every tensor of the network has to be found, of the same shape. What differs on purpose (a stem, the number of
positions, a class head) is said in the encoder's `notes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from embedserve.errors import InvalidField
from training.backbones.base import Backbone
from training.backbones.convolutional import ResNet, stem_of
from training.backbones.open_clip import OpenClipImages, fit_positions
from training.backbones.starting import Weights
from training.backbones.vision_transformer import VisionTransformer

__all__ = ["check_fit", "load"]

HEADS = frozenset(
    {
        "classifier",
        "fc",
        "head",
        "head_dist",
        "linear",
        "pre_logits",
        "predictor",
        "projection_head",
        "prototypes",
    }
)
"""First words of the names of what others attach behind the features; the encoder has none of it."""
MASK_TOKENS = ("mask_token", "masked_embed")
"""In DINOv2's and our own files, and in iBOT's."""
PREFERRED = ("teacher", "encoder_q", "base_encoder", "student", "backbone")
"""Where a file holds several copies of the network, the one that its paper evaluates."""


def load(backbone: Backbone, weights: Weights) -> None:
    """Copies the weights into the encoder and adds to its notes what was decided on the way.

    A ResNet takes over the stem of the weights. Positions for another image size are resampled. A class head,
    and everything that lies elsewhere in the file, is left out.

    Raises:
        InvalidField: Tensors are missing, left over, or of another shape; the first few are named.
    """
    expected = dict(backbone.network.state_dict())
    prefix = _prefix(weights, list(expected))
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in weights.tensors.items()
        if name.startswith(prefix)
    }
    notes = [f"Starts from {weights.origin}" + (f", tensors '{prefix}…'." if prefix else ".")]
    token = _take_mask_token(found, weights.tensors, prefix)
    heads = sorted(name for name in found if name not in expected and name.split(".")[0] in HEADS)
    for name in heads:
        del found[name]
    if isinstance(backbone, ResNet) and (weights.stem or "conv1.weight" in found):
        stem = weights.stem or stem_of(found["conv1.weight"], backbone.stem)
        if stem != backbone.stem:
            notes.append(
                f"Its weights were trained with the {stem} stem, which is kept; random weights would have "
                f"had the {backbone.stem} one for this size."
            )
            backbone.set_stem(stem)
            expected = dict(backbone.network.state_dict())
    if isinstance(backbone, OpenClipImages) and (note := fit_positions(backbone, found)):
        notes.append(note)
    if isinstance(backbone, VisionTransformer):
        notes += _fit_positions(backbone, found, as_dino=weights.positions == "dino")
        notes += _load_mask_token(backbone, token)
    # Files from before torch 0.4.1 do not count batches; the count plays no part in the result.
    uncounted = [name for name in expected if name.endswith("num_batches_tracked") and name not in found]
    found |= {name: expected[name] for name in uncounted}
    check_fit(backbone.name, weights.origin, expected, found)
    backbone.network.load_state_dict(found)
    if heads:
        notes.append(f"The class head was left out ({', '.join(heads)}).")
    backbone.notes += (*notes, *weights.notes)


def _prefix(weights: Weights, expected: list[str]) -> str:
    """What comes before the network's names in the file: where the most of them are found."""
    if weights.prefix is not None:
        return weights.prefix
    names = weights.tensors.keys()
    first = expected[0]
    prefixes = [name.removesuffix(first) for name in names if name == first or name.endswith("." + first)]
    if not prefixes:
        shown = ", ".join(list(names)[:4])
        raise InvalidField(
            f"{weights.origin} has no tensor named '{first}', alone or behind a prefix; it begins with "
            f"{shown}. Choose the backbone that it is for, and weights under torchvision's or timm's names.",
            param="start",
        )
    matches = {prefix: sum(prefix + name in names for name in expected) for prefix in prefixes}
    best = [prefix for prefix in prefixes if matches[prefix] == max(matches.values())]
    for word in PREFERRED:
        for prefix in best:
            if word in prefix.split("."):
                return prefix
    if len(best) > 1:
        raise InvalidField(
            f"{weights.origin} holds the network more than once (behind {', '.join(map(repr, best))}); "
            "save the one to start from in a file of its own.",
            param="start",
        )
    return best[0]


def check_fit(name: str, origin: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises InvalidField when tensors are missing, left over, of another shape or not finite.

    Args:
        name: The network's, for people.
        origin: Where the tensors are from.
        expected: The network's state.
        found: What there is.
    """
    shapes = [
        f"{key} is {list(found[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", [key for key in expected if key not in found]),
            ("left over", [key for key in found if key not in expected]),
            ("of another shape", shapes),
            ("not finite", [key for key in expected if key in found and not found[key].isfinite().all()]),
        )
        if names
    ]
    if problems:
        raise InvalidField(
            f"{origin} does not fit '{name}', which has {len(expected)} tensors: {'; '.join(problems)}. "
            "Choose the backbone that the weights are for.",
            param="start",
        )


def _fit_positions(backbone: VisionTransformer, found: dict[str, Tensor], *, as_dino: bool) -> Iterator[str]:
    """Resamples positions of another grid to the encoder's, as timm or as DINO's authors do."""
    net = backbone.network
    theirs, ours = found.get("pos_embed"), net.pos_embed
    if theirs is None or ours is None or theirs.shape == ours.shape or theirs.shape[-1] != ours.shape[-1]:
        return
    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    side = math.isqrt(theirs.shape[1] - prefix)
    if side * side != theirs.shape[1] - prefix:
        return  # no square grid: reported as a tensor of another shape
    height, width = net.patch_embed.grid_size
    if as_dino:
        found["pos_embed"] = _resampled_as_dino(theirs, side, (height, width), prefix)
    else:
        from timm.layers.pos_embed import resample_abs_pos_embed

        found["pos_embed"] = resample_abs_pos_embed(
            theirs, new_size=[height, width], old_size=[side, side], num_prefix_tokens=prefix
        )
    yield f"Its positions were resampled from {side}×{side} patches to {height}×{width}."


def _resampled_as_dino(positions: Tensor, side: int, grid: tuple[int, int], prefix: int) -> Tensor:
    """[1, prefix + side², dim] → [1, prefix + grid, dim]. Their scale is that of a grid larger by .1 patches,
    once added against rounding errors; the tenth itself is cut off."""
    old = positions[:, prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = ((grid[0] + 0.1) / side, (grid[1] + 0.1) / side)
    new = F.interpolate(old, scale_factor=scale, mode="bicubic")
    return torch.cat([positions[:, :prefix], new.flatten(2).transpose(1, 2)], dim=1)


def _take_mask_token(
    found: dict[str, Tensor], everything: Mapping[str, Tensor], prefix: str
) -> Tensor | None:
    """The mask token, which others keep among the network's tensors and we beside the network."""
    for name in MASK_TOKENS:
        token = found.pop(name, None)
        if token is not None:
            return token
    return everything.get(prefix.removesuffix("network.") + "mask_token")


def _load_mask_token(backbone: VisionTransformer, token: Tensor | None) -> Iterator[str]:
    if backbone.mask_token is None:
        return
    if token is None or token.numel() != backbone.dim:
        yield "It brings no mask token; that starts at zero."
        return
    with torch.no_grad():
        backbone.mask_token.copy_(token.reshape(-1))
