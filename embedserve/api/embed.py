"""`POST /v1/embed`: images and texts in one request, their order kept, each failing alone."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel, Field, WithJsonSchema

from embedserve.api.bodies import Form, RequestModel, body_kind, parse_model, read_form, read_json
from embedserve.api.failures import error_body, error_response, json_response
from embedserve.api.inputs import Source, check_count, embed, looks
from embedserve.api.openai import IMAGE, TEXT, EncodingFormat, render_vector
from embedserve.api.openapi import BINARY, Failure, answers, body
from embedserve.api.services import Services, check_model, services, unless_gone
from embedserve.bundle import pack_vector
from embedserve.encoder import OutputName
from embedserve.errors import EmbedServeError, InvalidField, NotFound, TooLarge
from embedserve.prefix import check_dimensions, shorten
from embedserve.towers import Look

__all__ = ["answer_each", "router"]

router = APIRouter(tags=["embeddings"])

Vector = NDArray[np.float32]

MOST_LOOKS = 32
"""Images in one request whose patches or attention are sent."""

INPUTS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "description": "Images (base64, a data URI or an http(s) URL) and texts. A bare string is a text, "
    "or an image when it is a `data:image/…` URI.",
    "items": {"anyOf": [{"type": "string"}, IMAGE, TEXT]},
    "minItems": 1,
}


class EmbedRequest(RequestModel):
    inputs: Annotated[list[Any], WithJsonSchema(INPUTS_SCHEMA)]
    encoding_format: EncodingFormat = Field("float", description="base64: little-endian float32.")
    dimensions: int | None = Field(
        None, ge=1, description="Keep so many leading numbers and renormalise; all by default."
    )
    include: list[OutputName] = Field(
        default=[], description="What to send of images beside the vectors, where the encoder offers it."
    )
    model: str | None = Field(None, description="The encoder's name, or left out.")


class EmbedOptions(RequestModel):
    """The fields of the form that are no inputs."""

    encoding_format: EncodingFormat = "float"
    dimensions: int | None = Field(None, ge=1)
    include: list[OutputName] = Field(default=[])
    model: str | None = None


class Cells(BaseModel):
    """Rows of numbers, row by row of the grid; with base64, little-endian float32 of this shape."""

    shape: list[int]
    data: list[list[float]] | str


class EmbedResult(BaseModel):
    """`embedding`, or `error`."""

    index: int
    embedding: list[float] | str | None = None
    patches: Cells | None = Field(None, description="[rows · columns, length], if asked for.")
    attention: Cells | None = Field(None, description="[heads, rows · columns], if asked for.")
    error: Failure | None = None


class EmbedAnswer(BaseModel):
    model: str
    dim: int
    results: list[EmbedResult]


@router.post(
    "/v1/embed",
    operation_id="embed",
    summary="Embed images and texts, each failing alone",
    response_model=EmbedAnswer,
    responses=answers(NotFound, body=True, embeds=True),
    openapi_extra=body(
        EmbedRequest,
        form={
            "file": {"type": "array", "items": BINARY, "description": "Images."},
            "text": {"type": "array", "items": {"type": "string"}},
            "encoding_format": {"type": "string", "enum": ["float", "base64"]},
            "dimensions": {"type": "integer", "minimum": 1},
            "include": {"type": "array", "items": {"type": "string", "enum": ["patches", "attention"]}},
            "model": {"type": "string"},
        },
        examples={"mixed": {"inputs": ["a red apple", {"image": "https://example.com/apple.jpg"}]}},
    ),
)
async def create_embeddings(request: Request) -> Response:
    """200 when any input succeeded, else the status of the first one's error."""
    parts = services(request)
    asked: EmbedRequest | EmbedOptions
    if body_kind(request, "json", "form") == "json":
        asked = body_asked = await read_json(request, EmbedRequest)
        sources: list[Source | EmbedServeError] = [
            _source(entry, f"inputs[{index}]") for index, entry in enumerate(body_asked.inputs)
        ]
        check_count(len(sources), parts.limits, "inputs")
    else:
        form = await read_form(request, parts.limits)
        asked = parse_model(EmbedOptions, _options(form), lax=True)
        sources = list(_form_sources(form))
        check_count(len(sources), parts.limits, "file", what="'file' or 'text' parts")
    check_model(parts, asked.model)
    encoder = parts.towers.encoder
    size = check_dimensions(encoder.bundle.description, asked.dimensions)
    good = [source for source in sources if isinstance(source, Source)]
    embedded = iter(await unless_gone(request, _embed(parts, good, asked.include)))
    results = [source if isinstance(source, EmbedServeError) else next(embedded) for source in sources]
    rendered = [_render(index, result, size, asked.encoding_format) for index, result in enumerate(results)]
    return answer_each(results, rendered, {"model": encoder.name, "dim": size})


