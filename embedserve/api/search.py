"""Questions to a collection: search, k-NN classification, near-duplicates."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from pydantic import BaseModel, Field

from embedserve.api.bodies import Form, RequestModel, body_kind, parse_model, read_form, read_json
from embedserve.api.collections import CollectionName
from embedserve.api.embed import answer_each, error_result
from embedserve.api.failures import json_response
from embedserve.api.inputs import Source, check_count, check_text, load_image, load_images, located
from embedserve.api.items import FilterText, parse_filter, thumbnail_url
from embedserve.api.openapi import BINARY, Failure, answers, body
from embedserve.api.services import Services, services, unless_gone
from embedserve.classify import TEMPERATURE, vote
from embedserve.collections import Collection, Hit, Neighbour, Part
from embedserve.errors import Conflict, EmbedServeError, InvalidField, NotFound

__all__ = ["router"]

router = APIRouter(tags=["search"])

Included = Literal["metadata", "vector"]

MAX_PARTS = 32
"""Parts of one weighted query."""


def _metadata() -> list[Included]:
    return ["metadata"]


class QueryPart(RequestModel):
    """Exactly one of `image`, `text`, `id` and `vector`."""

    image: str | None = Field(None, description="Base64, a data URI or an http(s) URL.")
    text: str | None = None
    id: str | None = Field(None, description="An item of the collection; it is left out of the hits.")
    vector: list[float] | None = None
    weight: float = Field(1.0, description='Negative weights push away: "like this, but not red".')


class SearchOptions(RequestModel):
    """All of a search but what is searched for."""

    k: int = Field(10, ge=1, description="So many hits, unless fewer items match.")
    filter: dict[str, Any] | None = Field(
        None, description="On metadata: equality, $gt, $in, $exists, $and, $or, $not, …"
    )
    min_score: float | None = Field(None, description="Leave out hits less alike than this (cosine).")
    diversity: float = Field(
        0.0, ge=0, le=1, description="0: the most alike; towards 1: hits differ more (MMR)."
    )
    group_by: str | None = Field(
        None, description="A metadata field: only the best hit of each of its values."
    )
    include: list[Included] = Field(default_factory=_metadata)


class SearchBody(SearchOptions):
    """Exactly one of `image`, `text`, `id`, `vector` and `query`."""

    image: str | None = Field(None, description="Base64, a data URI or an http(s) URL.")
    text: str | None = None
    id: str | None = Field(None, description="An item of the collection; it is left out of the hits.")
    vector: list[float] | None = None
    query: list[QueryPart] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PARTS,
        description="A weighted mix of images, texts, ids and vectors.",
    )


class HitDescription(BaseModel):
    id: str
    score: float = Field(description="Cosine similarity, -1 to 1; higher is more alike.")
    kind: Literal["image", "text", "vector"]
    metadata: dict[str, Any] | None = None
    thumbnail: str | None = Field(description="Path of its picture; null without one.")
    vector: list[float] | None = None


class SearchAnswer(BaseModel):
    """Best first; with `diversity`, in the order of selection."""

    hits: list[HitDescription]
    took_ms: float = Field(description="Milliseconds in the server, the encoder included.")


class VoteOptions(RequestModel):
    field: str = Field(min_length=1, description="The metadata field that holds the labels.")
    k: int = Field(20, ge=1, description="So many neighbours vote.")
    temperature: float = Field(
        TEMPERATURE, gt=0, allow_inf_nan=False, description="Weights are exp(cosine / temperature)."
    )
    top: int | None = Field(5, ge=1, description="So many labels for each image; null for all.")
    filter: dict[str, Any] | None = Field(None, description="Which items may vote.")


class VoteBody(VoteOptions):
    """One of `images` and `ids`, or both; images come first in the results."""

    images: list[str] = Field([], description="Base64, data URIs or http(s) URLs.")
    ids: list[str] = Field([], description="Items of the collection; each is left out of its own vote.")


class VotedLabel(BaseModel):
    label: str | int | float | bool
    probability: float
    neighbours: int = Field(description="How many of the neighbours have it.")


class NeighbourDescription(BaseModel):
    id: str
    score: float
    labels: list[str | int | float | bool]


class VoteResult(BaseModel):
    """`labels` and the `nearest` who voted, or `error`. No labels: no item has the field."""

    index: int
    labels: list[VotedLabel] | None = None
    nearest: list[NeighbourDescription] | None = None
    error: Failure | None = None


class VoteAnswer(BaseModel):
    model: str
    results: list[VoteResult]


class DuplicateGroupDescription(BaseModel):
    ids: list[str]
    similarity: float = Field(description="Each member has another one at least this alike.")


class DuplicatesAnswer(BaseModel):
    """The largest groups first, then the most alike."""

    groups: list[DuplicateGroupDescription]
    total_groups: int
    total_items: int = Field(description="Items in all groups, those beyond `limit` included.")
    scanned: int = Field(description="Items compared.")


@router.post(
    "/v1/collections/{name}/search",
    operation_id="search",
    summary="The items most like an image, a text, an item, a vector, or a mix",
    response_model=SearchAnswer,
    responses=answers(NotFound, Conflict, body=True, embeds=True),
    openapi_extra=body(
        SearchBody,
        form={
            "image": dict(BINARY),
            "text": {"type": "string"},
            "id": {"type": "string"},
            "k": {"type": "integer", "minimum": 1},
            "filter": {"type": "string", "description": "JSON."},
            "min_score": {"type": "number"},
            "diversity": {"type": "number", "minimum": 0, "maximum": 1},
            "group_by": {"type": "string"},
            "include": {"type": "string", "description": "JSON: a list of `metadata` and `vector`."},
        },
        examples={
            "text": {"text": "red fruit", "k": 5},
            "more like this, but not red": {
                "query": [{"id": "apple.jpg"}, {"text": "red", "weight": -0.5}],
                "filter": {"year": {"$gte": 2020}},
                "diversity": 0.3,
            },
        },
    ),
)
async def search(request: Request, name: CollectionName) -> Response:
    started = time.perf_counter()
    parts = services(request)
    collection = await parts.library.get(name)
    if body_kind(request, "json", "form") == "json":
        asked = await read_json(request, SearchBody)
        image: str | bytes | None = asked.image
    else:
        form = await read_form(request, parts.limits)
        asked, image = _from_form(form)
    _check_k(asked.k, parts)
    hits = await unless_gone(request, _search(parts, collection, asked, image))
    rendered = [_render(name, hit, asked.include) for hit in hits]
    took = round(1000 * (time.perf_counter() - started), 3)
    return json_response({"hits": rendered, "took_ms": took})


def _from_form(form: Form) -> tuple[SearchBody, str | bytes | None]:
    form.only(
        ["image", "file", *(name for name in SearchBody.model_fields if name not in ("vector", "query"))]
    )
    images = form.all("image", "file")
    if len(images) > 1:
        raise InvalidField(
            "'image' is given twice; a form searches by one image. Send JSON with a 'query' for a mix.",
            param="image",
        )
    fields = form.fields(json=["filter", "include"], skip=["image", "file"])
    return parse_model(SearchBody, fields, lax=True), images[0].value if images else None


def _check_k(k: int, parts: Services) -> None:
    if k > parts.limits.max_k:
        raise InvalidField(
            f"'k' is {k}; at most {parts.limits.max_k} neighbours can be asked for. "
            "Ask for fewer, or raise --max-k.",
            param="k",
        )


async def _search(
    parts: Services, collection: Collection, asked: SearchBody, image: str | bytes | None
) -> list[Hit]:
    return await collection.search(
        await _query(parts, asked, image),
        k=asked.k,
        filter=asked.filter,
        min_score=asked.min_score,
        diversity=asked.diversity,
        group_by=asked.group_by,
        vectors="vector" in asked.include,
    )


async def _query(parts: Services, asked: SearchBody, image: str | bytes | None) -> list[Part]:
    """What is searched for, images loaded. Raises InvalidField unless it is said in exactly one way."""
    ways = {"image": image, "text": asked.text, "id": asked.id, "vector": asked.vector, "query": asked.query}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(f"'{way}'" for way in given) or "none"
        raise InvalidField(
            f"Give exactly one of 'image', 'text', 'id', 'vector' and 'query'; there is {found}. "
            "A 'query' mixes several.",
            param=given[1] if given else "query",
        )
    if asked.query is None:
        return [await _part(parts, asked, image, "")]
    return [
        await _part(parts, part, part.image, f"query[{i}].", weight=part.weight)
        for i, part in enumerate(asked.query)
    ]


async def _part(
    parts: Services,
    asked: SearchBody | QueryPart,
    image: str | bytes | None,
    place: str,
    *,
    weight: float = 1.0,
) -> Part:
    """One part with its image loaded; `place` is the beginning of its errors' `param`."""
    ways = {"image": image, "text": asked.text, "id": asked.id, "vector": asked.vector}
    given = [way for way, value in ways.items() if value is not None]
    if len(given) != 1:
        found = " and ".join(f"'{way}'" for way in given) or "none of them"
        raise InvalidField(
            f"'{place[:-1]}' has {found}; give exactly one of 'image', 'text', 'id' and 'vector'.",
            param=place[:-1],
        )
    field = "image"
    try:
        data = await load_image(parts, image) if image is not None else None
        field = "text"
        if asked.text is not None:
            check_text(asked.text, parts.limits)
    except EmbedServeError as error:
        raise located(error, place + field) from None
    return Part(image=data, text=asked.text, id=asked.id, vector=asked.vector, weight=weight)


