"""open_clip models as Immich exports them.

    config.json                  open_clip's model configuration
    visual/model.onnx            image → embedding; preprocess_cfg.json beside it
    textual/model.onnx           text → embedding; tokenizer.json and tokenizer_config.json beside it

Older exports take float32 [1, 3, size, size] and int32 [1, context], newer ones uint8 [batch, size, size, 3]
and int32 [batch, context]. Texts are cleaned before tokenizing as open_clip does, since that is what these
models were trained with; Immich's own code leaves HTML entities as they are, and makes `snake_case` one
word for SigLIP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from embedserve.cleaning import Cleaning, clean
from embedserve.errors import BundleError
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
    context = int(config.get("context_length", CONTEXT))
    rule = _cleaning(repository, config)
    return ForeignTexts(
        graph=repository.path(TEXTUAL),
        label=TEXTUAL,
        output=Output(names=("text_embedding", "embedding"), or_first=True),
        tokenizer=path.read_text(encoding="utf-8"),
        their_tokens=tokenize_as(path, context, lambda text: clean(text, rule)),
        context_length=context,
        pad_id=pad_id(repository, open_tokenizer(path), "textual/"),
        padding="context",
        cleaning=rule,
    )


def _cleaning(repository: Repository, config: Mapping[str, Any]) -> Cleaning:
    """open_clip's own tokenizer lowers capitals; one from Hugging Face does as its name in the configuration
    says, and else joins white space only."""
    usual = "whitespace" if config.get("hf_tokenizer_name") else "lower"
    said = (config.get("tokenizer_kwargs") or {}).get("clean", usual)
    if said not in get_args(Cleaning):
        raise BundleError(
            f"'config.json' of {repository.at} says clean={said!r}; known are "
            f"{', '.join(get_args(Cleaning))}."
        )
    return cast(Cleaning, said)
