"""`/v1/collections/{name}/items` and their thumbnails: page, read, delete."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, Field

from embedserve.api.bodies import json_field
from embedserve.api.collections import CollectionName
from embedserve.api.failures import json_response
from embedserve.api.openapi import BINARY, answers
from embedserve.api.services import services
from embedserve.collections import StoredItem
from embedserve.errors import Conflict, InvalidField, NotFound

__all__ = ["FilterText", "parse_filter", "router", "thumbnail_url"]

router = APIRouter(tags=["items"])

MAX_PAGE = 1000
VERSION_LENGTH = 16
"""Hex digits of the image's sha256 in a thumbnail's path."""

ItemId = Annotated[
    str, Path(description="Any text; slashes may be written as they are.", examples=["holiday/beach.jpg"])
]
Include = Annotated[
    list[Literal["metadata", "vector"]],
    Query(description="What to send of each item; repeatable.", examples=[["metadata", "vector"]]),
]
FilterText = Annotated[
    str | None, Query(description="A filter as JSON.", examples=['{"year": {"$gte": 2020}}'])
]


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
    *,
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
    responses=answers(NotFound, Conflict)
    | {
        200: {
            "content": {"image/webp": {"schema": dict(BINARY)}},
            "description": "At most 256 pixels wide or high.",
        },
        304: {"description": "The picture that `If-None-Match` names is still the item's."},
    },
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
