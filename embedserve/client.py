"""The Python client: every route of the API as one typed coroutine.

    async with Client("http://127.0.0.1:8000") as client:
        answer = await client.search("photos", text="red fruit", k=5)

`Client.local(config)` answers the same calls without a server: the app runs inside this process, lifespan
and all. Errors come back as the classes of `embedserve.errors`, each with the server's own message.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from embedserve.answers import (
    Classified,
    HeatMap,
    Item,
    ItemPage,
    JsonObject,
    Search,
    Upserted,
    as_error,
    object_of,
    upserted_of,
)
from embedserve.config import ServeConfig
from embedserve.errors import EmbedServeError
from embedserve.sending import (
    ImageInput,
    ascii_name,
    embed_input,
    given,
    image_text,
    item_path,
    media_type,
    part,
    segment,
)
from embedserve.wire import Wire

__all__ = ["Client", "ImageInput", "Upload"]

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
        self._wire = Wire(url, api_key=api_key, timeout=timeout, patience=patience)

    @classmethod
    def local(cls, config: ServeConfig) -> Client:
        """A client whose server is this process: no port, no key, the same answers."""
        client = cls("http://localhost")
        client._wire.config = dataclasses.replace(config, host="127.0.0.1", api_key=())
        return client

    @property
    def url(self) -> str:
        return self._wire.url

    async def __aenter__(self) -> Self:
        await self._wire.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._wire.__aexit__(kind, error, traceback)

    # ---- health and models -----------------------------------------------------------------------

    async def ready(self) -> JsonObject:
        """What /readyz says. Raises NotReady at once, without trying again."""
        return object_of(await self._wire.request("GET", "/readyz", patience=0.0))

    async def models(self) -> JsonObject:
        """`{"object": "list", "data": [{"id", …}]}`."""
        return object_of(await self._wire.request("GET", "/v1/models"))

    # ---- vectors and labels ----------------------------------------------------------------------

    async def embed(self, inputs: Sequence[ImageInput | JsonObject]) -> list[Vector | EmbedServeError]:
        """The unit vectors, float32 (dim,), of images and texts in the order given.

        A text is `{"text": "…"}`, an image is `{"image": …}` or an `ImageInput`. An input that fails has its
        error at its place.
        """
        body = {"inputs": [embed_input(one) for one in inputs], "encoding_format": "base64"}
        answer = object_of(await self._wire.request("POST", "/v1/embed", json=body, partial=True))
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
        body = given(labels=labels, label_set=label_set, templates=templates, top=top, activation=activation)
        body["images"] = [image_text(one) for one in images]
        response = await self._wire.request("POST", "/v1/classify", json=body, partial=True)
        return cast(Classified, object_of(response))

    async def label_sets(self) -> JsonObject:
        return object_of(await self._wire.request("GET", "/v1/labelsets"))

    async def label_set(self, name: str) -> JsonObject:
        return object_of(await self._wire.request("GET", f"/v1/labelsets/{segment(name)}"))

    async def save_label_set(self, name: str, body: JsonObject) -> JsonObject:
        """Saves `{"labels": …, "templates": …}`, or a linear classifier, under `name`."""
        return object_of(await self._wire.request("PUT", f"/v1/labelsets/{segment(name)}", json=body))

    async def delete_label_set(self, name: str) -> None:
        await self._wire.request("DELETE", f"/v1/labelsets/{segment(name)}")

    # ---- heat maps -------------------------------------------------------------------------------

    async def heatmap(
        self, image: ImageInput, *, text: str | None = None, head: int | None = None
    ) -> HeatMap:
        """Which parts of an image its vector comes from, or are like a text.

        Args:
            text: Compare each part with this; None takes the attention behind the vector.
            head: One attention head; None takes the mean of all.

        Raises UnsupportedMedia for an image that cannot be read, and InvalidField where the encoder does not
        offer what is asked for.
        """
        body = given(image=image_text(image), text=text, head=head)
        return cast(HeatMap, object_of(await self._wire.request("POST", "/v1/heatmap", json=body)))

    async def heatmap_picture(
        self, image: ImageInput, *, text: str | None = None, head: int | None = None
    ) -> bytes:
        """The same as a PNG: what the encoder saw, in grey, coloured by the map."""
        body = given(image=image_text(image), text=text, head=head, format="png")
        return (await self._wire.request("POST", "/v1/heatmap", json=body)).content

    # ---- collections -----------------------------------------------------------------------------

    async def collections(self) -> list[dict[str, Any]]:
        """All collections, each as `collection` describes it."""
        answer = object_of(await self._wire.request("GET", "/v1/collections"))
        return list(answer["collections"])

    async def collection(self, name: str) -> JsonObject:
        return object_of(await self._wire.request("GET", f"/v1/collections/{segment(name)}"))

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
        body = given(description=description, metadata=metadata, dimensions=dimensions)
        return object_of(await self._wire.request("PUT", f"/v1/collections/{segment(name)}", json=body))

    async def drop_collection(self, name: str) -> None:
        await self._wire.request("DELETE", f"/v1/collections/{segment(name)}")

    # ---- items -----------------------------------------------------------------------------------

    async def upload(self, collection: str, uploads: Sequence[Upload]) -> Upserted:
        """Writes pictures; the answer has one result for each, in order. What succeeded is durable."""
        files = [("file", (ascii_name(one.id), one.image, media_type(one.id))) for one in uploads]
        about = [
            given(id=one.id, text=one.text, text_weight=one.text_weight, metadata=one.metadata)
            for one in uploads
        ]
        response = await self._wire.request(
            "POST",
            f"/v1/collections/{segment(collection)}/items",
            files=[*files, ("items", (None, json.dumps(about), "application/json"))],
            partial=True,
        )
        return upserted_of(response)

    async def upsert(self, collection: str, items: Sequence[JsonObject]) -> Upserted:
        """Writes items of any kind: {"id", "image" | "text" | "vector", "metadata"}.

        An image may have a "text" as its caption, and the "text_weight" of that.
        """
        body = {"items": [part(one) for one in items]}
        response = await self._wire.request(
            "POST", f"/v1/collections/{segment(collection)}/items", json=body, partial=True
        )
        return upserted_of(response)

    async def items(
        self,
        collection: str,
        *,
        limit: int = 100,
        after: str | None = None,
        filter: JsonObject | None = None,
        include: Sequence[str] | None = None,
    ) -> ItemPage:
        """One page of items, in id order; `next` is the `after` of the following page.

        `include`: "metadata", "vector" or both; the metadata when left out.
        """
        params = given(
            limit=limit,
            after=after,
            filter=json.dumps(filter) if filter is not None else None,
            include=None if include is None else list(include),
        )
        response = await self._wire.request(
            "GET", f"/v1/collections/{segment(collection)}/items", params=params
        )
        return cast(ItemPage, object_of(response))

    async def all_items(
        self,
        collection: str,
        *,
        filter: JsonObject | None = None,
        include: Sequence[str] | None = None,
        page: int = 1000,
    ) -> AsyncIterator[Item]:
        """All items, in id order, read in pages."""
        after: str | None = None
        while True:
            answer = await self.items(collection, limit=page, after=after, filter=filter, include=include)
            for item in answer["items"]:
                yield item
            after = answer["next"]
            if after is None:
                return

    async def item(self, collection: str, id: str) -> JsonObject:
        return object_of(await self._wire.request("GET", item_path(collection, "items", id)))

    async def delete_item(self, collection: str, id: str) -> None:
        await self._wire.request("DELETE", item_path(collection, "items", id))

    async def delete_items(
        self, collection: str, ids: Sequence[str] | None = None, *, filter: JsonObject | None = None
    ) -> int:
        """Deletes by ids, or all items that match, and returns how many went. Unknown ids do not count."""
        path = f"/v1/collections/{segment(collection)}/items"
        if filter is not None:
            params = {"filter": json.dumps(filter)}
            return int(object_of(await self._wire.request("DELETE", path, params=params))["deleted"])
        deleted = 0
        for start in range(0, len(ids or ()), IDS_IN_URL):
            some = {"id": list(ids or ())[start : start + IDS_IN_URL]}
            deleted += int(object_of(await self._wire.request("DELETE", path, params=some))["deleted"])
        return deleted

    async def thumbnail(self, collection: str, id: str) -> bytes:
        """The item's picture as WebP."""
        return (await self._wire.request("GET", item_path(collection, "thumbnails", id))).content

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
        body = given(
            image=None if image is None else image_text(image),
            text=text,
            id=id,
            vector=vector,
            query=None if query is None else [part(one) for one in query],
            k=k,
            filter=filter,
            min_score=min_score,
            diversity=diversity,
            group_by=group_by,
            include=include,
        )
        response = await self._wire.request(
            "POST", f"/v1/collections/{segment(collection)}/search", json=body
        )
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
        body = given(field=field, ids=list(ids), k=k, filter=filter)
        body["images"] = [image_text(one) for one in images]
        path = f"/v1/collections/{segment(collection)}/classify"
        return cast(Classified, object_of(await self._wire.request("POST", path, json=body, partial=True)))

    async def duplicates(
        self, collection: str, *, threshold: float | None = None, limit: int | None = None
    ) -> JsonObject:
        """Groups of items that are nearly the same."""
        params = given(threshold=threshold, limit=limit)
        return object_of(
            await self._wire.request(
                "GET", f"/v1/collections/{segment(collection)}/duplicates", params=params
            )
        )
