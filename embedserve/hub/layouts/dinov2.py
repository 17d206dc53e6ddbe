"""Vision transformers without text, as they are exported for transformers.js (onnx-community/dinov2-*).

    onnx/model{,_fp16,_quantized,…}.onnx   pixel_values → last_hidden_state [batch, 1 + patches, dim]
    preprocessor_config.json, config.json

The vector is the class token after the last norm, the first of `last_hidden_state`.
"""

from __future__ import annotations

from embedserve.errors import BundleError, closest
from embedserve.hub.fetching import Repository
from embedserve.hub.foreign import Foreign, ForeignImages, Output
from embedserve.hub.pixels import from_huggingface
from embedserve.hub.variants import graph_file

__all__ = ["LOOKS_FOR", "matches", "read"]

STEM = "onnx/model"
LOOKS_FOR = f"{STEM}*.onnx with preprocessor_config.json and config.json, and no tokenizer.json"

TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "vit_msn")
"""`model_type`s whose first token was trained to stand for the image."""


def matches(files: frozenset[str]) -> bool:
    has_graph = any(file.startswith(STEM) and file.endswith(".onnx") for file in files)
    return (
        has_graph and {"preprocessor_config.json", "config.json"} <= files and "tokenizer.json" not in files
    )


def read(repository: Repository, variant: str) -> Foreign:
    kind = str(repository.json("config.json").get("model_type"))
    if kind not in TYPES:
        raise BundleError(
            f"{repository.at} is of the type '{kind}', of which it is not known which output describes the "
            f"image; {closest(kind, TYPES)}"
        )
    file = graph_file(repository, STEM, variant)
    name = "preprocessor_config.json"
    return Foreign(
        images=ForeignImages(
            graph=repository.path(file),
            label=file,
            output=Output(names=("last_hidden_state",), class_token=True),
            rules=from_huggingface(repository.json(name), f"{repository.name}/{name}"),
        )
    )