def _render(collection: str, hit: Hit, include: Sequence[str]) -> dict[str, Any]:
    rendered: dict[str, Any] = {"id": hit.id, "score": hit.score, "kind": hit.kind}
    if "metadata" in include:
        rendered["metadata"] = hit.metadata
    rendered["thumbnail"] = thumbnail_url(collection, hit.id, hit.image_sha256)
    if hit.vector is not None:
        rendered["vector"] = hit.vector.tolist()
    return rendered


@router.post(
    "/v1/collections/{name}/classify",
    operation_id="classifyByNeighbours",
    summary="Label images by the vote of their nearest items",
    response_model=VoteAnswer,
    responses=answers(NotFound, Conflict, body=True, embeds=True),
    openapi_extra=body(
        VoteBody,
        form={
            "image": {"type": "array", "items": BINARY},
            "field": {"type": "string"},
            "k": {"type": "integer", "minimum": 1},
            "temperature": {"type": "number", "exclusiveMinimum": 0},
            "top": {"type": "integer", "minimum": 1},
            "filter": {"type": "string", "description": "JSON."},
        },
        required=("image", "field"),
        examples={"an image": {"images": ["https://example.com/pet.jpg"], "field": "species", "k": 20}},
    ),
)
async def classify_by_neighbours(request: Request, name: CollectionName) -> Response:
    """For encoders without a text tower, and for labels that are hard to put in words.

    The k nearest items that have the metadata field vote for its value with weight exp(cosine / temperature)
    (Wu et al. 2018). 200 when any image could be classified, else the status of the first one's error.
    """
    parts = services(request)
    collection = await parts.library.get(name)
    ids: list[str] = []
    if body_kind(request, "json", "form") == "json":
        asked = await read_json(request, VoteBody)
        options: VoteOptions = asked
        sources = [Source.image(image, f"images[{i}]") for i, image in enumerate(asked.images)]
        ids = asked.ids
    else:
        form = await read_form(request, parts.limits)
        form.only(["image", "file", *VoteOptions.model_fields])
        options = parse_model(VoteOptions, form.fields(json=["filter"], skip=["image", "file"]), lax=True)
        sources = [
            Source.image(part.value, f"image[{i}]") for i, part in enumerate(form.all("image", "file"))
        ]
    check_count(len(sources) + len(ids), parts.limits, "images", what="images or ids")
    _check_k(options.k, parts)
    found = await unless_gone(request, _neighbours(parts, collection, options, sources, ids))
    rendered = [
        error_result(index, result)
        if isinstance(result, EmbedServeError)
        else {"index": index, **_voted(result, options)}
        for index, result in enumerate(found)
    ]
    return answer_each(found, rendered, {"model": parts.towers.encoder.name})


