"""Name and image size → encoder."""

from __future__ import annotations

from typing import Any, Literal

from embedserve.errors import InvalidField, closest
from training import torchvision_ops
from training.backbones import starting
from training.backbones.base import Backbone
from training.backbones.convolutional import RESNETS, Convolutional, ResNet, is_resnet, stem_for
from training.backbones.loading import load
from training.backbones.open_clip import PREFIX, OpenClipImages, file_for, kind_of_open_clip
from training.backbones.vision_transformer import (
    VisionTransformer,
    check_size,
    freeze_positions,
    freeze_projection,
)
from training.views import SMALL_IMAGE

__all__ = ["build", "default_backbone", "describe", "kind_of", "known"]

SUGGESTED = (
    "resnet18",
    "resnet50",
    "wide_resnet50_2",
    "convnext_tiny",
    "tf_efficientnet_lite0",
    "vit_tiny/4",
    "vit_tiny/8",
    "vit_small/8",
    "vit_small/16",
    "vit_base/16",
)
SHORT = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_small_12heads": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
}
"""Short names → timm's architectures, whose patch size is exchanged for the one behind the slash."""
HEADS = {"vit_small_12heads": 12}
"""Attention heads where there are not as many as in timm's: MoCo v3's small transformer has twice as many."""
TRANSFORMERS = ("vision_transformer", "deit")
"""timm's modules whose networks are its `VisionTransformer`."""


def build(  # noqa: PLR0912 -- a branch for each library, and for what each option means there
    name: str,
    size: int,
    *,
    start: str = "",
    mask_token: bool = False,
    freeze_patch_embedding: bool = False,
    sincos_positions: bool = False,
    drop_path: float = 0.0,
) -> Backbone:
    """An encoder for square images of `size` pixels a side: float32, on the CPU, in training mode.

    Args:
        name: A ResNet of torchvision's (`resnet18`) or of another width (`resnet50x2`; more are in
            `training.backbones.widened`), a vision transformer with its patch size
            (`vit_small/16`; any of timm's as `NAME/patch`), the image tower of an open_clip model
            (`open_clip:ViT-B-32`), or any other name of timm's, also as `timm:NAME`.
            "" takes the network that `start` says it is for.
        size: Pixels of a side. It decides a ResNet's stem (`stem_for`) and a transformer's positions; images
            of other sizes can be passed nevertheless.
        start: "" for random weights from torch's global generator; "imagenet" for the library's published
            weights; "starter" for the image tower of the starter bundle; "published:NAME" for a checkpoint of
            `training.published`; else a run's folder, a checkpoint, or a file of weights under torchvision's
            or timm's names; for an open_clip model also one of its tags. What was decided on the way (a stem
            kept, positions resampled, a head left out) is in the encoder's `notes`.
        mask_token: Gives a vision transformer a learned token that replaces masked patches; it starts at 0.
        freeze_patch_embedding: The patch projection is never trained (MoCo v3, section 4.2). Without `start`,
            all weights start as in that paper's code.
        sincos_positions: A vision transformer's positions are never trained, and without `start` they are
            sines and cosines (MoCo v3). Weights to start from bring their own.
        drop_path: Greatest rate of stochastic depth, in the last block (Huang et al. 2016).

    Raises:
        InvalidField: An unknown name, a size that the patches do not tile, an option that the network does
            not have, or weights that do not fit it or cannot be had.
        NotFound: `start` is neither a word above nor a path that exists.
        BadRequest: `start` is a file that cannot be read as weights.
        BundleError: The starter's weights are not installed.
    """
    if start and name.startswith(PREFIX):
        start = file_for(name, start)
    pretrained = start == starting.IMAGENET
    weights = starting.read(start) if start and not pretrained else None
    if weights is not None:
        name = weights.network_for(name)
    backbone: Backbone
    if is_resnet(name):
        _refuse_transformer_options(name, mask_token, freeze_patch_embedding, sincos_positions)
        _refuse_drop_path(name, drop_path)
        backbone = ResNet(name, stem_for(size))
        if pretrained:
            weights = starting.read_torchvision(name)
    elif name.startswith(PREFIX):
        _refuse_transformer_options(name, mask_token, freeze_patch_embedding, sincos_positions)
        _refuse_drop_path(name, drop_path)
        backbone = OpenClipImages(name, size)
    else:
        library_name, options = _find_in_timm(name)
        if drop_path:
            options["drop_path_rate"] = drop_path
        if _is_transformer(library_name):
            if freeze_patch_embedding and not start:
                options["weight_init"] = "moco"
            network = _transformer(name, library_name, size, pretrained, options)
            backbone = VisionTransformer(name, network, mask_token=mask_token)
            if freeze_patch_embedding:
                freeze_projection(backbone, restart=not start)
            if sincos_positions:
                freeze_positions(backbone, restart=not start)
        else:
            _refuse_transformer_options(name, mask_token, freeze_patch_embedding, sincos_positions)
            backbone = Convolutional(name, _create(name, library_name, size, pretrained, options), size)
        if pretrained:
            backbone.notes += (f"Starts from timm's weights of '{starting.timm_tag(library_name)}'.",)
    if weights is not None:
        load(backbone, weights)
    return backbone


