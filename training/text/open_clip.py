"""Text towers of open_clip's models, and CLIP's transformer in sizes of one's own."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Literal

from embedserve.errors import EmbedServeError, InvalidField
from training.export.text_networks import EndTokenText, open_clip_text
from training.export.tokenizers import from_open_clip
from training.open_clip_models import PREFIX, create, library, load, one_line
from training.text.base import TextTower
from training.text.rules import TextRules

__all__ = ["PREFIX", "SIZED", "sized", "text_of", "text_tower"]

SIZED = re.compile(r"transformer/(\d+)x(\d+)")


def text_of(model: Any, architecture: str, *, trained: bool, rules: TextRules | None = None) -> TextTower:
    """The text side of one of open_clip's models, with its projection.

    Args:
        model: From `create`.
        architecture: open_clip's name.
        trained: Whether its weights are.
        rules: The tokenizer, where a checkpoint has brought it.
    """
    network, padding = open_clip_text(model)
    rules = rules or _rules(architecture, int(model.vocab_size), padding)
    dim = int(library().get_model_config(architecture)["embed_dim"])
    return TextTower(PREFIX + architecture, network, dim, rules, trained=trained, config={})


def _rules(architecture: str, vocabulary: int, padding: Literal["longest", "context"]) -> TextRules:
    try:
        tokens = from_open_clip(library().get_tokenizer(architecture))
    except (OSError, RuntimeError) as error:
        raise EmbedServeError(
            f"open_clip could not get the tokenizer of '{architecture}' ({one_line(error)}). Fetch it once "
            "on a machine with a network (its cache is HF_HOME), or choose an architecture with CLIP's own "
            "tokenizer, such as 'ViT-B-32'.",
            code="not_fetched",
        ) from error
    return TextRules(
        name=PREFIX + architecture,
        tokenizer=tokens.tokenizer,
        context_length=tokens.context_length,
        pad_id=tokens.pad_id,
        vocabulary=vocabulary,
        padding=padding,
        cleaning=tokens.cleaning,
    )


def text_tower(architecture: str, start: str = "", rules: TextRules | None = None) -> TextTower:
    """The text side alone, from a checkpoint of the whole model where `start` names one."""
    model = create(architecture, param="text")
    if start:
        load(model, start, architecture, param="text_start")
    return text_of(model, architecture, trained=bool(start), rules=rules)


def sized(layers: int, width: int, rules: TextRules | None = None) -> TextTower:
    """CLIP's text transformer (Radford et al. 2021, section 2.4) with random weights, in any size.

    Args:
        layers: At least 1.
        width: A multiple of 16; heads are 64 wide, or half the width where that is less.
        rules: CLIP's tokenizer, where a checkpoint has brought it.
    """
    if layers < 1 or width < 16 or width % 16:
        raise InvalidField(
            f"text=transformer/{layers}x{width}: give 1 layer or more, and a width that is a multiple of 16, "
            "such as transformer/4x256.",
            param="text",
        )
    open_clip = library()
    heads = max(width // 64, 2)
    while width % heads:
        heads -= 1
    network = open_clip.transformer.TextTransformer(
        layers=layers, width=width, heads=heads, output_dim=width, pool_type="argmax"
    )
    name = f"transformer/{layers}x{width}"
    rules = rules or replace(_rules("ViT-B-32", int(network.vocab_size), "longest"), name=name)
    return TextTower(name, EndTokenText(network, "argmax", 0), width, rules, trained=False, config={})