async def _neighbours(
    parts: Services,
    collection: Collection,
    options: VoteOptions,
    sources: Sequence[Source],
    ids: Sequence[str],
) -> list[list[Neighbour] | EmbedServeError]:
    loaded = await load_images(parts, sources)
    queries = [Part(image=data) for data in loaded if isinstance(data, bytes)] + [Part(id=one) for one in ids]
    places = [source.param for source, data in zip(sources, loaded, strict=True) if isinstance(data, bytes)]
    places += [f"ids[{i}]" for i in range(len(ids))]
    answers = (
        await collection.neighbours(queries, options.field, k=options.k, filter=options.filter)
        if queries
        else []
    )
    found = iter(
        _moved(result, place) if isinstance(result, EmbedServeError) else result
        for result, place in zip(answers, places, strict=True)
    )
    results = [data if isinstance(data, EmbedServeError) else next(found) for data in loaded] + list(found)
    parts.metrics.count_bad_images(results[: len(sources)])
    return results


def _moved(error: EmbedServeError, place: str) -> EmbedServeError:
    moved = located(error, place)
    moved.param = place  # instead of the field within one query
    return moved


def _voted(neighbours: Sequence[Neighbour], options: VoteOptions) -> Mapping[str, Any]:
    votes = vote(neighbours, temperature=options.temperature)
    return {
        "labels": [asdict(each) for each in votes[: options.top]],
        "nearest": [asdict(n) for n in neighbours],
    }


@router.get(
    "/v1/collections/{name}/duplicates",
    operation_id="duplicates",
    summary="Groups of items that are nearly the same",
    response_model=DuplicatesAnswer,
    responses=answers(NotFound, Conflict),
)
async def duplicates(
    request: Request,
    name: CollectionName,
    threshold: Annotated[
        float, Query(ge=0.5, le=1, description="Cosine from which two are near-duplicates.")
    ] = 0.95,
    limit: Annotated[int, Query(ge=1, description="Groups to send.")] = 100,
    filter: FilterText = None,
) -> Response:
    collection = await services(request).library.get(name)
    work = collection.duplicates(threshold=threshold, limit=limit, filter=parse_filter(filter))
    return json_response(asdict(await unless_gone(request, work)))
