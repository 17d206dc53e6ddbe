"""`POST /v1/collections/{name}/items`: write items, from JSON, NDJSON or a form."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from pydantic_core import from_json

from embedserve.api.bodies import (
    Form,
    RequestModel,
    body_kind,
    json_field,
    parse_model,
    read_form,
    read_json,
    read_lines,
)
from embedserve.api.collections import CollectionName
from embedserve.api.failures import error_body, error_response, json_response
from embedserve.api.inputs import Source, check_count, check_text, load_images
from embedserve.api.openapi import BINARY, Failure, answers, body
from embedserve.api.services import Services, services
from embedserve.collections import Collection, NewItem, Stored
from embedserve.errors import BadRequest, Conflict, EmbedServeError, InvalidField, NotFound
from embedserve.items import MAX_TEXT_WEIGHT, TEXT_WEIGHT

__all__ = ["router"]

router = APIRouter(tags=["items"])

LINES_AT_ONCE = 256
"""Lines of NDJSON embedded and written together; one commit each."""


TextWeight = Annotated[
    float,
    Field(
        ge=0,
        le=MAX_TEXT_WEIGHT,
        description="Of an item with both: its vector is the direction of image + text_weight · text.",
    ),
]


class ItemBody(RequestModel):
    """Its vector comes from `image`, `text`, `vector`, or `image` and `text` together.

    A picture with a text is found by its caption as well as by its looks. The text is only embedded: what is
    to be shown or filtered by belongs into `metadata`.
    """

    id: str | None = Field(
        None,
        description="Left out: made from the image, text or vector, so that writing twice is safe.",
    )
    image: str | None = Field(None, description="Base64, a data URI or an http(s) URL.")
    text: str | None = Field(None, description="With an image: its caption.")
    text_weight: TextWeight = TEXT_WEIGHT
    vector: list[float] | None = Field(None, description="Any length but zero; kept at unit length.")
    metadata: dict[str, Any] = Field(default_factory=dict)


class ItemsBody(RequestModel):
    items: Annotated[
        list[Any], Field(json_schema_extra={"items": ItemBody.model_json_schema(), "minItems": 1})
    ]


class FileNote(RequestModel):
    """What belongs to a file of the form."""

    id: str | None = None
    text: str | None = None
    text_weight: TextWeight = TEXT_WEIGHT
    metadata: dict[str, Any] = Field(default_factory=dict)


class ItemResult(BaseModel):
    id: str | None
    status: Literal["ok", "error"]
    error: Failure | None = None


class ItemsAnswer(BaseModel):
    """`results` has one entry for each item, in the order sent."""

    upserted: int
    failed: int
    results: list[ItemResult]


@router.post(
    "/v1/collections/{name}/items",
    operation_id="upsertItems",
    summary="Write items",
    response_model=ItemsAnswer,
    responses=answers(NotFound, Conflict, body=True, embeds=True),
    openapi_extra=body(
        ItemsBody,
        form={
            "file": {"type": "array", "items": BINARY, "description": "Images; the id is the file's name."},
            "items": {
                "type": "string",
                "description": 'JSON: [{"id", "text", "text_weight", "metadata"}], one for each file in '
                "their order, all fields optional; `text` is the picture's caption.",
            },
        },
        required=("file",),
        lines=ItemBody,
        examples={
            "images": {
                "items": [{"id": "a.jpg", "image": "https://example.com/a.jpg", "metadata": {"year": 2024}}]
            },
            "texts": {"items": [{"text": "a red apple"}, {"text": "a green pear"}]},
            "captioned": {
                "items": [
                    {
                        "id": "a.jpg",
                        "image": "https://example.com/a.jpg",
                        "text": "my dog",
                        "text_weight": 0.5,
                    }
                ]
            },
        },
    ),
)
async def upsert_items(request: Request, name: CollectionName) -> Response:
    """Each item fails or succeeds alone, and what succeeded is on disk when the answer comes.

    200 when any succeeded, else the status of the first one's error. A known id is replaced; an id that comes
    twice in one request is an error of the second, because one of the two would be lost. NDJSON is written as
    it arrives, any number of lines within the limit on the body.
    """
    parts = services(request)
    collection = await parts.library.get(name)
    writer = _Writer(parts, collection)
    match body_kind(request, "json", "ndjson", "form"):
        case "json":
            asked = await read_json(request, ItemsBody)
            check_count(len(asked.items), parts.limits, "items", what="items")
            await writer.write([_parse(item, f"items[{i}]") for i, item in enumerate(asked.items)])
        case "form":
            await writer.write(_form_items(await read_form(request, parts.limits), parts))
        case "ndjson":
            try:
                await _write_lines(writer, read_lines(request), min(LINES_AT_ONCE, parts.limits.max_inputs))
            except EmbedServeError as error:  # the body is over its limit: say what was written until then
                return error_response(error, writer.results)
            if not writer.results:
                raise InvalidField("The body holds no line; send one item as JSON a line.")
    return writer.answer()


@dataclass(frozen=True, slots=True)
class _Asked:
    """One item of a request; `place` is where it stands there, such as `items[3]`."""

    place: str
    id: str | None = None
    image: str | bytes | None = field(default=None, repr=False)
    text: str | None = None
    text_weight: float = TEXT_WEIGHT
    vector: list[float] | None = field(default=None, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def new(self, image: bytes | None) -> NewItem:
        return NewItem(
            id=self.id,
            image=image,
            text=self.text,
            text_weight=self.text_weight,
            vector=self.vector,
            metadata=self.metadata,
        )

    def placed(self, error: EmbedServeError) -> EmbedServeError:
        """The error with its field's path in the request instead of that in the item."""
        error = copy.copy(error)
        uploaded = isinstance(self.image, bytes) and error.param == "image"
        error.param = self.place if uploaded or not error.param else f"{self.place}.{error.param}"
        return error


