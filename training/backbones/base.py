"""What a method, the loop and an evaluation may ask of an encoder."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField

__all__ = ["Backbone"]


class Backbone(nn.Module):
    """A network without a class head. Images are float [B, 3, H, W], normalised with ImageNet's mean and std.

    The library's network is the attribute `network`, so its weights keep the library's names behind the
    prefix "network.". Copies made by `copy.deepcopy` (momentum encoders) are independent.
    """

    kind: ClassVar[Literal["conv", "vit"]]

    name: str
    """What `build` was asked for; building it again gives the same network."""
    dim: int
    """Length of the pooled feature vector."""
    patch_dim: int
    """Channels of the patch map."""
    notes: tuple[str, ...]
    """Sentences a person should read before training: which stem was kept, what was resampled, …"""
    network: Any

    def __init__(self, name: str, network: nn.Module, dim: int, patch_dim: int) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.dim = dim
        self.patch_dim = patch_dim
        self.notes = ()

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] → pooled features [B, dim]."""
        return self.features(images)[0]

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `torch.nn.Module.compile`, for `features` and with it `forward`."""
        self.features = torch.compile(self.features, *args, **kwargs)  # type: ignore[method-assign]

    def features(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Pooled features [B, dim] and the patch map [B, patch_dim, h, w] of one forward pass.

        Args:
            images: float [B, 3, H, W].
            masks: bool [B, h·w], rows of patches from the top left. Where True, the patch's embedding is
                replaced by a learned token before positions are added (BEiT's blockwise masking as iBOT and
                DINOv2 use it). Only for vision transformers built with `mask_token=True`.

        Raises:
            InvalidField: Masks that this encoder cannot apply, or an image its patches do not tile.
        """
        raise NotImplementedError

    def attention(self, images: Tensor) -> Tensor:
        """Attention of the class token to the patches in the last block, [B, heads, h, w], float32.

        A row sums to 1 together with what the class token (and registers) keep for themselves.

        Raises:
            InvalidField: The encoder is convolutional.
        """
        raise InvalidField(
            f"'{self.name}' is convolutional and has no attention; choose a vision transformer, such as "
            "'vit_small/16'.",
            param="backbone",
        )
