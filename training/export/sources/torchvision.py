"""Classifiers of torchvision without their classes: `torchvision:resnet50/IMAGENET1K_V2`.

Behind the slash stands one of the weights that torchvision lists for the architecture; without it its default
is taken. The transforms that belong to the weights become the bundle's preprocessing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from embedserve.bundle import Preprocessing
from embedserve.errors import EmbedServeError, InvalidField, NotFound, closest
from training import torchvision_ops
from training.backbones.files import contents, flat
from training.backbones.loading import check_fit
from training.export.hashes import sha256_of
from training.export.original import Choices, Original, OriginalImages, ready

torchvision_ops.register()

import torchvision  # noqa: E402
from torchvision import models  # noqa: E402
from torchvision.transforms._presets import ImageClassification  # noqa: E402

__all__ = ["original"]

RGB = tuple[float, float, float]
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Heads that help training only."""


def original(rest: str, choices: Choices) -> Original:
    """What a classifier of torchvision computes in front of its last layer.

    Args:
        rest: What follows `torchvision:`; see the module.
        choices: `weights` is a state dict under torchvision's names, with or without the last layer; the
            name behind the slash, or the default, then gives the transforms alone.

    Raises:
        NotFound: The architecture, the weights or the file does not exist; names the closest.
        InvalidField: The weights do not fit, or there is no vector in front of the classes.
        BadRequest: The file is damaged, or could run code.
        EmbedServeError: The weights cannot be fetched.
    """
    if choices.pooling != "auto":
        raise InvalidField(
            f"torchvision's networks pool as they were trained; leave pooling at 'auto', not "
            f"'{choices.pooling}'.",
            param="pooling",
        )
    name, _, tag = rest.partition("/")
    listed = _listed(name, tag)
    transforms = _transforms(rest, listed)
    preprocessing = _preprocessing(transforms, choices.size)
    network = ready(_network(name, listed, choices))
    with torch.no_grad():
        features = network(torch.zeros(1, 3, preprocessing.height, preprocessing.width))
    label = "random" if choices.random else choices.weights.stem if choices.weights else listed.name
    return Original(
        name=f"{name}-{label}"[:128],
        dim=features.shape[1],
        images=OriginalImages(
            network=network,
            preprocessing=preprocessing,
            mean=cast(RGB, tuple(transforms.mean)),
            std=cast(RGB, tuple(transforms.std)),
            reference=_Transforms(transforms, preprocessing),
        ),
        licence=_licence(listed, choices),
        source=_origin(name, listed, choices),
        notes=(f"{listed.meta['recipe']}",) if listed.meta.get("recipe") and not choices.weights else (),
    )


class _Transforms:
    """torchvision's own transforms, for the size that was chosen."""

    def __init__(self, transforms: ImageClassification, spec: Preprocessing) -> None:
        self.transforms = ImageClassification(
            crop_size=spec.height,
            resize_size=spec.resize_to,
            mean=tuple(transforms.mean),
            std=tuple(transforms.std),
            interpolation=transforms.interpolation,
            antialias=transforms.antialias,
        )

    def __call__(self, image: Any) -> Tensor:
        seen: Tensor = self.transforms(image)
        return seen


def _listed(name: str, tag: str) -> Any:
    """The entry of torchvision's table of weights."""
    known = models.list_models(module=models)
    if name not in known:
        raise NotFound(f"torchvision has no classifier '{name}'; {closest(name, known)}", param="source")
    table = models.get_model_weights(name)
    if not tag:
        return table.DEFAULT
    if tag not in table.__members__:
        raise NotFound(
            f"torchvision has no weights '{tag}' of '{name}'; {closest(tag, table.__members__)}",
            param="source",
        )
    return table[tag]


def _transforms(rest: str, listed: Any) -> ImageClassification:
    transforms = listed.transforms()
    if not isinstance(transforms, ImageClassification):
        raise InvalidField(
            f"'torchvision:{rest}' prepares its input by {type(transforms).__name__}, which a bundle cannot "
            "say; choose a classifier of images.",
            param="source",
        )
    return transforms


def _preprocessing(transforms: ImageClassification, size: int | None) -> Preprocessing:
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    side = size or crop
    return Preprocessing(
        height=side,
        width=side,
        resize_to=round(resize * side / crop),
        interpolation=transforms.interpolation.value,
    )


def _network(name: str, listed: Any, choices: Choices) -> nn.Module:
    options: dict[str, Any] = {}
    if name.startswith("vit_") and choices.size is not None:
        options["image_size"] = choices.size
    if name in {"googlenet", "inception_v3"}:
        options |= {"aux_logits": False, "init_weights": True}
    try:
        network: nn.Module = models.get_model(name, weights=None, **options)
    except ValueError as error:
        raise InvalidField(f"'torchvision:{name}' cannot be built so ({error}).", param="size") from error
    head = _cut_head(name, network)
    if not choices.random:
        origin = f"'{choices.weights or listed}'"
        _load(network, _tensors(name, listed, choices), head, name, origin)
    return network


def _cut_head(name: str, network: nn.Module) -> str:
    """Exchanges the layer that gives the classes for one that does nothing; returns its name."""
    layers = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
    last = layers[-1] if layers else ""
    if not last or cast(nn.Linear, network.get_submodule(last)).out_features != 1000:
        raise InvalidField(
            f"'torchvision:{name}' has no vector in front of its classes; choose one such as 'resnet50'.",
            param="source",
        )
    network.set_submodule(last, nn.Identity())
    return last


def _tensors(name: str, listed: Any, choices: Choices) -> dict[str, Tensor]:
    if choices.weights is not None:
        if not choices.weights.is_file():
            raise NotFound(f"There is no file '{choices.weights}'.", param="weights")
        return dict(flat(contents(choices.weights)))
    try:
        return dict(listed.get_state_dict(progress=False, check_hash=True))
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise EmbedServeError(
            f"The weights of 'torchvision:{name}/{listed.name}' could not be fetched ({error}). Download "
            f"{listed.url} where there is a network and give the file with --weights, or put it into "
            f"'{folder}'.",
            code="weights_unavailable",
        ) from error


def _load(network: nn.Module, tensors: dict[str, Tensor], head: str, name: str, origin: str) -> None:
    expected = network.state_dict()
    found = {
        key.removeprefix("module.").removeprefix("model."): value
        for key, value in tensors.items()  # of a training loop's file as well
    }
    found = {key: value for key, value in found.items() if not key.startswith((f"{head}.", *AUXILIARY))}
    # Files from before torch 0.4.1 do not count batches; the count plays no part in the result.
    found |= {key: expected[key] for key in expected if key.endswith("num_batches_tracked")}
    check_fit(name, origin, expected, found)
    network.load_state_dict(found)


def _licence(listed: Any, choices: Choices) -> str:
    if choices.weights is not None:
        return f"unknown: ask who made {choices.weights.name}"
    if "SWAG" in listed.name and not choices.random:
        return "CC-BY-NC-4.0"
    return "BSD-3-Clause"


def _origin(name: str, listed: Any, choices: Choices) -> str:
    library = f"torchvision {torchvision.__version__}"
    if choices.random:
        return f"{library}: {name}, random weights"
    if choices.weights is not None:
        return f"{library}: {name}, weights from {choices.weights.name} (sha256 {sha256_of(choices.weights)})"
    return f"{library}: {listed} ({listed.url.rpartition('/')[2]})"