class _Writer:
    """Writes items and keeps what became of each."""

    def __init__(self, parts: Services, collection: Collection) -> None:
        self.results: list[dict[str, Any]] = []
        self._first_error: EmbedServeError | None = None
        self._parts = parts
        self._collection = collection
        self._seen: set[str] = set()

    async def write(self, items: Sequence[_Asked | EmbedServeError]) -> None:
        """Loads images, upserts, and appends to `results` in order. An error already has its path."""
        images = [item for item in items if isinstance(item, _Asked) and item.image is not None]
        sources = [Source.image(item.image or b"", "image") for item in images]
        loaded = iter(await load_images(self._parts, sources))
        ready: list[NewItem | EmbedServeError] = []
        for item in items:
            if isinstance(item, EmbedServeError):
                ready.append(item)
                continue
            image = next(loaded) if item.image is not None else None
            ready.append(image if isinstance(image, EmbedServeError) else self._check(item, image))
        stored = iter(await self._upsert([new for new in ready if isinstance(new, NewItem)]))
        for item, outcome in zip(items, ready, strict=True):
            self._note(item, next(stored) if isinstance(outcome, NewItem) else outcome)

    def _check(self, item: _Asked, image: bytes | None) -> NewItem | EmbedServeError:
        try:
            if item.text is not None:
                check_text(item.text, self._parts.limits)
        except EmbedServeError as error:
            return error.at("text")
        if item.id is not None and item.id in self._seen:
            return InvalidField(
                f"The id '{item.id[:80]}' comes twice in this request; give each item its own id.",
                param="id",
                code="duplicate_id",
            )
        if item.id is not None:
            self._seen.add(item.id)
        return item.new(image)

    async def _upsert(self, items: Sequence[NewItem]) -> Sequence[Stored | EmbedServeError]:
        if not items:
            return []
        try:
            return await self._collection.upsert(items)
        except EmbedServeError as error:  # the queue is full, or the store is in trouble: none was written
            return [error] * len(items)

    def _note(self, item: _Asked | EmbedServeError, result: Stored | EmbedServeError) -> None:
        if isinstance(result, Stored):
            self.results.append({"id": result.id, "status": "ok"})
            return
        asked = None
        if isinstance(item, _Asked):
            asked = item.id
            if result.param == "image":
                self._parts.metrics.count_bad_images([result])
            result = item.placed(result)
        self._first_error = self._first_error or result
        self.results.append({"id": asked, "status": "error", "error": error_body(result)})

    def answer(self) -> Response:
        """200 when any item was written, else the first error's status."""
        failed = sum(result["status"] == "error" for result in self.results)
        if self._first_error is not None and failed == len(self.results):
            return error_response(self._first_error, self.results)
        return json_response(
            {"upserted": len(self.results) - failed, "failed": failed, "results": self.results}
        )


def _parse(given: object, place: str) -> _Asked | EmbedServeError:
    try:
        item = parse_model(ItemBody, given, prefix=place)
    except EmbedServeError as error:
        return error
    return _Asked(place, item.id, item.image, item.text, item.text_weight, item.vector, item.metadata)


def _form_items(form: Form, parts: Services) -> list[_Asked | EmbedServeError]:
    form.only(["file", "image", "items"])
    files = form.all("file", "image")
    check_count(len(files), parts.limits, "file", what="files")
    notes = _notes(form, len(files))
    items: list[_Asked | EmbedServeError] = []
    for index, (part, given) in enumerate(zip(files, notes, strict=True)):
        try:
            note = parse_model(FileNote, given, prefix=f"items[{index}]")
        except EmbedServeError as error:
            items.append(error)
            continue
        name = part.filename if note.id is None else note.id
        place = f"{part.name}[{index}]"
        items.append(_Asked(place, name, part.value, note.text, note.text_weight, metadata=note.metadata))
    return items


def _notes(form: Form, files: int) -> list[Any]:
    """What the part `items` says about each file; nothing when it is not there."""
    text = form.fields(skip=["file", "image"]).get("items")
    if text is None:
        return [{}] * files
    notes = json_field("items", text)
    if not isinstance(notes, list) or len(notes) != files:
        found = f"a list of {len(notes)}" if isinstance(notes, list) else "no list"
        raise InvalidField(
            f'\'items\' is {found}, but there are {files} files; give one {{"id", "metadata"}} for each, '
            "in their order.",
            param="items",
        )
    return notes


async def _write_lines(writer: _Writer, lines: AsyncIterator[tuple[int, bytes]], at_once: int) -> None:
    gathered: list[_Asked | EmbedServeError] = []
    async for number, line in lines:
        gathered.append(_parse_line(line, number))
        if len(gathered) == at_once:
            await writer.write(gathered)
            gathered = []
    await writer.write(gathered)


def _parse_line(line: bytes, number: int) -> _Asked | EmbedServeError:
    try:
        given = from_json(line)
    except ValueError as error:
        return BadRequest(
            f"Line {number} is not JSON ({error}); each line is one item.",
            param=f"line[{number}]",
            code="invalid_json",
        )
    return _parse(given, f"line[{number}]")
