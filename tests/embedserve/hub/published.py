"""What the tests' hub holds: names of repositories, and how each is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from tests.embedserve.hub import immich_networks, networks
from tests.embedserve.hub.networks import Network

CLIP, MASKED_CLIP = "Xenova/tiny-clip", "Xenova/tiny-clip-masked"
SIGLIP, DINOV2 = "Xenova/tiny-siglip", "onnx-community/tiny-dinov2"
IMMICH, OLD_IMMICH, IMMICH_SIGLIP = (
    "immich-app/tiny__new",
    "immich-app/tiny__old",
    "immich-app/tiny-SigLIP__webli",
)
QDRANT, QDRANT_TEXT = "Qdrant/tiny-clip-vision", "Qdrant/tiny-clip-text"
LARGE = "Xenova/tiny-clip-large"

MAKERS: Mapping[str, Callable[[Path], Network]] = {
    CLIP: networks.transformers_js_clip,
    MASKED_CLIP: lambda folder: networks.transformers_js_clip(folder, masks=True),
    SIGLIP: networks.transformers_js_siglip,
    DINOV2: networks.dinov2,
    IMMICH: lambda folder: immich_networks.clip(folder, old=False),
    OLD_IMMICH: lambda folder: immich_networks.clip(folder, old=True),
    IMMICH_SIGLIP: immich_networks.siglip,
    QDRANT: lambda folder: networks.qdrant_clip(folder, folder.with_name("tiny-clip-text")),
}
