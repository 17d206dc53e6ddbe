"""`/v1/collections/{name}/items` and their thumbnails: write, read, page, delete."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request, Response
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
from embedserve.collections import Collection, NewItem, Stored, StoredItem
from embedserve.errors import BadRequest, Conflict, EmbedServeError, InvalidField, NotFound

__all__ = ["parse_filter", "router", "thumbnail_url"]

router = APIRouter(tags=["items"])

LINES_AT_ONCE = 256
"""Lines of NDJSON embedded and written together; one commit each."""

MAX_PAGE = 1000
VERSION_LENGTH = 16
"""Hex digits of the image's sha256 in a thumbnail's path."""

ItemId = Annotated[
    str, Path(description="Any text; slashes may be written as they are.", examples=["holiday/beach.jpg"])
]


class ItemBody(RequestModel):
    """Exactly one of `image`, `text` and `vector`."""

    id: str | None = Field(
        None, description="Left out: made from the content, so that writing twice is safe."
    )
    image: str | None = Field(None, description="Base64, a data URI or an http(s) URL.")
    text: str | None = None
    vector: list[float] | None = Field(None, description="Any length but zero; kept at unit length.")
    metadata: dict[str, Any] = {}


class ItemsBody(RequestModel):
    items: Annotated[
        list[Any], Field(json_schema_extra={"items": ItemBody.model_json_schema(), "minItems": 1})
    ]


class FileNote(RequestModel):
    """What belongs to a file of the form."""

    id: str | None = None
    metadata: dict[str, Any] = {}


class ItemResult(BaseModel):
    id: str | None
    status: Literal["ok", "error"]
    error: Failure | None = None


class ItemsAnswer(BaseModel):
    """`results` has one entry for each item, in the order sent."""

    upserted: int
    failed: int
    results: list[ItemResult]


class ItemDescription(BaseModel):
    id: str
    kind: Literal["image", "text", "vector"] = Field(description="What its vector was made from.")
    metadata: dict[str, Any] | None = None
    thumbnail: str | None = Field(description="Path of its picture; null without one.")
    vector: list[float] | None = None


class ItemPage(BaseModel):
    items: list[ItemDescription]
    next: str | None = Field(description="The `after` of the next page; null on the last.")


class Deleted(BaseModel):
    deleted: int


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
                "description": 'JSON: [{"id", "metadata"}], one for each file in their order.',
            },
        },
        required=("file",),
        lines=ItemBody,
        examples={
            "images": {
                "items": [{"id": "a.jpg", "image": "https://example.com/a.jpg", "metadata": {"year": 2024}}]
            },
            "texts": {"items": [{"text": "a red apple"}, {"text": "a green pear"}]},
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
                await _write_lines(writer, read_lines(request))
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
    vector: list[float] | None = field(default=None, repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def new(self, image: bytes | None) -> NewItem:
        return NewItem(id=self.id, image=image, text=self.text, vector=self.vector, metadata=self.metadata)

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
        id = None
        if isinstance(item, _Asked):
            id = item.id
            if result.param == "image":
                self._parts.metrics.count_bad_images([result])
            result = item.placed(result)
        self._first_error = self._first_error or result
        self.results.append({"id": id, "status": "error", "error": error_body(result)})

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
    return _Asked(place, item.id, item.image, item.text, item.vector, item.metadata)


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
        id = part.filename if note.id is None else note.id
        items.append(_Asked(f"{part.name}[{index}]", id, part.value, metadata=note.metadata))
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
            f'\'items\' is {found}, but there are {files} files; give one {{"id", "metadata"}} for each, in order.',
            param="items",
        )
    return notes


async def _write_lines(writer: _Writer, lines: AsyncIterator[tuple[int, bytes]]) -> None:
    gathered: list[_Asked | EmbedServeError] = []
    async for number, line in lines:
        gathered.append(_parse_line(line, number))
        if len(gathered) == LINES_AT_ONCE:
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


# --- read and delete ------------------------------------------------------------------------------------

Include = Annotated[
    list[Literal["metadata", "vector"]],
    Query(description="What to send of each item; repeatable.", examples=[["metadata", "vector"]]),
]
FilterText = Annotated[
    str | None, Query(description="A filter as JSON.", examples=['{"year": {"$gte": 2020}}'])
]


@router.get(
    "/v1/collections/{name}/items",
    operation_id="listItems",
    summary="Page through items, in id order",
    response_model=ItemPage,
    responses=answers(NotFound, Conflict),
)
async def list_items(
    request: Request,
    name: CollectionName,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    after: Annotated[str | None, Query(description="Items behind this id: `next` of the last page.")] = None,
    filter: FilterText = None,
    include: Include = ["metadata"],  # noqa: B006 - the framework copies defaults, and shows them
) -> Response:
    collection = await services(request).library.get(name)
    found = await collection.scan(
        after=after, limit=limit + 1, filter=parse_filter(filter), vectors="vector" in include
    )
    page = [_render(name, item, include) for item in found[:limit]]
    return json_response({"items": page, "next": found[limit - 1].id if len(found) > limit else None})


@router.delete(
    "/v1/collections/{name}/items",
    operation_id="deleteItems",
    summary="Delete items by ids or by a filter",
    response_model=Deleted,
    responses=answers(NotFound, Conflict),
)
async def delete_items(
    request: Request,
    name: CollectionName,
    id: Annotated[list[str] | None, Query(description="Repeatable; unknown ids are passed over.")] = None,
    filter: FilterText = None,
) -> Response:
    """Exactly one of `id` and `filter`. The filter `{}` matches all items."""
    if (id is None) == (filter is None):
        raise InvalidField("Give either 'id' (repeatable) or 'filter', exactly one of them.", param="id")
    collection = await services(request).library.get(name)
    deleted = await collection.delete(id, filter=parse_filter(filter))
    return json_response({"deleted": deleted})


@router.get(
    "/v1/collections/{name}/items/{id:path}",
    operation_id="getItem",
    summary="One item",
    response_model=ItemDescription,
    responses=answers(NotFound, Conflict),
)
async def get_item(
    request: Request,
    name: CollectionName,
    id: ItemId,
    include: Include = ["metadata"],  # noqa: B006 - as above
) -> Response:
    collection = await services(request).library.get(name)
    item = await collection.item(id, vectors="vector" in include)
    return json_response(_render(name, item, include))


@router.delete(
    "/v1/collections/{name}/items/{id:path}",
    operation_id="deleteItem",
    summary="Delete one item",
    status_code=204,
    responses=answers(NotFound, Conflict),
)
async def delete_item(request: Request, name: CollectionName, id: ItemId) -> Response:
    """It is gone from disk when the answer comes. An unknown id is a 404."""
    collection = await services(request).library.get(name)
    if not await collection.delete([id]):
        raise NotFound(
            f"Item '{id[:80]}' is not in the collection '{name}'; nothing was deleted.", code="item_not_found"
        )
    return Response(status_code=204)


@router.get(
    "/v1/collections/{name}/thumbnails/{id:path}",
    operation_id="getThumbnail",
    summary="An item's picture",
    responses={
        200: {
            "content": {"image/webp": {"schema": dict(BINARY)}},
            "description": "At most 256 pixels wide or high.",
        },
        304: {"description": "The picture that `If-None-Match` names is still the item's."},
    }
    | answers(NotFound, Conflict),
    response_class=Response,
)
async def get_thumbnail(
    request: Request,
    name: CollectionName,
    id: ItemId,
    v: Annotated[
        str | None, Query(description="The picture's version, as in the paths that hits carry.")
    ] = None,
) -> Response:
    """A path with the right `v` never changes its picture, so browsers need not ask again."""
    collection = await services(request).library.get(name)
    thumbnail = await collection.thumbnail(id)
    etag = f'"{thumbnail.sha256[:32]}"'
    lasting = v is not None and v == thumbnail.sha256[:VERSION_LENGTH]
    headers = {
        "ETag": etag,
        "Cache-Control": "private, max-age=31536000, immutable" if lasting else "private, no-cache",
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(thumbnail.data, media_type="image/webp", headers=headers)


def thumbnail_url(collection: str, id: str, image_sha256: str | None) -> str | None:
    """The path of an item's picture, None for an item without one. It changes with the picture."""
    if image_sha256 is None:
        return None
    version = image_sha256[:VERSION_LENGTH]
    return f"/v1/collections/{collection}/thumbnails/{quote(id, safe='/')}?v={version}"


def parse_filter(text: str | None) -> dict[str, Any] | None:
    """A filter from a query or a form. Raises InvalidField unless it is a JSON object."""
    if text is None:
        return None
    found = json_field("filter", text)
    if not isinstance(found, dict):
        raise InvalidField(
            f"'filter' is {text[:60]}; a filter is a JSON object such as {{\"year\": 2024}}.", param="filter"
        )
    return found


def _render(collection: str, item: StoredItem, include: Sequence[str]) -> dict[str, Any]:
    rendered: dict[str, Any] = {"id": item.id, "kind": item.kind}
    if "metadata" in include:
        rendered["metadata"] = item.metadata
    rendered["thumbnail"] = thumbnail_url(collection, item.id, item.image_sha256)
    if item.vector is not None:
        rendered["vector"] = item.vector.tolist()
    return rendered
