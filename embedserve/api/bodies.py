"""Request bodies: JSON, NDJSON and multipart forms, each with its limits and a clear message."""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from embedserve.api.failures import invalid
from embedserve.config import Limits
from embedserve.errors import BadRequest, InvalidField, TooLarge, UnsupportedMedia, closest

__all__ = [
    "Form",
    "FormPart",
    "RequestModel",
    "body_kind",
    "parse_model",
    "read_form",
    "read_json",
    "read_lines",
]

Kind = Literal["json", "ndjson", "form"]

MEDIA_TYPES: dict[str, Kind] = {
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/jsonl": "ndjson",
    "application/x-jsonlines": "ndjson",
    "multipart/form-data": "form",
}

MAX_FIELD_BYTES = 1024 * 1024
"""Of one form field that is not a file, such as `filter` or `items`."""

M = TypeVar("M", bound=BaseModel)


class RequestModel(BaseModel):
    """Base of request bodies: no silent conversions, no unknown fields (a typo would go unnoticed)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=True)


def body_kind(request: Request, *allowed: Kind) -> Kind:
    """Which form the body has, by its Content-Type. Raises UnsupportedMedia naming those allowed."""
    header = request.headers.get("content-type", "")
    media_type = header.partition(";")[0].strip().lower()
    kind = MEDIA_TYPES.get(media_type)
    if kind is None and media_type.startswith("application/") and media_type.endswith("+json"):
        kind = "json"
    if kind in allowed:
        return kind
    names = " or ".join(name for name, of in MEDIA_TYPES.items() if of in allowed and "/nd" not in name)
    given = f"Content-Type '{media_type}'" if media_type else "A body without Content-Type"
    hint = (
        " With curl, add -H 'Content-Type: application/json'."
        if media_type == "application/x-www-form-urlencoded" and "json" in allowed
        else ""
    )
    raise UnsupportedMedia(
        f"{given} is not accepted here; send {names}.{hint}",
        param="Content-Type",
        code="unsupported_content_type",
    )


async def read_json(request: Request, model: type[M]) -> M:
    """The JSON body as `model`. Raises BadRequest (not JSON), InvalidField with the field's path."""
    body_kind(request, "json")
    body = await request.body()
    if not body.strip():
        raise BadRequest("The body is empty; send a JSON object.", code="empty_body")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_context=False), model=model) from None


def parse_model(model: type[M], values: object, *, prefix: str = "", lax: bool = False) -> M:
    """`values` as `model`. `lax` turns the strings of a form into numbers."""
    try:
        return model.model_validate(values, strict=False if lax else None)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False)
        raise invalid(errors, model=model, prefix=prefix) from None


async def read_lines(request: Request) -> AsyncIterator[tuple[int, bytes]]:
    """The lines of an NDJSON body as they arrive, numbered from 1, without empty ones."""
    number, tail = 0, bytearray()
    async with aclosing(request.stream()) as stream:
        async for chunk in stream:
            *lines, rest = chunk.split(b"\n")
            for line in lines:
                tail += line
                number += 1
                if tail.strip():
                    yield number, bytes(tail)
                tail.clear()
            tail += rest
    if tail.strip():
        yield number + 1, bytes(tail)


@dataclass(frozen=True, slots=True)
class FormPart:
    """One part of a multipart body, in the order sent: a file's bytes or a field's text."""

    name: str
    value: str | bytes
    filename: str | None = None


@dataclass(frozen=True, slots=True)
class Form:
    """A multipart body."""

    parts: Sequence[FormPart]

    def only(self, names: Iterable[str]) -> Form:
        """Raises InvalidField for a part whose name is not one of `names`, with the closest of them."""
        known = list(names)
        for part in self.parts:
            if part.name not in known:
                raise InvalidField(
                    f"'{part.name[:100]}' is not a part of this form; {closest(part.name, known)}",
                    param=part.name[:100],
                    code="unknown_field",
                )
        return self

    def all(self, *names: str) -> list[FormPart]:
        """The parts of these names, in the order sent."""
        return [part for part in self.parts if part.name in names]

    def fields(self, *, json: Iterable[str] = (), skip: Iterable[str] = ()) -> dict[str, Any]:
        """The text parts by name, those named in `json` parsed. Raises InvalidField for one given twice."""
        parsed, skipped = frozenset(json), frozenset(skip)
        found: dict[str, Any] = {}
        for part in self.parts:
            if part.name in skipped:
                continue
            if part.name in found:
                raise InvalidField(f"'{part.name}' is given twice; give it once.", param=part.name)
            text = part.value if isinstance(part.value, str) else part.value.decode("utf-8", "replace")
            found[part.name] = json_field(part.name, text) if part.name in parsed else text
        return found


def json_field(name: str, text: str) -> Any:
    """A form field that holds JSON. Raises InvalidField."""
    try:
        return from_json(text)
    except ValueError as error:
        raise InvalidField(
            f"'{name}' is not JSON ({error}); quote it for the shell, as in "
            f'-F \'{name}={{"colour": "red"}}\'.',
            param=name,
            code="invalid_json",
        ) from None


class _Parser(MultiPartParser):
    """Starlette's parser, without temporary files (the body limit bounds its memory); it sees truncation."""

    spool_max_size = sys.maxsize
    ended = False

    def on_end(self) -> None:
        self.ended = True


CUT_OFF = "it ends before its closing boundary, so the upload was cut off; send it again"


async def read_form(request: Request, limits: Limits) -> Form:
    """The multipart body. Raises TooLarge over a limit, BadRequest when it is malformed or cut off."""
    body_kind(request, "form")

    async def chunks() -> AsyncGenerator[bytes, None]:
        async with aclosing(request.stream()) as stream:
            async for chunk in stream:
                yield chunk
        if not parser.ended:
            raise MultiPartException(CUT_OFF)  # here the parser still closes the files it has begun

    parser = _Parser(
        request.headers,
        chunks(),
        max_files=limits.max_inputs,
        max_fields=limits.max_inputs + 32,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise _form_error(error.message, limits) from None
    parts = []
    for name, value in data.multi_items():
        if isinstance(value, UploadFile):
            parts.append(FormPart(name, value.file.read(), value.filename or None))
        else:
            parts.append(FormPart(name, value))
    await data.close()
    return Form(parts)


def _form_error(message: str, limits: Limits) -> BadRequest | TooLarge:
    if message.startswith("Too many files"):
        return TooLarge(
            f"The form has more than {limits.max_inputs} files; send fewer at a time, or raise --max-inputs.",
            code="too_many_inputs",
        )
    if message.startswith("Too many fields"):
        return TooLarge(f"The form has more than {limits.max_inputs + 32} fields; send fewer at a time.")
    if message.startswith("Part exceeded"):
        return TooLarge(
            f"A form field is longer than {MAX_FIELD_BYTES} bytes. Send pictures as files "
            "(with curl: -F file=@photo.jpg), or use JSON."
        )
    return BadRequest(f"The multipart body is malformed: {message.rstrip('.')}.", code="malformed_form")
