"""The encoder behind queues: what the API and the collections await.

bytes → image queue → a worker decodes, preprocesses and runs the batch ┐
                                                                        ├→ unit vectors
texts → token ids → text queue → a worker runs the batch ───────────────┘

Decoding and running share a thread: the cores are busy with either all the time, an image crosses between
threads once, and what waits is encoded bytes, not pixels.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from embedserve.batcher import Batcher, for_the_user, settle
from embedserve.config import ServeConfig
from embedserve.encoder import Encoder, OutputName, Proof
from embedserve.errors import EmbedServeError, InvalidField
from embedserve.graph import available_cores
from embedserve.preprocess import Region

__all__ = ["Look", "Picture", "Towers"]

Pixels = NDArray[np.uint8]
Vector = NDArray[np.float32]
S = TypeVar("S")

INLINE_CHARACTERS = 2000
"""Texts of so many characters together are tokenized at once (0.5 ms); longer ones in a thread."""

MOST_ON_CPU, MOST_ON_GPU = 16, 64
"""Inputs of one run, unless --max-batch says otherwise."""

LOOKS_PER_RUN = 8
"""Patch vectors take megabytes an image."""

REMEMBERED_COUNTS = 8192
"""Texts whose number of tokens is kept, so that `count_tokens` after `texts` costs nothing."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An image's vector, float32 [dim], and its thumbnail as WebP bytes, from one decoding.

    The thumbnail is empty where none was asked for.
    """

    vector: Vector
    thumbnail: bytes


@dataclass(frozen=True, slots=True)
class Look:
    """An image's vector and what the encoder gives beside it.

    Attributes:
        vector: float32 [dim], unit length.
        outputs: What was asked for: `patches`, float32 [cells, length], `attention`, float32 [heads, cells].
        pixels: uint8 [height, width, 3], as the encoder saw the image.
        region: Which part of the image these are.
    """

    vector: Vector
    outputs: Mapping[OutputName, Vector]
    pixels: Pixels
    region: Region


@dataclass(frozen=True, slots=True)
class _Glance:
    data: bytes
    names: frozenset[OutputName]


@dataclass(frozen=True, slots=True)
class _Upload:
    data: bytes
    thumbnail: bool = False


class Towers:
    """An encoder, and for each of its towers a queue with workers.

    An input holds a place in its tower's queue from the moment it is accepted. All methods raise Busy when
    there are no places left, NotReady after `close` and InvalidField if the encoder lacks the tower; a bad
    input is an error in its own place.

    Attributes:
        encoder: The encoder.
        dim: Length of its vectors.
        queues: The batchers by tower, `image` and `text`, and `look` for images whose patches or attention
            are wanted; for metrics.
        proof: What `start` found.
    """

    def __init__(self, encoder: Encoder, config: ServeConfig) -> None:
        self.encoder = encoder
        self.dim = encoder.dim
        self.proof: Proof | None = None
        self._limits = config.limits
        workers = config.workers or max(1, available_cores() // encoder.threads)
        max_batch = config.max_batch or (MOST_ON_GPU if encoder.device.is_gpu else MOST_ON_CPU)
        self._image_threads = ThreadPoolExecutor(workers, thread_name_prefix="images")
        self._text_threads = ThreadPoolExecutor(workers, thread_name_prefix="texts")
        self._images: Batcher[_Upload, Picture] = Batcher(
            self._embed_uploads,
            # The encoder would split larger batches, and the first images wait for the last.
            max_batch=min(max_batch, encoder.images_per_run),
            max_queue=config.limits.queue_size,
            workers=workers,
            executor=self._image_threads,
        )
        self._texts: Batcher[list[int], Vector] = Batcher(
            lambda tokens: list(encoder.embed_texts(tokens)),
            max_batch=max_batch,
            max_queue=config.limits.queue_size,
            workers=workers,
            length=lambda tokens: encoder.tokenizer.padded_length(len(tokens)),
            executor=self._text_threads,
        )
        # A queue of their own: those who want vectors only are not made to pay for patches.
        self._looks: Batcher[_Glance, Look] = Batcher(
            self._look_at,
            max_batch=min(LOOKS_PER_RUN, max_batch),
            max_queue=config.limits.queue_size,
            workers=workers,
            executor=self._image_threads,
        )
        self.queues: dict[str, Batcher[Any, Any]] = {
            "image": self._images,
            "text": self._texts,
            "look": self._looks,
        }
        self._counts: OrderedDict[int, int] = OrderedDict()

    async def start(self) -> None:
        """Runs the bundle's probe, which also makes the first request fast; on a GPU, all sizes of batches.

        Raises BundleError, NotReady (a GPU without enough memory).
        """
        self.proof = await _in_thread(self._image_threads, self.encoder.prove)
        if self.encoder.device.is_gpu:
            await _in_thread(self._image_threads, self.encoder.warm_up)

    async def close(self) -> None:
        """Finishes what was accepted, refuses what comes now, ends the threads."""
        await asyncio.gather(*(queue.close() for queue in self.queues.values()))
        for pool in (self._image_threads, self._text_threads):
            pool.shutdown(wait=False)

    async def image(self, data: bytes) -> Vector:
        """The unit vector, float32 [dim], of an encoded image.

        Raises:
            BadRequest, TooLarge, UnsupportedMedia: As `embedserve.decode.decode`.
        """
        self.encoder.require_images()
        return (await self._images.submit(_Upload(data))).vector

    async def images(self, data: Sequence[bytes]) -> list[Vector | EmbedServeError]:
        """The unit vector or the error of each encoded image, in order."""
        self.encoder.require_images()
        embedded = await self._images.submit_many([_Upload(one) for one in data])
        return [one if isinstance(one, EmbedServeError) else one.vector for one in embedded]

    async def pictures(self, data: Sequence[bytes]) -> list[Picture | EmbedServeError]:
        """As `images`, with thumbnails."""
        self.encoder.require_images()
        return await self._images.submit_many([_Upload(one, thumbnail=True) for one in data])

    async def looks(
        self, data: Sequence[bytes], names: Collection[OutputName]
    ) -> list[Look | EmbedServeError]:
        """As `images`, with the outputs of these names (`patches`, `attention`) for each image.

        Raises InvalidField, code `no_such_output`, if the bundle does not offer one of them.
        """
        self.encoder.require_images()
        for name in names:
            self.encoder.require_output(name)
        wanted = frozenset(names)
        return await self._looks.submit_many([_Glance(one, wanted) for one in data])

    async def texts(self, texts: Sequence[str | list[int]]) -> list[Vector | EmbedServeError]:
        """The unit vector or the error of each text, in order. A list of ints is a text in token ids."""
        with self._texts.places(len(texts)):
            tokens = await self._tokenize(texts)
            good = [one for one in tokens if not isinstance(one, EmbedServeError)]
            vectors = iter(await settle([self._texts.enqueue(one) for one in good]))
            return [one if isinstance(one, EmbedServeError) else next(vectors) for one in tokens]

    def count_tokens(self, text: str) -> int:
        """Tokens that the encoder sees of `text`: special tokens included, at most the context length."""
        known = self._counts.get(hash(text))
        return len(self.encoder.tokenize([text])[0]) if known is None else known

    def _embed_uploads(self, uploads: list[_Upload]) -> list[Picture | EmbedServeError]:
        """One run of the image tower, decoding included; in a worker's thread."""
        read = [self._read(upload) for upload in uploads]
        good = [one for one in read if not isinstance(one, EmbedServeError)]
        vectors = iter(self.encoder.embed_images([pixels for pixels, _ in good]))
        return [
            one if isinstance(one, EmbedServeError) else Picture(next(vectors), one[1])  # in order
            for one in read
        ]

    def _look_at(self, glances: list[_Glance]) -> list[Look | EmbedServeError]:
        """As `_embed_uploads`, with what the whole batch wants beside the vectors."""
        read = [self._view(glance.data) for glance in glances]
        good = [one for one in read if not isinstance(one, EmbedServeError)]
        if not good:
            return [one for one in read if isinstance(one, EmbedServeError)]
        names = frozenset().union(*(glance.names for glance in glances))
        found = self.encoder.look([pixels for pixels, _ in good], names)
        rows = iter(range(len(good)))

        def look(glance: _Glance, one: tuple[Pixels, Region]) -> Look:
            row = next(rows)
            outputs = {name: found.outputs[name][row] for name in glance.names}
            return Look(found.vectors[row], outputs, *one)

        return [
            one if isinstance(one, EmbedServeError) else look(glance, one)  # in order
            for glance, one in zip(glances, read, strict=True)
        ]

    def _view(self, data: bytes) -> tuple[Pixels, Region] | EmbedServeError:
        try:
            return self.encoder.read_view(data, self._limits)
        except Exception as error:  # noqa: BLE001 -- as in `_read`
            return for_the_user(error)

    def _read(self, upload: _Upload) -> tuple[Pixels, bytes] | EmbedServeError:
        try:
            if upload.thumbnail:
                return self.encoder.read_picture(upload.data, self._limits)
            return self.encoder.read_image(upload.data, self._limits), b""
        except Exception as error:  # noqa: BLE001 -- whatever is wrong with an image, its batch goes on
            return for_the_user(error)

    async def _tokenize(self, texts: Sequence[str | list[int]]) -> list[list[int] | EmbedServeError]:
        tokenizer = self.encoder.tokenizer
        words = [text for text in texts if isinstance(text, str)]
        if sum(map(len, words)) <= INLINE_CHARACTERS:
            encoded = tokenizer.encode(words)
        else:
            encoded = await _in_thread(self._text_threads, lambda: tokenizer.encode(words))
        self._remember(words, encoded)
        ready = iter(encoded)
        results: list[list[int] | EmbedServeError] = []
        for text in texts:
            try:
                results.append(_not_empty(next(ready)) if isinstance(text, str) else tokenizer.accept(text))
            except EmbedServeError as error:
                results.append(error)
        return results

    def _remember(self, texts: Sequence[str], encoded: Sequence[Sequence[int]]) -> None:
        for text, tokens in zip(texts, encoded, strict=True):
            self._counts[hash(text)] = len(tokens)
        while len(self._counts) > REMEMBERED_COUNTS:
            self._counts.popitem(last=False)


def _not_empty(tokens: list[int]) -> list[int]:
    if not tokens:  # only with tokenizers that add no special tokens
        raise InvalidField("The text is empty for this encoder; send at least one word.")
    return tokens


async def _in_thread(pool: ThreadPoolExecutor, work: Callable[[], S]) -> S:
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work)
    except Exception as error:
        raise for_the_user(error) from error
