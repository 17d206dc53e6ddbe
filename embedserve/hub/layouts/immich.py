"""open_clip models as Immich exports them.

    config.json                  open_clip's model configuration
    visual/model.onnx            image → embedding; preprocess_cfg.json beside it
    textual/model.onnx           text → embedding; tokenizer.json and tokenizer_config.json beside it

Older exports take float32 [1, 3, size, size] and int32 [1, context], newer ones uint8 [batch, size, size, 3]
and int32 [batch, context]. Their code collapses white space before tokenizing, and for models that ask for
`clean: canonicalize` (SigLIP) drops ASCII punctuation and capitals as well; here that becomes part of
tokenizer.json. For an underscore open_clip leaves a blank, as these models were trained with, Immich nothing:
here open_clip is followed.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, normalizers

from embedserve.hub.fetching import Repository
from embedserve.hub.foreign import Foreign, ForeignImages, ForeignTexts, Output
from embedserve.hub.pixels import from_open_clip
from embedserve.hub.tokens import open_tokenizer, pad_id, tokenize_as
from embedserve.hub.variants import only_float32

__all__ = ["LOOKS_FOR", "matches", "read"]

VISUAL, TEXTUAL = "visual/model.onnx", "textual/model.onnx"
LOOKS_FOR = f"{VISUAL} with preprocess_cfg.json, {TEXTUAL} with tokenizer.json, or both; and config.json"
CONTEXT = 77
"""open_clip's, where config.json says nothing."""


def matches(files: frozenset[str]) -> bool:
    return VISUAL in files or TEXTUAL in files


def read(repository: Repository, variant: str) -> Foreign:
    only_float32(variant, repository)
    config = repository.json("config.json")
    return Foreign(
        images=_images(repository) if VISUAL in repository.files else None,
        texts=_texts(repository, config.get("text_cfg", {})) if TEXTUAL in repository.files else None,
        activation="sigmoid" if "init_logit_bias" in config else "softmax",
    )


def _images(repository: Repository) -> ForeignImages:
    name = "visual/preprocess_cfg.json"
    return ForeignImages(
        graph=repository.path(VISUAL),
        label=VISUAL,
        output=Output(names=("image_embedding", "embedding"), or_first=True),
        rules=from_open_clip(repository.json(name), f"{repository.name}/{name}"),
    )


def _texts(repository: Repository, config: Mapping[str, Any]) -> ForeignTexts:
    path = repository.path("textual/tokenizer.json")
    tokenizer = open_tokenizer(path)
    context = int(config.get("context_length", CONTEXT))
    pad = pad_id(repository, tokenizer, "textual/")
    canonical = (config.get("tokenizer_kwargs") or {}).get("clean") == "canonicalize"
    tokens = tokenize_as(path, context, _canonicalise if canonical else _collapse)
    cleaning = [
        *(_canonical_form() if canonical else []),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
    ]
    theirs = [tokenizer.normalizer] if tokenizer.normalizer is not None else []
    tokenizer.normalizer = normalizers.Sequence([*cleaning, *theirs])
    return ForeignTexts(
        graph=repository.path(TEXTUAL),
        label=TEXTUAL,
        output=Output(names=("text_embedding", "embedding"), or_first=True),
        tokenizer=tokenizer.to_str(),
        their_tokens=tokens,
        context_length=context,
        pad_id=pad,
        padding="context",
    )


def _canonical_form() -> list[normalizers.Normalizer]:
    punctuation = Regex(f"[{re.escape(string.punctuation)}]")
    return [normalizers.Replace("_", " "), normalizers.Replace(punctuation, ""), normalizers.Lowercase()]


def _collapse(text: str) -> str:
    return " ".join(text.split())


def _canonicalise(text: str) -> str:
    return _collapse(text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower())
