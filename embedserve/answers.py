"""What the API answers, as types, and its errors as exceptions again. Used by `embedserve.client`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NotRequired, TypedDict

import httpx2

from embedserve import errors
from embedserve.errors import BadRequest, Busy, EmbedServeError

__all__ = [
    "Classified",
    "HeatMap",
    "Hit",
    "Item",
    "ItemPage",
    "JsonObject",
    "Search",
    "Upserted",
    "as_error",
    "body_of",
    "failure_of",
    "object_of",
    "retry_after",
    "upserted_of",
]

JsonObject = Mapping[str, Any]


class Item(TypedDict):
    """One item as stored."""

    id: str
    metadata: dict[str, Any]
    vector: NotRequired[list[float]]


class ItemPage(TypedDict):
    items: list[Item]
    next: str | None


class Hit(TypedDict):
    id: str
    score: float
    metadata: NotRequired[dict[str, Any]]
    thumbnail: NotRequired[str | None]
    vector: NotRequired[list[float]]


class Search(TypedDict):
    hits: list[Hit]
    took_ms: float


class Upserted(TypedDict):
    """`results` has one entry for each item sent, in order: {"id", "status": "ok"} or with "error"."""

    upserted: int
    failed: int
    results: list[dict[str, Any]]


class Classified(TypedDict):
    """`results` has one entry for each image, in order: {"labels": […]} or {"error": …}."""

    model: str
    results: list[dict[str, Any]]


class HeatMap(TypedDict):
    """`values` row by row: attention weights, or cosines with the text.

    `region`: the part of the image that they cover, {"left", "top", "width", "height"} in fractions of it.
    """

    model: str
    kind: Literal["attention", "similarity"]
    rows: int
    columns: int
    values: list[list[float]]
    low: float
    high: float
    region: dict[str, float]


_CLASSES = [
    cls
    for cls in (getattr(errors, name) for name in errors.__all__)
    if isinstance(cls, type) and issubclass(cls, EmbedServeError)
]
_BY_STATUS = {cls.status: cls for cls in _CLASSES if cls.status != EmbedServeError.status}
_BY_CODE = {cls.code: cls for cls in _CLASSES}


def as_error(body: JsonObject, status: int | None = None, wait: float | None = None) -> EmbedServeError:
    """The error that became `{"message", "type", "param", "code"}`.

    Without a status (an item's own error) the class follows the code, else the type.
    """
    code = body.get("code")
    message, param = str(body.get("message") or body), body.get("param")
    cls = _BY_CODE.get(str(code))
    if cls is None and status is not None:
        cls = _BY_STATUS.get(status, BadRequest if 400 <= status < 500 else EmbedServeError)
    if cls is None:
        cls = next((one for one in _CLASSES if one.type == body.get("type")), EmbedServeError)
    if cls is Busy:
        return Busy(message, param=param, retry_after=max(1, round(wait or 1)))
    return cls(message, param=param, code=code)


def body_of(response: httpx2.Response) -> JsonObject:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def failure_of(response: httpx2.Response) -> EmbedServeError:
    body = body_of(response).get("error")
    if not isinstance(body, Mapping):
        shown = response.text[:200].strip() or "nothing"
        body = {
            "message": f"'{response.request.url}' answered {response.status_code} with {shown!r}, which is "
            "not EmbedServe's form; is another program, or a proxy, listening there?"
        }
    return as_error(body, response.status_code, retry_after(response))


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds; None when the header is missing or a date, which our servers never send."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def object_of(response: httpx2.Response) -> dict[str, Any]:
    if response.status_code == 204:
        return {}
    body = body_of(response)
    if not body:
        raise failure_of(response)
    return dict(body)


def upserted_of(response: httpx2.Response) -> Upserted:
    body = object_of(response)
    results = list(body["results"])
    failed = sum(result["status"] != "ok" for result in results)
    return {"upserted": len(results) - failed, "failed": failed, "results": results}
