"""`/v1/collections`: create, describe, drop."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field

from embedserve.api.bodies import RequestModel, read_json
from embedserve.api.failures import json_response
from embedserve.api.openapi import answers, body
from embedserve.api.services import services
from embedserve.collections import CollectionInfo
from embedserve.errors import Conflict, NotFound

__all__ = ["CollectionName", "router"]

router = APIRouter(tags=["collections"])

CollectionName = Annotated[
    str,
    Path(description="1 to 64 of a-z, 0-9, - and _, beginning with a letter or digit.", examples=["photos"]),
]


class CollectionBody(RequestModel):
    """What is left out stays as it is."""

    description: str | None = Field(None, max_length=10_000)
    metadata: dict[str, Any] | None = Field(None, description="Anything you want to remember about it.")
    dimensions: int | None = Field(
        None,
        ge=1,
        description="Keep so many leading numbers of each vector, renormalised; for a new collection.",
    )


class CollectionDescription(BaseModel):
    name: str
    description: str
    metadata: dict[str, Any]
    items: int | None = Field(description="null when the collection cannot be used; `problem` says why.")
    dim: int | None
    encoder: str | None
    fingerprint: str | None = Field(description="sha256 of what decides the encoder's vectors.")
    created: datetime | None
    bytes: int = Field(description="On disk: vectors, metadata, index and thumbnails.")
    index: dict[str, Any]
    problem: str | None


class CollectionList(BaseModel):
    collections: list[CollectionDescription]


@router.get(
    "/v1/collections",
    operation_id="listCollections",
    summary="All collections",
    response_model=CollectionList,
    responses=answers(),
)
async def list_collections(request: Request) -> Response:
    """Those that cannot be used, being another encoder's or damaged, are listed with their `problem`."""
    found = await services(request).library.list()
    return json_response({"collections": [_render(info) for info in found]})


@router.get(
    "/v1/collections/{name}",
    operation_id="getCollection",
    summary="One collection",
    response_model=CollectionDescription,
    responses=answers(NotFound),
)
async def get_collection(request: Request, name: CollectionName) -> Response:
    return json_response(_render(await services(request).library.describe(name)))


@router.put(
    "/v1/collections/{name}",
    operation_id="putCollection",
    summary="Create a collection, or change its description",
    response_model=CollectionDescription,
    responses=answers(Conflict, body=True)
    | {201: {"model": CollectionDescription, "description": "The collection is new."}},
    openapi_extra=body(
        CollectionBody, examples={"described": {"description": "Holiday photos"}}, optional=True
    ),
)
async def put_collection(request: Request, name: CollectionName) -> Response:
    """It belongs to the encoder served now. Without a body it is created as it is."""
    asked = CollectionBody()
    if await request.body():
        asked = await read_json(request, CollectionBody)
    info, new = await services(request).library.create(
        name, description=asked.description, metadata=asked.metadata, dimensions=asked.dimensions
    )
    return json_response(_render(info), 201 if new else 200)


@router.delete(
    "/v1/collections/{name}",
    operation_id="deleteCollection",
    summary="Drop a collection with all its items",
    status_code=204,
    responses=answers(NotFound, Conflict),
)
async def delete_collection(request: Request, name: CollectionName) -> Response:
    await services(request).library.drop(name)
    return Response(status_code=204)


def _render(info: CollectionInfo) -> dict[str, Any]:
    return asdict(info)
