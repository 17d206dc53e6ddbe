"""The OpenAI form of embeddings, so that its clients work unchanged, with images as an addition.

Requests and answers follow OpenAI's API reference for `POST /v1/embeddings` and `GET /v1/models`. Images come
as `{"image": …}` objects (Jina's form), as strings with `"modality": "image"` (infinity's form), or as
`data:image/…` URIs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from embedserve.api.bodies import read_json
from embedserve.api.failures import json_response
from embedserve.api.inputs import Source, check_count, embed
from embedserve.api.openapi import answers, body
from embedserve.api.services import Services, check_model, services, unless_gone
from embedserve.bundle import ImageOutputs, pack_vector
from embedserve.errors import EmbedServeError, InvalidField, NotFound
from embedserve.prefix import check_dimensions, shorten

__all__ = ["EncodingFormat", "render_vector", "router"]

router = APIRouter(tags=["embeddings"])

EncodingFormat = Literal["float", "base64"]

IMAGE = {"type": "object", "properties": {"image": {"type": "string"}}, "required": ["image"]}
TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
TOKENS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
INPUT_SCHEMA: dict[str, Any] = {
    "description": "A text, an image, an array of token ids of this encoder, or a list of them in any order.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        IMAGE,
        TEXT,
        TOKENS,
        {"type": "array", "items": {"anyOf": [{"type": "string"}, IMAGE, TEXT, TOKENS]}, "minItems": 1},
    ],
}


class EmbeddingRequest(BaseModel):
    """OpenAI's request. Fields that only other servers know are ignored, as clients send them."""

    model_config = ConfigDict(extra="ignore", strict=True)

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)]
    model: str | None = Field(None, description="The encoder's name, or left out.")
    encoding_format: EncodingFormat | None = Field(
        None, description="base64: little-endian float32, a third of the size."
    )
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many leading numbers and renormalise; all by default."
    )
    modality: Literal["text", "image"] | None = Field(None, description="What the strings of `input` are.")
    user: Any = Field(None, description="Not used.")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """OpenAI's answer, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Model(BaseModel):
    """The encoder served. OpenAI's fields first, then ours."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    dim: int
    modalities: list[Literal["image", "text"]]
    dimensions: list[int] = Field(
        description="Lengths trained to work as prefixes; empty: none in particular."
    )
    outputs: ImageOutputs | None = Field(
        description="What /v1/embed and /v1/heatmap can give of an image beside its vector; null: nothing."
    )
    context_length: int | None = Field(description="Most tokens of a text; null without a text tower.")
    activation: Literal["softmax", "sigmoid"]
    licence: str
    source: str
    fingerprint: str = Field(description="sha256 of what decides the vectors; a collection remembers it.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


@router.post(
    "/v1/embeddings",
    operation_id="createEmbeddings",
    summary="Embed texts or images (OpenAI form)",
    response_model=EmbeddingList,
    responses=answers(NotFound, body=True, embeds=True),
    openapi_extra=body(
        EmbeddingRequest,
        examples={
            "texts": {"input": ["a red apple", "a green pear"]},
            "an image": {"input": [{"image": "https://example.com/apple.jpg"}], "encoding_format": "base64"},
        },
    ),
)
async def create_embeddings(request: Request) -> Response:
    """One bad input fails the whole request: OpenAI's form has no place for single errors (/v1/embed has)."""
    parts = services(request)
    asked = await read_json(request, EmbeddingRequest)
    check_model(parts, asked.model)
    size = check_dimensions(parts.towers.encoder.bundle.description, asked.dimensions)
    sources = parse_input(asked.input, asked.modality)
    check_count(len(sources), parts.limits, "input")
    used = await unless_gone(request, _embed(parts, sources))
    vectors, tokens = used
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": render_vector(_shortened(vector, size, f"input[{index}]"), asked.encoding_format),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_response({"object": "list", "data": data, "model": parts.towers.encoder.name, "usage": usage})


def _shortened(vector: NDArray[np.float32], size: int, param: str) -> NDArray[np.float32]:
    try:
        return shorten(vector, size)
    except InvalidField as error:
        raise InvalidField(f"'{param}': {error}", param="dimensions", code=error.code) from None


async def _embed(parts: Services, sources: Sequence[Source]) -> tuple[list[NDArray[np.float32]], int]:
    vectors = []
    for result in await embed(parts, sources):
        if isinstance(result, EmbedServeError):
            raise result
        vectors.append(result)
    tokens = sum(len(source.value) for source in sources if source.kind == "tokens")
    tokens += sum(parts.towers.count_tokens(source.value) for source in sources if source.kind == "text")
    return vectors, tokens


def parse_input(given: Any, modality: str | None) -> list[Source]:
    """OpenAI's `input` in all its forms, as sources. Raises InvalidField."""
    if isinstance(given, list) and given and all(_is_token(entry) for entry in given):
        return [Source("tokens", given, "input")]
    if not isinstance(given, list):
        return [_source(given, "input", modality)]
    return [_source(entry, f"input[{index}]", modality) for index, entry in enumerate(given)]


def _source(given: Any, param: str, modality: str | None) -> Source:
    match given:
        case str():
            return Source.image(given, param) if modality == "image" else Source.string(given, param)
        case {"image": str(image), **rest} if not rest:
            return Source.image(image, f"{param}.image")
        case {"text": str(text), **rest} if not rest:
            return Source.text(text, f"{param}.text")
        case list() if given and all(_is_token(entry) for entry in given):
            return Source("tokens", given, param)
    raise InvalidField(
        f'\'{param}\' is {repr(given)[:60]}; give a string, {{"image": …}}, {{"text": …}} or an array of '
        "token ids.",
        param=param,
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def render_vector(vector: NDArray[np.float32], encoding_format: EncodingFormat | None) -> list[float] | str:
    """As JSON numbers, or as base64 of little-endian float32."""
    if encoding_format == "base64":
        return pack_vector(vector)
    numbers: list[float] = vector.tolist()
    return numbers


@router.get(
    "/v1/models",
    operation_id="listModels",
    summary="The encoder served",
    response_model=ModelList,
    responses=answers(),
)
async def list_models(request: Request) -> Response:
    return json_response({"object": "list", "data": [describe_model(services(request))]})


@router.get(
    "/v1/models/{model}",
    operation_id="getModel",
    summary="One encoder",
    response_model=Model,
    responses=answers(NotFound),
)
async def get_model(request: Request, model: str) -> Response:
    check_model(services(request), model)
    return json_response(describe_model(services(request)))


def describe_model(parts: Services) -> dict[str, Any]:
    encoder = parts.towers.encoder
    described = encoder.bundle.description
    towers = (("image", encoder.has_images), ("text", encoder.has_text))
    return Model(
        id=encoder.name,
        created=int(encoder.bundle.path("encoder.json").stat().st_mtime),
        owned_by="embedserve",
        dim=described.dim,
        modalities=[name for name, there in towers if there],
        dimensions=list(described.dims),
        outputs=described.image.outputs if described.image else None,
        context_length=described.text.context_length if described.text else None,
        activation=described.scoring.activation,
        licence=described.licence,
        source=described.source,
        fingerprint=encoder.bundle.fingerprint,
    ).model_dump()
