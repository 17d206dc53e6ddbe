"""Images, texts and token arrays in a request: told apart, loaded, embedded, their order kept."""

from __future__ import annotations

import asyncio
import copy
import re
from collections.abc import Awaitable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedserve.api.services import Services
from embedserve.config import Limits
from embedserve.encoder import OutputName
from embedserve.errors import EmbedServeError, Forbidden, InvalidField, TooLarge
from embedserve.fetch import decode_base64, parse_data_uri
from embedserve.towers import Look

__all__ = [
    "Source",
    "check_count",
    "check_text",
    "embed",
    "is_data_uri",
    "load_image",
    "load_images",
    "located",
    "looks",
]

Vector = NDArray[np.float32]
T = TypeVar("T")

SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")
FETCHES_AT_ONCE = 8
"""URLs of one request that are fetched at the same time."""
BIG = 256 * 1024
"""Characters of base64 from which decoding moves off the event loop (about 0.3 ms)."""


@dataclass(frozen=True, slots=True)
class Source:
    """One input. An image is its bytes, or text: base64, a data URI or a URL."""

    kind: Literal["image", "text", "tokens"]
    value: Any
    param: str

    @classmethod
    def image(cls, value: str | bytes, param: str) -> Source:
        return cls("image", value, param)

    @classmethod
    def text(cls, value: str, param: str) -> Source:
        return cls("text", value, param)

    @classmethod
    def string(cls, value: str, param: str) -> Source:
        """A bare string: an image when it is a data URI of one, else a text (an http URL is text, too)."""
        return cls("image" if is_data_uri(value) else "text", value, param)


def is_data_uri(value: str) -> bool:
    """Whether a bare string is meant as an image."""
    return value[:11].lower() == "data:image/"


def check_count(number: int, limits: Limits, param: str, *, what: str = "inputs") -> None:
    """Raises InvalidField for none, TooLarge for more than `limits.max_inputs`."""
    if number == 0:
        raise InvalidField(f"'{param}' is empty; give at least one of the {what}.", param=param)
    if number > limits.max_inputs:
        raise TooLarge(
            f"'{param}' has {number} {what}; at most {limits.max_inputs} go in one request. "
            "Send several requests, or raise --max-inputs.",
            param=param,
            code="too_many_inputs",
        )


def check_text(text: str, limits: Limits) -> str:
    """Raises InvalidField for an empty text, TooLarge for one over `limits.max_text_bytes`."""
    if not text.strip():
        raise InvalidField(
            "The text is empty, so there is nothing to embed; send at least one word.", code="empty_text"
        )
    size = len(text.encode("utf-8", "surrogatepass")) if 4 * len(text) > limits.max_text_bytes else 0
    if size > limits.max_text_bytes:
        raise TooLarge(
            f"The text is {size} bytes; allowed are {limits.max_text_bytes}. Encoders read a few hundred "
            "words at most: send a summary or parts, or raise --max-text-bytes.",
            code="text_too_large",
        )
    return text


def located(result: T | EmbedServeError, param: str) -> T | EmbedServeError:
    """An error with its place in the request. A copy: a failed batch gives all its callers the same error."""
    return copy.copy(result).at(param) if isinstance(result, EmbedServeError) else result


async def load_image(parts: Services, value: str | bytes) -> bytes:
    """The bytes of an image given as bytes, base64, a data URI or an http(s) URL.

    Raises Forbidden (URL inputs are off, or the address is not public), BadRequest, TooLarge,
    UnsupportedMedia, InvalidField (another scheme).
    """
    if isinstance(value, bytes):
        return value
    scheme = SCHEME.match(value[:40])
    if scheme is None:
        return await _off_loop_if_big(decode_base64, value, parts.limits)
    match scheme[1].lower():
        case "data":
            return await _off_loop_if_big(parse_data_uri, value, parts.limits)
        case "http" | "https":
            if not parts.config.url_inputs:
                raise Forbidden(
                    "This server does not fetch URLs (--no-url-inputs). Send the image itself, as base64.",
                    code="url_inputs_off",
                )
            return await parts.fetcher.fetch(value)
        case other:
            raise InvalidField(
                f"Images cannot be read from '{other}:'; give base64, a data: URI or an http(s) URL.",
                code="unsupported_scheme",
            )


