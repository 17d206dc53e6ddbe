"""Weights to start from: where they lie, and which network they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from embedserve.errors import BadRequest, InvalidField, NotFound
from training import torchvision_ops
from training.backbones.convolutional import Stem
from training.backbones.files import contents, flat
from training.tuning import merged

__all__ = [
    "IMAGENET",
    "STARTER",
    "Weights",
    "create_pretrained",
    "network_of",
    "read",
    "read_torchvision",
    "timm_tag",
]

IMAGENET, STARTER, PUBLISHED = "imagenet", "starter", "published:"
STARTER_NETWORK = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Weights:
    """Tensors by name, flat: those of nested dictionaries have both names, joined by a dot."""

    tensors: Mapping[str, Tensor]
    origin: str
    """Where they are from, for people."""
    network: str = ""
    """The name of the network they are for, where that is known."""
    stem: Stem | None = None
    prefix: str | None = None
    """What comes before the network's own names, where that is known."""
    positions: Literal["", "dino"] = ""
    """How positions of another grid are resampled. "": as timm does, bicubic with a low-pass filter. "dino":
    as DINO's and DINOv2's code does, without one and to a tenth of a patch more than the grid."""
    notes: tuple[str, ...] = ()
    """What else a person should read."""

    def network_for(self, name: str) -> str:
        """The network to build when `name`, or nothing, was asked for.

        Raises:
            InvalidField: The weights are for another network, or none was named and they do not say.
        """
        if not (name or self.network):
            raise InvalidField(
                f"{self.origin} does not say which network it is for; name one, such as 'resnet18'.",
                param="backbone",
            )
        if name and self.network and name.removeprefix("timm:") != self.network.removeprefix("timm:"):
            raise InvalidField(
                f"{self.origin} holds the weights of '{self.network}', not of '{name}'; choose the backbone "
                f"'{self.network}', or other weights.",
                param="start",
            )
        return name or self.network


def read(start: str) -> Weights:
    """The weights that `start` means: "starter", a run's folder, a checkpoint, a file of weights, or
    "published:NAME" for one of `training.published` ("published:NAME@FILE" for a local copy).

    Raises:
        NotFound: It is no path that exists.
        InvalidField: A folder without weights, a bundle other than the starter, or an unknown NAME.
        BadRequest: A file that does not hold tensors, or that holds other things as well.
        BundleError: The starter's weights are not installed.
    """
    if start == STARTER:
        return _starter()
    if start.startswith(PUBLISHED):
        from training.published import for_training

        return for_training(start.removeprefix(PUBLISHED))
    path = Path(start).expanduser()
    if path.is_dir():
        if (path / "encoder.json").is_file():
            return _bundle(path)
        path = _checkpoint_of(path)
    elif not path.exists():
        raise NotFound(
            f"Weights '{start}' not found; give 'imagenet', 'starter', the folder of a run, a file of "
            "weights, or 'published:' with a name of docs/published.md.",
            param="start",
        )
    return _file(path)


def network_of(start: str, name: str) -> str:
    """The network that `start` is for when `name`, or nothing, was asked for. Raises as `read` does."""
    if start.startswith(PUBLISHED):  # known without the file
        from training.published import find

        return name or find(start.removeprefix(PUBLISHED).partition("@")[0]).network
    return read(start).network_for(name)


def read_torchvision(name: str) -> Weights:
    """torchvision's ImageNet weights, from its cache or downloaded.

    Raises:
        InvalidField: They cannot be downloaded.
    """
    torchvision_ops.register()
    from torchvision import models

    chosen = models.get_model_weights(name).DEFAULT
    try:
        tensors = chosen.get_state_dict(progress=False, check_hash=True)
    except OSError as error:
        raise _unavailable(name, error) from None
    return Weights(tensors, f"torchvision's {chosen}", name, "large", "")


def create_pretrained(name: str, library_name: str, options: dict[str, Any]) -> Any:
    """timm's network with its published weights, from its cache or downloaded.

    timm itself resamples patches and positions to the sizes that `options` ask for.

    Raises:
        InvalidField: They cannot be downloaded, do not fit, or timm has none.
    """
    import timm

    try:
        return timm.create_model(library_name, pretrained=True, num_classes=0, **options)
    except Exception as error:  # noqa: BLE001 -- what the hub's client raises changes with its version
        raise _unavailable(name, error) from None


def timm_tag(library_name: str) -> str:
    """timm's full name of the weights that `create_pretrained` takes, such as "resnet18.a1_in1k"."""
    import timm

    cfg = timm.get_pretrained_cfg(library_name, allow_unregistered=True)
    architecture = library_name.partition(".")[0]
    return f"{architecture}.{cfg.tag}" if cfg is not None and cfg.tag else architecture


def _unavailable(name: str, error: Exception) -> InvalidField:
    """The error for published weights that cannot be had."""
    return InvalidField(
        f"The library's weights of '{name}' could not be loaded ({error}). Connect to the network, or start "
        "from a file of weights, or from 'starter', which needs no network.",
        param="start",
    )


def _starter() -> Weights:
    from training.starter import sources

    tensors = sources.classifier().state_dict()
    return Weights(tensors, "the starter's image tower (ImageNet)", STARTER_NETWORK, None, "")


def _bundle(folder: Path) -> Weights:
    try:
        name = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))["name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = ""
    if name == STARTER:
        return _starter()
    raise InvalidField(
        f"'{folder}' is an encoder bundle: its network is an ONNX graph, which cannot be trained further. "
        "Start from the folder of the run that it was exported from.",
        param="start",
    )


def checkpoint_of(start: str) -> Path | None:
    """The checkpoint of a run that `start` names, by its folder or itself; None for other weights."""
    path = Path(start).expanduser()
    if path.is_dir() and (path / "checkpoints").is_dir():
        path = _checkpoint_of(path)
    if not path.is_file():
        return None
    content = contents(path)
    return path if isinstance(content, dict) and {"encoder_prefix", "model"} <= content.keys() else None


def _checkpoint_of(folder: Path) -> Path:
    for name in ("best.pt", "last.pt"):
        path = folder / "checkpoints" / name
        if path.is_file():
            return path
    raise InvalidField(
        f"'{folder}' holds neither checkpoints/best.pt nor checkpoints/last.pt; give the folder of a run "
        "that has written a checkpoint, or a file of weights.",
        param="start",
    )


def _file(path: Path) -> Weights:
    content = contents(path)
    tensors = dict(flat(content))
    if not tensors:
        raise BadRequest(
            f"'{path}' holds no tensors; give a state dict saved with torch.save.", param="start"
        )
    origin = f"'{path}'"
    if not (isinstance(content, dict) and {"encoder_prefix", "model"} <= content.keys()):
        from training.published import from_foreign

        return from_foreign(tensors, origin) or Weights(tensors, origin)
    described = content.get("backbone", {})
    prefix = f"model.{content['encoder_prefix']}network."
    return Weights(merged(tensors), origin, described.get("name", ""), described.get("stem"), prefix)
