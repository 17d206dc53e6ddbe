"""Image towers of open_clip's models: pooled features are vectors of the space that they share with texts."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training.augment import IMAGENET_MEAN, IMAGENET_STD
from training.backbones.base import Backbone
from training.open_clip_models import PREFIX, create, file_of, library

__all__ = ["PREFIX", "OpenClipImages", "file_for", "fit_positions", "kind_of_open_clip", "size_of"]


class OpenClipImages(Backbone):
    """`visual` of an open_clip model, with its projection.

    Args:
        name: 'open_clip:' and the architecture.
        size: Pixels of a side.
        model: The whole model, where it is there already; else one with random weights is made.
    """

    def __init__(self, name: str, size: int, model: nn.Module | None = None) -> None:
        architecture = name.removeprefix(PREFIX)
        whole: Any = model or create(architecture, force_image_size=size)
        config = library().get_model_config(architecture)
        visual = whole.visual
        self._tokens = _gives_tokens(visual)
        dim = int(config["embed_dim"])
        super().__init__(name, visual, dim, int(visual.ln_post.normalized_shape[0]) if self._tokens else dim)
        self.kind = kind_of_open_clip(name)  # type: ignore[misc]
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        theirs = {key: torch.tensor(visual.preprocess_cfg[key]) for key in ("mean", "std")}
        # Images come normalised by ImageNet's mean and std; these weights know others.
        self.factor = nn.Buffer((std / theirs["std"])[:, None, None], persistent=False)
        self.shift = nn.Buffer(((mean - theirs["mean"]) / theirs["std"])[:, None, None], persistent=False)

    def features(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if masks is not None:
            raise InvalidField(f"'{self.name}' cannot mask patches; choose 'vit_small/16'.", param="backbone")
        visual, images = self.network, torch.addcmul(self.shift, images, self.factor)
        if not self._tokens:
            found = visual(images)
            pooled: Tensor = found[0] if isinstance(found, tuple) else found
            return pooled, pooled[:, :, None, None]
        pooled, tokens = visual._pool(visual.transformer(visual._embeds(images)))
        if visual.proj is not None:
            pooled = pooled @ visual.proj
        height, width = visual.grid_size
        return pooled, tokens.transpose(1, 2).reshape(len(images), -1, height, width)

    def attention(self, images: Tensor) -> Tensor:
        from training.export.image_networks import open_clip_parts

        attention = open_clip_parts(self.network)[1]
        if attention is None:
            return super().attention(images)
        weights: Tensor = attention(torch.addcmul(self.shift, images, self.factor))
        height, width = self.network.grid_size
        return weights.float().reshape(len(images), -1, height, width)


def _gives_tokens(visual: Any) -> bool:
    from open_clip.transformer import VisionTransformer

    return isinstance(visual, VisionTransformer) and visual.attn_pool is None and visual.pool_type != "none"


def kind_of_open_clip(name: str) -> Literal["conv", "vit"]:
    """Whether the image tower is open_clip's own vision transformer, whose parts are known."""
    config = _vision(name)
    return "conv" if "timm_model_name" in config or isinstance(config.get("layers"), list) else "vit"


def size_of(name: str) -> int:
    """Pixels of a side that the architecture is meant for."""
    size = _vision(name).get("image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def file_for(name: str, start: str) -> str:
    """Where the weights lie that `start` means: a path as it is, a tag of open_clip's fetched."""
    return str(file_of(start, name.removeprefix(PREFIX)))


def fit_positions(backbone: OpenClipImages, found: dict[str, Tensor]) -> str:
    """Resamples positions of another grid in place, as open_clip does; says so, or ""."""
    ours, theirs = getattr(backbone.network, "positional_embedding", None), found.get("positional_embedding")
    if ours is None or theirs is None or ours.shape == theirs.shape or ours.shape[-1] != theirs.shape[-1]:
        return ""
    from timm.layers.pos_embed import resample_abs_pos_embed

    height, width = backbone.network.grid_size
    found["positional_embedding"] = resample_abs_pos_embed(
        theirs[None], new_size=[height, width], num_prefix_tokens=1
    )[0]
    return f"Its positions were resampled from {len(theirs) - 1} patches to {height}×{width}."


def _vision(name: str) -> dict[str, Any]:
    open_clip = library()
    config = open_clip.get_model_config(name.removeprefix(PREFIX))
    if config is None:
        create(name.removeprefix(PREFIX))  # says which there are
    return dict(config["vision_cfg"])