async def _off_loop_if_big(decode: Any, text: str, limits: Limits) -> bytes:
    data: bytes = await asyncio.to_thread(decode, text, limits) if len(text) > BIG else decode(text, limits)
    return data


async def load_images(parts: Services, sources: Sequence[Source]) -> list[bytes | EmbedServeError]:
    """`load_image` of each; a bad one fails alone, with its `param`."""
    gate = asyncio.Semaphore(FETCHES_AT_ONCE)

    async def load(source: Source) -> bytes | EmbedServeError:
        try:
            if isinstance(source.value, bytes):
                return source.value
            async with gate:
                return await load_image(parts, source.value)
        except EmbedServeError as error:
            return located(error, source.param)

    if len(sources) == 1:
        return [await load(sources[0])]
    return list(await asyncio.gather(*map(load, sources)))


async def embed(parts: Services, sources: Sequence[Source]) -> list[Vector | EmbedServeError]:
    """A unit vector, float32 (dim,), or an error for each source, in their order.

    Images and texts run at the same time, each kind in one batch. Raises Busy when a queue is full.
    """
    images = [i for i, source in enumerate(sources) if source.kind == "image"]
    texts = [i for i, source in enumerate(sources) if source.kind != "image"]
    results: list[Vector | EmbedServeError | None] = [None] * len(sources)
    jobs = [
        (positions, _each(run(parts, [sources[i] for i in positions]), len(positions)))
        for positions, run in ((images, _images), (texts, _texts))
        if positions
    ]
    outcomes = [await jobs[0][1]] if len(jobs) == 1 else await asyncio.gather(*(job for _, job in jobs))
    for (positions, _), vectors in zip(jobs, outcomes, strict=True):
        for position, vector in zip(positions, vectors, strict=True):
            results[position] = located(vector, sources[position].param)
    return [result for result in results if result is not None]


async def _each(
    run: Awaitable[list[Vector | EmbedServeError]], number: int
) -> list[Vector | EmbedServeError]:
    """A tower that the encoder lacks fails its inputs, not those of the other one."""
    try:
        return await run
    except InvalidField as error:
        return [error] * number


async def _images(parts: Services, sources: Sequence[Source]) -> list[Vector | EmbedServeError]:
    loaded = await load_images(parts, sources)
    good = [data for data in loaded if isinstance(data, bytes)]
    embedded = iter(await parts.towers.images(good) if good else [])
    results = [data if isinstance(data, EmbedServeError) else next(embedded) for data in loaded]
    parts.metrics.count_bad_images(results)
    return results


async def looks(
    parts: Services, sources: Sequence[Source], names: Collection[OutputName]
) -> list[Look | EmbedServeError]:
    """Each image with what the encoder gives beside its vector, or an error; as `embed`.

    Raises Busy, InvalidField (code `no_such_output`).
    """
    loaded = await load_images(parts, sources)
    good = [data for data in loaded if isinstance(data, bytes)]
    found = iter(await parts.towers.looks(good, names) if good else [])
    results = [data if isinstance(data, EmbedServeError) else next(found) for data in loaded]
    parts.metrics.count_bad_images(results)
    return [located(result, source.param) for result, source in zip(results, sources, strict=True)]


async def _texts(parts: Services, sources: Sequence[Source]) -> list[Vector | EmbedServeError]:
    results: list[Vector | EmbedServeError | None] = []
    good: list[str | list[int]] = []
    for source in sources:
        try:
            good.append(check_text(source.value, parts.limits) if source.kind == "text" else source.value)
            results.append(None)
        except EmbedServeError as error:
            results.append(error)
    embedded = iter(await parts.towers.texts(good) if good else [])
    return [next(embedded) if result is None else result for result in results]
