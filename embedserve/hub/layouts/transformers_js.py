"""CLIP and SigLIP as they are exported for transformers.js (Xenova, onnx-community).

    onnx/vision_model{,_fp16,_quantized,…}.onnx   pixel_values [batch, 3, height, width] → image_embeds
    onnx/text_model{,_fp16,_quantized,…}.onnx     input_ids [batch, length] → text_embeds
    preprocessor_config.json, tokenizer.json, tokenizer_config.json, config.json

SigLIP's vectors are called pooler_output. Its texts are always padded to the context, as it was trained, and
its tokenizer makes no mask. Neither kind comes with the trained logit scale: `logit_scale_init_value` in
config.json is where training began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from embedserve.hub.fetching import Repository
from embedserve.hub.foreign import Foreign, ForeignImages, ForeignTexts, Output
from embedserve.hub.pixels import from_huggingface
from embedserve.hub.tokens import context_length, open_tokenizer, optional_json, pad_id, tokenize_as
from embedserve.hub.variants import graph_file

__all__ = ["LOOKS_FOR", "matches", "read"]

VISION, TEXT = "onnx/vision_model", "onnx/text_model"
LOOKS_FOR = f"{VISION}*.onnx with preprocessor_config.json, {TEXT}*.onnx with tokenizer.json, or both"


@dataclass(frozen=True, slots=True)
class _Family:
    activation: Literal["softmax", "sigmoid"]
    padding: Literal["longest", "context"]
    context: int
    image_output: Output
    text_output: Output


CLIP = _Family("softmax", "longest", 77, Output(names=("image_embeds",)), Output(names=("text_embeds",)))
SIGLIP = _Family(
    "sigmoid",
    "context",
    64,
    Output(names=("pooler_output", "image_embeds")),
    Output(names=("pooler_output", "text_embeds")),
)
FAMILIES: Mapping[str, _Family] = {"siglip": SIGLIP, "siglip2": SIGLIP}
"""`model_type` of config.json → how it was trained; whatever is not named is taken for a CLIP."""


def matches(files: frozenset[str]) -> bool:
    return any(file.startswith((VISION, TEXT)) and file.endswith(".onnx") for file in files)


def read(repository: Repository, variant: str) -> Foreign:
    config = optional_json(repository, "config.json")
    family = FAMILIES.get(str(config.get("model_type")), CLIP)
    has = {stem: any(file.startswith(stem) for file in repository.files) for stem in (VISION, TEXT)}
    return Foreign(
        images=_images(repository, variant, family) if has[VISION] else None,
        texts=_texts(repository, variant, family, config.get("text_config") or {}) if has[TEXT] else None,
        activation=family.activation,
    )


def _images(repository: Repository, variant: str, family: _Family) -> ForeignImages:
    file = graph_file(repository, VISION, variant)
    name = "preprocessor_config.json"
    return ForeignImages(
        graph=repository.path(file),
        label=file,
        output=family.image_output,
        rules=from_huggingface(repository.json(name), f"{repository.name}/{name}"),
    )


def _texts(repository: Repository, variant: str, family: _Family, config: Mapping[str, Any]) -> ForeignTexts:
    file = graph_file(repository, TEXT, variant)
    path = repository.path("tokenizer.json")
    context = context_length(repository, config, family.context)
    gives = optional_json(repository, "tokenizer_config.json").get("model_input_names", ["attention_mask"])
    return ForeignTexts(
        graph=repository.path(file),
        label=file,
        output=family.text_output,
        tokenizer=path.read_text(encoding="utf-8"),
        their_tokens=tokenize_as(path, context),
        context_length=context,
        pad_id=pad_id(repository, open_tokenizer(path), config=config.get("pad_token_id")),
        padding=family.padding,
        masked=family.padding == "longest" and "attention_mask" in gives,
    )