async def _embed(
    parts: Services, sources: Sequence[Source], include: Sequence[OutputName]
) -> Sequence[Vector | Look | EmbedServeError]:
    if not include:
        return await embed(parts, sources)
    for name in include:
        try:
            parts.towers.encoder.require_output(name)
        except InvalidField as error:
            raise error.at("include") from None
    seen = [source for source in sources if source.kind == "image"]
    if len(seen) > MOST_LOOKS:
        raise TooLarge(
            f"'include' is asked for {len(seen)} images; at most {MOST_LOOKS} go in one request, as each "
            "answer may be megabytes. Send several requests.",
            param="include",
            code="too_many_inputs",
        )
    words = [source for source in sources if source.kind != "image"]
    looked, read = await asyncio.gather(looks(parts, seen, include), embed(parts, words))
    pictures, texts = iter(looked), iter(read)
    return [next(pictures) if source.kind == "image" else next(texts) for source in sources]


def _render(
    index: int, result: Vector | Look | EmbedServeError, size: int, encoding_format: EncodingFormat
) -> dict[str, Any]:
    if isinstance(result, EmbedServeError):
        return error_result(index, result)
    vector = result.vector if isinstance(result, Look) else result
    try:
        kept = shorten(vector, size)
    except InvalidField as error:
        return error_result(index, error)
    rendered: dict[str, Any] = {"index": index, "embedding": render_vector(kept, encoding_format)}
    if isinstance(result, Look):
        for name, rows in result.outputs.items():
            data = pack_vector(rows) if encoding_format == "base64" else rows.tolist()
            rendered[name] = {"shape": list(rows.shape), "data": data}
    return rendered


def _source(given: Any, param: str) -> Source | EmbedServeError:
    match given:
        case str():
            return Source.string(given, param)
        case {"image": str(image), **rest} if not rest:
            return Source.image(image, f"{param}.image")
        case {"text": str(text), **rest} if not rest:
            return Source.text(text, f"{param}.text")
    return InvalidField(
        f'\'{param}\' is {repr(given)[:60]}; give a string, {{"image": …}} or {{"text": …}}.', param=param
    )


def _options(form: Form) -> dict[str, Any]:
    form.only(["file", "image", "text", *EmbedOptions.model_fields])
    fields = form.fields(skip=["file", "image", "text", "include"])
    return fields | {"include": [part.value for part in form.all("include")]}


def _form_sources(form: Form) -> list[Source]:
    """`file` parts are images; `image` parts may be base64 or URLs as well; a `text` may be a file, too."""
    sources = []
    for index, part in enumerate(form.all("file", "image", "text")):
        param = f"{part.name}[{index}]"
        if part.name == "text":
            text = part.value if isinstance(part.value, str) else part.value.decode("utf-8", "replace")
            sources.append(Source.text(text, param))
        elif part.name == "file" and isinstance(part.value, str):
            raise InvalidField(
                "'file' is a text field; send a file (with curl: -F file=@photo.jpg), or use 'image' for "
                "base64 or a URL.",
                param=param,
            )
        else:
            sources.append(Source.image(part.value, param))
    return sources


def error_result(index: int, error: EmbedServeError) -> dict[str, Any]:
    """The place of a failed input among the results."""
    return {"index": index, "error": error_body(error)}


def answer_each(
    results: Sequence[object], rendered: Sequence[dict[str, Any]], head: dict[str, Any]
) -> Response:
    """200 with all results when any succeeded; when all failed, the first error's status and all results."""
    errors = [result for result in results if isinstance(result, EmbedServeError)]
    if errors and len(errors) == len(results):
        return error_response(errors[0], rendered)
    return json_response({**head, "results": rendered})
