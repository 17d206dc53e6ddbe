"""Backbones of timm: `timm:vit_small_patch14_dinov2.lvd142m`, `timm:resnet50`.

What stands behind the dot chooses among timm's weights for an architecture; without it, timm's own choice is
taken. The data configuration that belongs to the weights becomes the bundle's preprocessing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from embedserve.bundle import Preprocessing
from embedserve.errors import EmbedServeError, InvalidField, NotFound, closest
from training import torchvision_ops
from training.backbones.vision_transformer import VisionTransformer
from training.export.hashes import sha256_of
from training.export.image_networks import BackbonePatches, MapCells, TimmPooled, attention_of
from training.export.licences import spdx
from training.export.original import Choices, Original, OriginalImages, ready

torchvision_ops.register()

import timm  # noqa: E402 -- imports torchvision
from timm.data.config import resolve_data_config  # noqa: E402
from timm.data.transforms_factory import create_transform  # noqa: E402
from timm.models.vision_transformer import VisionTransformer as TimmTransformer  # noqa: E402

__all__ = ["original"]

RESIZES: Mapping[str, Literal["shortest", "longest", "squash"]] = {
    "center": "shortest",
    "border": "longest",
    "squash": "squash",
}
"""timm's crop_mode → the bundle's `resize`."""
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")


def original(rest: str, choices: Choices) -> Original:
    """A backbone of timm without its class head.

    Args:
        rest: What follows `timm:`: an architecture, with a tag after a dot where one is wanted.
        choices: `weights` is a file under timm's names; `pooling` is for vision transformers; `size` for
            networks that can be built for another.

    Raises:
        NotFound: The architecture, the tag or the file does not exist; names the closest.
        InvalidField: The weights do not fit, or the data configuration cannot be said in a bundle.
        EmbedServeError: The weights cannot be fetched.
    """
    _check_name(rest)
    network = _network(rest, choices)
    config = _data_config(network, choices)
    preprocessing = _preprocessing(rest, config)
    pooled = _pooled(rest, network, choices.pooling)
    with torch.no_grad():
        dim = pooled(torch.zeros(1, *config["input_size"])).shape[1]
    patches, attention = _parts(rest, network, config["input_size"], by_class=_by_class(network, choices))
    published = network.pretrained_cfg
    licence = published.get("license") or ""
    return Original(
        name=f"{rest}-random" if choices.random else rest,
        dim=dim,
        images=OriginalImages(
            network=pooled,
            preprocessing=preprocessing,
            mean=config["mean"],
            std=config["std"],
            reference=create_transform(**config, is_training=False),
            patches=patches,
            attention=attention,
        ),
        licence=_licence(rest, licence, choices),
        source=_origin(rest, published, choices),
    )


def _check_name(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise NotFound(
            f"timm has no architecture '{architecture}'; {closest(architecture, timm.list_models())}",
            param="source",
        )
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise NotFound(
            f"timm has no weights '{tag}' of '{architecture}'; {closest(tag, tags)}", param="source"
        )


def _network(name: str, choices: Choices) -> Any:
    options: dict[str, Any] = {"num_classes": 0}
    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if choices.size is not None and published is not None and published.fixed_input_size:
        options["img_size"] = choices.size
    if _is_transformer(name):
        options["dynamic_img_size"] = True  # keeps the grid, which patches and attention need
    if choices.random:
        return ready(_build(name, options))
    if choices.weights is not None:
        return ready(_from_file(name, choices.weights, options))
    if published is None or not published.has_weights:
        raise InvalidField(
            f"timm publishes no weights of '{name}'. Give a file with --weights, or --random; those with "
            f"weights: {', '.join(timm.list_pretrained()[:3])}, …",
            param="source",
        )
    try:
        network = timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise EmbedServeError(
            f"The weights of 'timm:{name}' could not be fetched ({_short(error)}). Connect to the network "
            f"once (they are kept in the cache), or copy the file and give it with --weights; it is "
            f"{published.hf_hub_id or published.url}.",
            code="weights_unavailable",
        ) from error
    return ready(network)


def _build(name: str, options: Mapping[str, Any], **pretrained: Any) -> nn.Module:
    try:
        network: nn.Module = timm.create_model(name, **options, **pretrained)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InvalidField(
            f"'timm:{name}' cannot be built so ({_short(error)}); leave --size and --weights out, or choose "
            "others.",
            param="source",
        ) from error
    return network


def _from_file(name: str, path: Path, options: Mapping[str, Any]) -> nn.Module:
    """timm drops what it does not know and leaves random what it does not find, so it is asked twice."""
    if not path.is_file():
        raise NotFound(f"There is no file '{path}'.", param="weights")
    overlay = {"file": str(path), "custom_load": path.suffix == ".npz"}
    loaded = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            loaded.append(_build(name, options, pretrained=True, pretrained_cfg_overlay=overlay))
    other = loaded[1].state_dict()
    random = [key for key, value in loaded[0].state_dict().items() if not torch.equal(value, other[key])]
    if random:
        raise InvalidField(
            f"'{path}' lacks {len(random)} tensors of '{name}' ({', '.join(random[:3])}"
            f"{', …' if len(random) > 3 else ''}); give weights of that architecture, under timm's names.",
            param="weights",
        )
    return loaded[0]


def _data_config(network: Any, choices: Choices) -> dict[str, Any]:
    resolve: Any = resolve_data_config
    chosen = {} if choices.size is None else {"input_size": (3, choices.size, choices.size)}
    return dict(resolve(chosen, pretrained_cfg=network.pretrained_cfg))


def _preprocessing(name: str, config: Mapping[str, Any]) -> Preprocessing:
    channels, height, width = config["input_size"]
    if channels != 3:
        raise InvalidField(
            f"'timm:{name}' takes {channels} channels; a bundle's images are RGB.", param="source"
        )
    if config["interpolation"] not in INTERPOLATIONS:
        raise InvalidField(
            f"'timm:{name}' resizes by '{config['interpolation']}'; a bundle can say "
            f"{', '.join(INTERPOLATIONS)}.",
            param="source",
        )
    return Preprocessing(
        height=height,
        width=width,
        resize=RESIZES[config["crop_mode"]],
        resize_to=math.floor(min(height, width) / config["crop_pct"]),
        interpolation=config["interpolation"],
        background=_background(config),
    )


def _background(config: Mapping[str, Any]) -> tuple[int, int, int]:
    if config["crop_mode"] != "border":
        return (255, 255, 255)
    red, green, blue = (round(255 * value) for value in config["mean"])
    return red, green, blue


def _pooled(name: str, network: nn.Module, pooling: Literal["auto", "class", "mean"]) -> nn.Module:
    if pooling == "auto":
        return network
    if not isinstance(network, TimmTransformer):
        raise InvalidField(
            f"'timm:{name}' is no vision transformer; leave pooling at 'auto', not '{pooling}'.",
            param="pooling",
        )
    if pooling == "class" and not network.has_class_token:
        raise InvalidField(f"'timm:{name}' has no class token; choose pooling 'mean'.", param="pooling")
    return TimmPooled(network, pooling)


def _by_class(network: Any, choices: Choices) -> bool:
    """Whether the vector is that of the class token."""
    return choices.pooling == "class" or (
        choices.pooling == "auto" and getattr(network, "global_pool", "") == "token"
    )


def _parts(
    name: str, network: Any, input_size: tuple[int, ...], *, by_class: bool
) -> tuple[nn.Module | None, nn.Module | None]:
    """Patches and attention; None for what the network does not have."""
    if isinstance(network, TimmTransformer):
        backbone = VisionTransformer(name, network)
        attention = attention_of(backbone, *input_size[1:]) if by_class else None
        return BackbonePatches(backbone), attention
    with torch.no_grad():
        features = network.forward_features(torch.zeros(1, *input_size))
    is_map = isinstance(features, Tensor) and features.dim() == 4
    if is_map and getattr(network, "output_fmt", "NCHW") == "NCHW":
        return MapCells(network), None
    return None, None


def _is_transformer(name: str) -> bool:
    from timm.models import is_model_in_modules

    return bool(is_model_in_modules(name.partition(".")[0], ("vision_transformer", "deit")))


def _licence(name: str, stated: str, choices: Choices) -> str:
    if choices.random:
        return "Apache-2.0"  # timm's own: there is nothing but its architecture
    if choices.weights is not None:
        return f"unknown: ask who made {choices.weights.name}"
    return spdx(stated) if stated else f"unknown: see https://huggingface.co/timm/{name}"


def _origin(name: str, published: Mapping[str, Any], choices: Choices) -> str:
    library = f"timm {timm.__version__}"
    if choices.random:
        return f"{library}: {name}, random weights"
    if choices.weights is not None:
        return f"{library}: {name}, weights from {choices.weights.name} (sha256 {sha256_of(choices.weights)})"
    architecture = name.partition(".")[0]
    tag = published.get("tag") or ""
    where = published.get("hf_hub_id") or published.get("url") or ""
    return f"{library}: {architecture}{'.' if tag else ''}{tag} ({where})"


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
