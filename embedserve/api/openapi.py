"""What the OpenAPI document says beyond what the framework sees: bodies, error answers, the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field

from embedserve import __version__
from embedserve.errors import (
    BadRequest,
    Busy,
    Conflict,
    EmbedServeError,
    Forbidden,
    InvalidField,
    NotFound,
    NotReady,
    TooLarge,
    Unauthorized,
    UnsupportedMedia,
)

__all__ = ["BINARY", "ErrorAnswer", "Failure", "answers", "body", "describe"]

REFERENCE = "#/components/schemas/{model}"
BINARY: Mapping[str, Any] = {"type": "string", "contentMediaType": "application/octet-stream"}
"""A file in a multipart form (OpenAPI 3.1)."""

DESCRIPTION = """Embeddings of images and texts, similarity search and zero-shot classification.

Errors always look like `{"error": {"message", "type", "param", "code"}}`; the message says what was wrong,
what is allowed and how to fix it. With API keys configured, send `Authorization: Bearer KEY`."""


class Failure(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "message": "'dimensions' is 4096; this encoder has 640. Ask for 1 to 640.",
                "type": "invalid_request_error",
                "param": "dimensions",
                "code": "invalid_field",
            }
        }
    )

    message: str = Field(description="The value, what was allowed, and the fix.")
    type: str
    param: str | None = Field(description="The field of the request that was wrong.")
    code: str = Field(description="A stable word for programs.")


class ErrorAnswer(BaseModel):
    """The body of every answer that is not a success."""

    error: Failure
    results: list[dict[str, Any]] | None = Field(
        None, description="What became of each item, where a request had several and all failed."
    )


WHEN: Mapping[type[EmbedServeError], str] = {
    BadRequest: "Malformed: not JSON, an empty or truncated upload.",
    Unauthorized: "No API key, or an unknown one.",
    Forbidden: "The key may not do this; the URL may not be fetched; the host or origin is not allowed.",
    NotFound: "Unknown collection, item, model or label set.",
    Conflict: "The collection or the label set was made with another encoder.",
    TooLarge: "More bytes, pixels or items than the limit, which the message names.",
    UnsupportedMedia: "Not an image, or a Content-Type that is not accepted here.",
    InvalidField: "A well-formed request with a value that is not allowed; `param` names the field.",
    Busy: "The queue is full; try again after `Retry-After` seconds.",
    NotReady: "Starting, shutting down, or not able to compute.",
    EmbedServeError: "The server failed; its log has the details.",
}

RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}

COMMON: tuple[type[EmbedServeError], ...] = (
    BadRequest,
    Unauthorized,
    Forbidden,
    InvalidField,
    EmbedServeError,
    NotReady,
)
BODY: tuple[type[EmbedServeError], ...] = (TooLarge, UnsupportedMedia)
EMBEDDING: tuple[type[EmbedServeError], ...] = (Busy,)


def answers(*more: type[EmbedServeError], body: bool = False, embeds: bool = False) -> dict[int | str, Any]:
    """The `responses` of a route: the errors all routes may answer with, and those of this one.

    Args:
        body: The route reads a body, which may be too large or of the wrong type.
        embeds: The route uses the encoder, whose queue may be full.
    """
    classes = [*COMMON, *more, *(BODY if body else ()), *(EMBEDDING if embeds else ())]
    found: dict[int | str, Any] = {}
    for cls in sorted(set(classes), key=lambda cls: cls.status):
        found[cls.status] = {"model": ErrorAnswer, "description": WHEN[cls]}
        if cls in (Busy, NotReady):
            found[cls.status]["headers"] = RETRY_AFTER
    return found


def body(
    model: type[BaseModel] | None = None,
    *,
    form: Mapping[str, Any] | None = None,
    required: tuple[str, ...] = (),
    lines: type[BaseModel] | None = None,
    examples: Mapping[str, Any] | None = None,
    optional: bool = False,
) -> dict[str, Any]:
    """`openapi_extra` for a route that reads its body itself.

    Args:
        model: The JSON body.
        form: The parts of the multipart form, name → JSON schema; `required` names those that must be there.
        lines: The model of one NDJSON line.
        examples: Example JSON bodies by title.
        optional: The body may be left out.
    """
    content: dict[str, Any] = {}
    if model is not None:
        content["application/json"] = {"schema": _schema(model)}
        if examples:
            content["application/json"]["examples"] = {
                name: {"summary": name, "value": value} for name, value in examples.items()
            }
    if form is not None:
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": dict(form), "required": list(required)}
        }
    if lines is not None:
        content["application/x-ndjson"] = {
            "schema": {"type": "string", "description": f"One `{lines.__name__}` as JSON a line."}
        }
    return {"requestBody": {"required": not optional, "content": content}}


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return model.model_json_schema(ref_template=REFERENCE)


def describe(app: FastAPI) -> None:
    """Makes `app.openapi()` complete: request bodies' schemas, the key, and no internal fields."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the documented way to extend the document


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(
        title="EmbedServe",
        version=__version__,
        summary="Images and texts to vectors, neighbours and labels.",
        description=DESCRIPTION,
        routes=app.routes,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for path in document["paths"].values():
        for operation in path.values():
            _name_body(operation, schemas)
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "Only where the server has API keys."}
    }
    document["security"] = [{}, {"key": []}]
    return document


def _name_body(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Moves the schema of a JSON body, and those it refers to, to the components."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return
    schema = content["schema"]
    schemas.update(schema.pop("$defs", {}))
    schemas[schema["title"]] = schema
    content["schema"] = {"$ref": REFERENCE.format(model=schema["title"])}
