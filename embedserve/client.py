"""The Python client: every route of the API as one typed coroutine.

    async with Client("http://127.0.0.1:8000") as client:
        answer = await client.search("photos", text="red fruit", k=5)

`Client.local(config)` answers the same calls without a server: the app runs inside this process, lifespan
and all. Errors come back as the classes of `embedserve.errors`, each with the server's own message.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import mimetypes
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, cast
from urllib.parse import quote, urlsplit

import httpx2
import numpy as np
from numpy.typing import NDArray

from embedserve.answers import (
    Classified,
    Item,
    ItemPage,
    JsonObject,
    Search,
    Upserted,
    as_error,
    body_of,
    failure_of,
    object_of,
    retry_after,
    upserted_of,
)
from embedserve.config import ServeConfig
from embedserve.errors import BadRequest, Busy, EmbedServeError, NotReady

__all__ = ["Client", "ImageInput", "Upload"]

ImageInput = Path | bytes | str
"""A file, an encoded image's bytes, or a string: http(s) URL, data URI or base64."""

Vector = NDArray[np.float32]

IDS_IN_URL = 20
"""An id has at most 1 kB; servers and proxies take URLs of some 8 to 64 kB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """One picture on its way into a collection, perhaps with a text that helps to find it."""

    id: str
    image: bytes = field(repr=False)
    text: str | None = None
    """Its caption: embedded with the picture, not stored; put it into `metadata` to have it back."""
    text_weight: float | None = None
    """0 to 10: what the caption counts beside the picture's 1; None takes the server's 0.5."""
    metadata: JsonObject = field(default_factory=dict)


class Client:
    """Talks to one server. An async context manager; safe for many tasks at once.

    Args:
        url: Where the server listens.
        api_key: Sent as a bearer token.
        timeout: Seconds without a byte before a request is given up.
        patience: Seconds to keep trying in all while the server answers 429 or 503, as it asks (Retry-After).

    Raises BadRequest for a URL that is none; every call raises NotReady when no server answers there.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        patience: float = 30.0,
    ) -> None:
        self.url = _checked(url)
        self.patience = patience
        self._api_key = api_key
        self._timeout = timeout
        self._config: ServeConfig | None = None
        self._stack = AsyncExitStack()
        self._http: httpx2.AsyncClient | None = None

    @classmethod
    def local(cls, config: ServeConfig) -> Client:
        """A client whose server is this process: no port, no key, the same answers."""
        client = cls("http://localhost")
        client._config = dataclasses.replace(config, host="127.0.0.1", api_key=())
        return client

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            transport = None if self._config is None else await _in_process(self._config, stack)
            http = httpx2.AsyncClient(
                base_url=self.url,
                timeout=self._timeout,
                transport=transport,
                headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else None,
            )
            self._http = await stack.enter_async_context(http)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http = None
        await self._stack.aclose()

    # ---- health and models -----------------------------------------------------------------------

    async def ready(self) -> JsonObject:
        """What /readyz says. Raises NotReady at once, without trying again."""
        return object_of(await self._request("GET", "/readyz", patience=0.0))

    async def models(self) -> JsonObject:
        """`{"object": "list", "data": [{"id", …}]}`."""
        return object_of(await self._request("GET", "/v1/models"))

    # ---- vectors and labels ----------------------------------------------------------------------

    async def embed(self, inputs: Sequence[ImageInput | JsonObject]) -> list[Vector | EmbedServeError]:
        """The unit vectors, float32 (dim,), of images and texts in the order given.

        A text is `{"text": "…"}`, an image is `{"image": …}` or an `ImageInput`. An input that fails has its
        error at its place.
        """
        body = {"inputs": [_embed_input(one) for one in inputs], "encoding_format": "base64"}
        answer = object_of(await self._request("POST", "/v1/embed", json=body, partial=True))
        return [
            as_error(result["error"])
            if "error" in result
            else np.frombuffer(base64.b64decode(result["embedding"]), "<f4").astype(np.float32)
            for result in answer["results"]
        ]

    async def classify(
        self,
        images: Sequence[ImageInput],
        *,
        labels: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        label_set: str | None = None,
        templates: Sequence[str] | None = None,
        top: int | None = None,
        activation: Literal["softmax", "sigmoid"] | None = None,
    ) -> Classified:
        """Zero-shot probabilities of the labels (or of those of a saved label set) for each image."""
        body = _given(labels=labels, label_set=label_set, templates=templates, top=top, activation=activation)
        body["images"] = [_image(one) for one in images]
        response = await self._request("POST", "/v1/classify", json=body, partial=True)
        return cast(Classified, object_of(response))

    async def label_sets(self) -> JsonObject:
        return object_of(await self._request("GET", "/v1/labelsets"))

    async def label_set(self, name: str) -> JsonObject:
        return object_of(await self._request("GET", f"/v1/labelsets/{_segment(name)}"))

    async def save_label_set(self, name: str, body: JsonObject) -> JsonObject:
        """Saves `{"labels": …, "templates": …}` under `name`."""
        return object_of(await self._request("PUT", f"/v1/labelsets/{_segment(name)}", json=body))

    async def delete_label_set(self, name: str) -> None:
        await self._request("DELETE", f"/v1/labelsets/{_segment(name)}")

    # ---- collections -----------------------------------------------------------------------------

    async def collections(self) -> list[dict[str, Any]]:
        """All collections, each as `collection` describes it."""
        answer = object_of(await self._request("GET", "/v1/collections"))
        return list(answer["collections"])

    async def collection(self, name: str) -> JsonObject:
        return object_of(await self._request("GET", f"/v1/collections/{_segment(name)}"))

    async def create_collection(
        self,
        name: str,
        *,
        description: str | None = None,
        metadata: JsonObject | None = None,
        dimensions: int | None = None,
    ) -> JsonObject:
        """Makes the collection, or updates what is given of one that is there.

        `dimensions`: a new one keeps so many leading numbers of each vector.
        """
        body = _given(description=description, metadata=metadata, dimensions=dimensions)
        return object_of(await self._request("PUT", f"/v1/collections/{_segment(name)}", json=body))

    async def drop_collection(self, name: str) -> None:
        await self._request("DELETE", f"/v1/collections/{_segment(name)}")

    # ---- items -----------------------------------------------------------------------------------

    async def upload(self, collection: str, uploads: Sequence[Upload]) -> Upserted:
        """Writes pictures; the answer has one result for each, in order. What succeeded is durable."""
        files = [("file", (_ascii(one.id), one.image, _media_type(one.id))) for one in uploads]
        about = [
            _given(id=one.id, text=one.text, text_weight=one.text_weight, metadata=one.metadata)
            for one in uploads
        ]
        response = await self._request(
            "POST",
            f"/v1/collections/{_segment(collection)}/items",
            files=[*files, ("items", (None, json.dumps(about), "application/json"))],
            partial=True,
        )
        return upserted_of(response)

    async def upsert(self, collection: str, items: Sequence[JsonObject]) -> Upserted:
        """Writes items of any kind: {"id", "image" | "text" | "vector", "metadata"}.

        An image may have a "text" as its caption, and the "text_weight" of that.
        """
        body = {"items": [_part(one) for one in items]}
        response = await self._request(
            "POST", f"/v1/collections/{_segment(collection)}/items", json=body, partial=True
        )
        return upserted_of(response)

    async def items(
        self,
        collection: str,
        *,
        limit: int = 100,
        after: str | None = None,
        filter: JsonObject | None = None,
    ) -> ItemPage:
        """One page of items, in id order; `next` is the `after` of the following page."""
        params = _given(limit=limit, after=after, filter=json.dumps(filter) if filter is not None else None)
        response = await self._request("GET", f"/v1/collections/{_segment(collection)}/items", params=params)
        return cast(ItemPage, object_of(response))

    async def all_items(
        self, collection: str, *, filter: JsonObject | None = None, page: int = 1000
    ) -> AsyncIterator[Item]:
        """All items, in id order, read in pages."""
        after: str | None = None
        while True:
            answer = await self.items(collection, limit=page, after=after, filter=filter)
            for item in answer["items"]:
                yield item
            after = answer["next"]
            if after is None:
                return

    async def item(self, collection: str, id: str) -> JsonObject:
        return object_of(await self._request("GET", _item_path(collection, "items", id)))

    async def delete_item(self, collection: str, id: str) -> None:
        await self._request("DELETE", _item_path(collection, "items", id))

    async def delete_items(
        self, collection: str, ids: Sequence[str] | None = None, *, filter: JsonObject | None = None
    ) -> int:
        """Deletes by ids, or all items that match, and returns how many went. Unknown ids do not count."""
        path = f"/v1/collections/{_segment(collection)}/items"
        if filter is not None:
            params = {"filter": json.dumps(filter)}
            return int(object_of(await self._request("DELETE", path, params=params))["deleted"])
        deleted = 0
        for start in range(0, len(ids or ()), IDS_IN_URL):
            part = {"id": list(ids or ())[start : start + IDS_IN_URL]}
            deleted += int(object_of(await self._request("DELETE", path, params=part))["deleted"])
        return deleted

    async def thumbnail(self, collection: str, id: str) -> bytes:
        """The item's picture as WebP."""
        return (await self._request("GET", _item_path(collection, "thumbnails", id))).content

    async def search(
        self,
        collection: str,
        *,
        image: ImageInput | None = None,
        text: str | None = None,
        id: str | None = None,
        vector: Sequence[float] | None = None,
        query: Sequence[JsonObject] | None = None,
        k: int = 10,
        filter: JsonObject | None = None,
        min_score: float | None = None,
        diversity: float | None = None,
        group_by: str | None = None,
        include: Sequence[str] | None = None,
    ) -> Search:
        """The `k` items most like one image, text, id or vector, or a weighted `query` of several."""
        body = _given(
            image=None if image is None else _image(image),
            text=text,
            id=id,
            vector=vector,
            query=None if query is None else [_part(one) for one in query],
            k=k,
            filter=filter,
            min_score=min_score,
            diversity=diversity,
            group_by=group_by,
            include=include,
        )
        response = await self._request("POST", f"/v1/collections/{_segment(collection)}/search", json=body)
        return cast(Search, object_of(response))

    async def vote(
        self,
        collection: str,
        field: str,
        *,
        images: Sequence[ImageInput] = (),
        ids: Sequence[str] = (),
        k: int | None = None,
        filter: JsonObject | None = None,
    ) -> Classified:
        """k-NN labels for images, then for items: their neighbours vote with the metadata `field`."""
        body = _given(field=field, ids=list(ids), k=k, filter=filter)
        body["images"] = [_image(one) for one in images]
        path = f"/v1/collections/{_segment(collection)}/classify"
        return cast(Classified, object_of(await self._request("POST", path, json=body, partial=True)))

    async def duplicates(
        self, collection: str, *, threshold: float | None = None, limit: int | None = None
    ) -> JsonObject:
        """Groups of items that are nearly the same."""
        params = _given(threshold=threshold, limit=limit)
        return object_of(
            await self._request("GET", f"/v1/collections/{_segment(collection)}/duplicates", params=params)
        )

    # ---- the wire --------------------------------------------------------------------------------

    async def _request(
        self,
        method: str,
        path: str,
        *,
        json: object = None,
        params: JsonObject | None = None,
        files: Sequence[tuple[str, Any]] | None = None,
        partial: bool = False,
        patience: float | None = None,
    ) -> httpx2.Response:
        """One call, repeated while the server is busy. `partial`: a failure with results is an answer."""
        if self._http is None:
            raise RuntimeError("use the client inside `async with Client(...) as client:`")
        left = self.patience if patience is None else patience
        delay = 0.25
        while True:
            try:
                response = await self._http.request(method, path, json=json, params=params, files=files)
            except httpx2.HTTPError as error:
                raise self._unreachable(error) from error
            if response.is_success or (partial and "results" in body_of(response)):
                return response
            failure = failure_of(response)
            if not isinstance(failure, Busy | NotReady) or left <= 0:
                raise failure
            wait = min(left, retry_after(response) or delay * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
            await asyncio.sleep(wait)
            left -= wait
            delay = min(2 * delay, 5.0)

    def _unreachable(self, error: httpx2.HTTPError) -> NotReady:
        if isinstance(error, httpx2.TimeoutException):
            return NotReady(
                f"'{self.url}' did not answer within {self._timeout:g} s; send fewer inputs at a time.",
                code="timeout",
            )
        return NotReady(
            f"No server answers at '{self.url}' ({error or type(error).__name__}). "
            "Start one with `embedserve serve`, or check the URL.",
            code="no_server",
        )


# ---- requests ----------------------------------------------------------------------------------------


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 80)
    except ValueError:
        good = False
    if not good:
        raise BadRequest(f"'{url}' is not a server's URL; use http://HOST:PORT, as in http://127.0.0.1:8000.")
    return url.rstrip("/")