def known() -> list[str]:
    """A short list of names for help texts; `build` takes many more."""
    return list(SUGGESTED)


def default_backbone(size: int, kind: Literal["conv", "vit"] = "conv", *, on_gpu: bool = False) -> str:
    """The encoder to train when none is named: small for small images and for processors.

    Patches are 4 pixels wide up to images of 40 pixels, 8 up to 112 and 16 above, where the patches tile the
    image; else the next smaller of these that does.
    """
    if kind == "conv":
        return "resnet18" if size <= SMALL_IMAGE else "resnet50"
    patch = {"small": 4, "medium": 8, "large": 16}[stem_for(size)]
    while size % patch and patch > 4:
        patch //= 2
    return f"vit_small/{patch}" if on_gpu and size > SMALL_IMAGE else f"vit_tiny/{patch}"


def kind_of(name: str, start: str = "") -> Literal["conv", "vit"]:
    """What `build(name, …, start=start)` gives. Raises as `build` does for an unknown name or start."""
    if name.startswith(PREFIX):
        return kind_of_open_clip(name)
    if start and start != starting.IMAGENET:
        name = starting.network_of(start, name)
    if name.startswith(PREFIX):  # of a run
        return kind_of_open_clip(name)
    return "conv" if is_resnet(name) or not _is_transformer(_find_in_timm(name)[0]) else "vit"


def describe(backbone: Backbone) -> dict[str, Any]:
    """What a run's records and checkpoints say of an encoder; JSON types only.

    A checkpoint that has this under "backbone" can be started from without naming the network.
    """
    described: dict[str, Any] = {
        "name": backbone.name,
        "kind": backbone.kind,
        "dim": backbone.dim,
        "patch_dim": backbone.patch_dim,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "trained_parameters": sum(p.numel() for p in backbone.parameters() if p.requires_grad),
        "notes": list(backbone.notes),
    }
    if isinstance(backbone, ResNet):
        described["stem"] = backbone.stem
    if isinstance(backbone, VisionTransformer):
        described["patch"] = backbone.patch
    return described


def _find_in_timm(name: str) -> tuple[str, dict[str, Any]]:
    """timm's name of the network, and the option that the name gives behind a slash."""
    torchvision_ops.register()
    import timm

    architecture, slash, patch = name.removeprefix("timm:").partition("/")
    library_name = SHORT.get(architecture, architecture)
    if not timm.is_model(_without_tag(library_name)):
        everything = [*RESNETS, *SUGGESTED, *timm.list_models()]
        raise InvalidField(f"Backbone '{name}' not found; {closest(name, everything)}", param="backbone")
    if not slash:
        if architecture in SHORT:
            raise InvalidField(
                f"'{name}' needs a patch size, such as '{name}/8' or '{name}/16'.", param="backbone"
            )
        return library_name, {}
    if not (patch.isdecimal() and int(patch) and _is_transformer(library_name)):
        raise InvalidField(
            f"Backbone '{name}' not found; what follows a slash is a vision transformer's patch size, as in "
            "'vit_small/16'.",
            param="backbone",
        )
    options = {"patch_size": int(patch)}
    if architecture in HEADS:
        options["num_heads"] = HEADS[architecture]
    return library_name, options


def _is_transformer(library_name: str) -> bool:
    from timm.models import is_model_in_modules

    found: bool = is_model_in_modules(_without_tag(library_name), TRANSFORMERS)
    return found


def _without_tag(library_name: str) -> str:
    """What stands behind a dot chooses among timm's weights for a network."""
    return library_name.partition(".")[0]


def _transformer(name: str, library_name: str, size: int, pretrained: bool, options: dict[str, Any]) -> Any:
    """One of timm's vision transformers with a class token that takes images of any size its patches tile."""
    options |= {"dynamic_img_size": True, "class_token": True, "global_pool": "token"}
    check_size(name, size, options.get("patch_size", 1))
    network = _create(name, library_name, size, pretrained, options)
    check_size(name, size, network.patch_embed.patch_size[0])
    return network


def _create(name: str, library_name: str, size: int, pretrained: bool, options: dict[str, Any]) -> Any:
    """timm's network without its class head."""
    import timm

    cfg = timm.get_pretrained_cfg(library_name, allow_unregistered=True)
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = size
    if pretrained:
        return starting.create_pretrained(name, library_name, options)
    try:
        return timm.create_model(library_name, num_classes=0, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InvalidField(
            f"'{name}' cannot be built for {size} pixels ({error}); choose another backbone, such as "
            f"'{default_backbone(size)}'.",
            param="backbone",
        ) from None


def _refuse_drop_path(name: str, drop_path: float) -> None:
    if drop_path:
        raise InvalidField(
            f"'{name}' has no stochastic depth; leave drop_path at 0, not {drop_path}.", param="drop_path"
        )


def _refuse_transformer_options(name: str, *wanted: bool) -> None:
    if any(wanted):
        raise InvalidField(
            f"'{name}' is not a vision transformer, so it has no mask token, patch embedding or positions; "
            "choose one, such as 'vit_small/16'.",
            param="backbone",
        )
