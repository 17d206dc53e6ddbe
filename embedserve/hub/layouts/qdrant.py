"""One tower to a repository, as Qdrant exports them for fastembed.

    Qdrant/clip-ViT-B-32-vision   model.onnx, preprocessor_config.json, config.json
    Qdrant/clip-ViT-B-32-text     model.onnx, tokenizer.json, tokenizer_config.json, config.json

The vector is the graph's first output. Two such repositories make one bundle.
"""

from __future__ import annotations

from embedserve.hub.fetching import Repository
from embedserve.hub.foreign import Foreign, ForeignImages, ForeignTexts, Output
from embedserve.hub.pixels import from_huggingface
from embedserve.hub.tokens import context_length, open_tokenizer, optional_json, pad_id, tokenize_as
from embedserve.hub.variants import only_float32

__all__ = ["LOOKS_FOR", "matches", "read"]

GRAPH, PREPROCESSOR, TOKENIZER = "model.onnx", "preprocessor_config.json", "tokenizer.json"
LOOKS_FOR = f"{GRAPH} with {PREPROCESSOR} or {TOKENIZER}"
CONTEXT = 77


def matches(files: frozenset[str]) -> bool:
    return GRAPH in files and bool({PREPROCESSOR, TOKENIZER} & files)


def read(repository: Repository, variant: str) -> Foreign:
    only_float32(variant, repository)
    if PREPROCESSOR in repository.files:
        return Foreign(images=_images(repository))
    return Foreign(texts=_texts(repository))


def _images(repository: Repository) -> ForeignImages:
    return ForeignImages(
        graph=repository.path(GRAPH),
        label=GRAPH,
        output=Output(names=("image_embeds",), or_first=True),
        rules=from_huggingface(repository.json(PREPROCESSOR), f"{repository.name}/{PREPROCESSOR}"),
    )


def _texts(repository: Repository) -> ForeignTexts:
    path = repository.path(TOKENIZER)
    config = optional_json(repository, "config.json")
    config = config.get("text_config") or config
    context = context_length(repository, config, CONTEXT)
    return ForeignTexts(
        graph=repository.path(GRAPH),
        label=GRAPH,
        output=Output(names=("text_embeds",), or_first=True),
        tokenizer=path.read_text(encoding="utf-8"),
        their_tokens=tokenize_as(path, context),
        context_length=context,
        pad_id=pad_id(repository, open_tokenizer(path), config=config.get("pad_token_id")),
        padding="longest",
    )