def _given(**fields: object) -> dict[str, Any]:
    """The fields that are not None: what is left out takes the server's default."""
    return {name: value for name, value in fields.items() if value is not None}


def _segment(name: str) -> str:
    return quote(name, safe="")


def _item_path(collection: str, what: str, id: str) -> str:
    return f"/v1/collections/{_segment(collection)}/{what}/{quote(id, safe='/')}"


def _image(image: ImageInput) -> str:
    if isinstance(image, Path):
        try:
            image = image.read_bytes()
        except OSError as error:
            raise BadRequest(f"'{error.filename}' cannot be read: {error.strerror}.", param="image") from None
    if isinstance(image, bytes):
        return base64.b64encode(image).decode("ascii")
    return image


def _embed_input(one: ImageInput | JsonObject) -> JsonObject:
    if isinstance(one, Mapping):
        return _part(one)
    return {"image": _image(one)}


def _part(one: JsonObject) -> JsonObject:
    return {**one, "image": _image(one["image"])} if "image" in one else one


def _media_type(name: str) -> str:
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def _ascii(name: str) -> str:
    """A file name for a multipart header; the id itself travels in the part `items`."""
    return quote(name.rpartition("/")[2], safe=" ") or "image"


# ---- the server in this process ----------------------------------------------------------------------


async def _in_process(config: ServeConfig, stack: AsyncExitStack) -> httpx2.ASGITransport:
    from embedserve.app import create_app

    app = create_app(config)
    await stack.enter_async_context(app.router.lifespan_context(app))
    return httpx2.ASGITransport(app, raise_app_exceptions=False)
