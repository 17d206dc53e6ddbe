"""A bundle brought to life: images and texts in, unit vectors out.

`Encoder` is synchronous and may be used from several threads. `embedserve.towers` puts queues before it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from embedserve.bundle import (
    Bundle,
    ImageOutputs,
    Preprocessing,
    Probe,
    open_bundle,
)
from embedserve.config import Limits
from embedserve.decode import decode
from embedserve.device import choose, default_engines, engine_folder
from embedserve.errors import BundleError, EmbedServeError, InvalidField
from embedserve.graph import EMBEDDING, Graph, Vectors, available_cores
from embedserve.graphs import Images, Place, Texts
from embedserve.preprocess import Region, preprocess, region, shrink_target, thumbnail
from embedserve.probing import Proof, make_probe, prove
from embedserve.tokenizer import Tokenizer

__all__ = ["Encoder", "Looks", "OutputName", "Proof", "resolve"]

logger = logging.getLogger(__name__)

OutputName = Literal["attention", "patches"]
Pixels = NDArray[np.uint8]

IMAGES_PER_CORE = 2
"""Images in one `session.run` for each core, at least 4 in all. More do not fit the caches: on two cores
EfficientNet-Lite0 gives 345 images/s in fours, 290 in sixteens, and needs four times the memory for that."""

GPU_IMAGES = 64
"""Images in one run on a GPU."""

TOKENS_PER_CORE = 1024
"""Tokens in one `session.run` for each core, padding included. MiniLM is at full speed with 128."""

GPU_TOKENS = 8192
"""Tokens in one run on a GPU, padding included: 106 texts of CLIP's full context."""

UNIT_TOLERANCE = 1e-2
"""How far from 1 the length of a vector may be. Half-precision graphs stay within 1e-3."""

THUMBNAIL_SIZE = 256


@dataclass(frozen=True, slots=True)
class Looks:
    """What `Encoder.look` found: vectors, float32 [n, dim], and by name the outputs that were asked for:
    `patches` [n, cells, length], `attention` [n, heads, cells]."""

    vectors: Vectors
    outputs: Mapping[OutputName, Vectors]


class Encoder:
    """One bundle, loaded. Make it with `Encoder.load`.

    Attributes:
        bundle: The bundle on disk.
        name: The encoder's name.
        dim: Length of its vectors.
        device: Where it runs.
        threads: Threads of one `session.run`.
        images_per_run: More images than this are run in pieces, which bounds memory.
        tokens_per_run: The same for tokens, padding included.
    """

    def __init__(
        self, bundle: Bundle, *, threads: int = 0, device: str = "cpu", engines: Path | None = None
    ) -> None:
        self.bundle = bundle
        self.name = bundle.name
        self.dim = bundle.dim
        precision = bundle.description.precision
        choice = choose(device, precision=precision)
        if choice.note:
            logger.warning("%s", choice.note)
        self.device = choice.device
        self.threads = threads or available_cores()
        gpu = self.device.is_gpu
        self.images_per_run = GPU_IMAGES if gpu else max(4, IMAGES_PER_CORE * self.threads)
        self.tokens_per_run = GPU_TOKENS if gpu else TOKENS_PER_CORE * self.threads
        run_on = Place(
            self.threads,
            self.device,
            precision.startswith("float16"),
            engine_folder(engines or default_engines(), bundle.fingerprint, self.device),
        )
        # Loading is mostly ONNX Runtime optimising each graph on one core, without Python's lock.
        image, text = bundle.description.image, bundle.description.text
        with ThreadPoolExecutor(2) as pool:
            images = pool.submit(Images, bundle, image, run_on) if image else None
            texts = pool.submit(Texts, bundle, text, run_on) if text else None
            self._images = images.result() if images else None
            self._texts = texts.result() if texts else None

    @classmethod
    def load(
        cls,
        folder: Path | str,
        *,
        threads: int = 0,
        verify: bool = True,
        device: str = "cpu",
        engines: Path | None = None,
    ) -> Encoder:
        """Loads the bundle in `folder`; 'starter' is the one that comes with this package.

        Args:
            folder: The bundle's folder, or 'starter'.
            threads: Threads of one `session.run`; 0 takes one for each core that this process may use.
            verify: Compare the files with their sha256 first.
            device: auto, cpu, cuda, cuda:1, tensorrt or tensorrt:1.
            engines: Folder for TensorRT's engines; None: one in the user's cache.

        Raises:
            BundleError: Missing, malformed, altered, or with graphs of another form than described.
            InvalidField: A device that does not exist or does not work here.
        """
        bundle = open_bundle(resolve(folder), verify=verify)
        return cls(bundle, threads=threads, device=device, engines=engines)

    @property
    def provider(self) -> str:
        """The execution provider that runs the towers, in ONNX Runtime's words."""
        towers = [tower for tower in (self._images, self._texts) if tower is not None]
        return towers[0].graph.provider

    @property
    def has_images(self) -> bool:
        return self._images is not None

    @property
    def has_text(self) -> bool:
        return self._texts is not None

    @property
    def tokenizer(self) -> Tokenizer:
        """The text tower's tokenizer. Raises InvalidField without a text tower."""
        return self._require_texts().tokenizer

    def require_images(self) -> None:
        """Raises InvalidField without an image tower."""
        self._require_images()

    def read_image(self, data: bytes, limits: Limits) -> Pixels:
        """An encoded image as the uint8 [height, width, 3] that the image tower takes.

        Raises:
            InvalidField: The encoder has no image tower.
            BadRequest, TooLarge, UnsupportedMedia: As `embedserve.decode.decode`.
        """
        spec = self._require_images().spec
        return preprocess(_decode(data, limits, spec), spec)

    def read_picture(self, data: bytes, limits: Limits) -> tuple[Pixels, bytes]:
        """As `read_image`, with a thumbnail (WebP bytes) from the same decoding."""
        spec = self._require_images().spec
        image = _decode(data, limits, spec)
        return preprocess(image, spec), thumbnail(image, THUMBNAIL_SIZE)

    def read_view(self, data: bytes, limits: Limits) -> tuple[Pixels, Region]:
        """As `read_image`, with the part of the image that it shows."""
        spec = self._require_images().spec
        image = _decode(data, limits, spec)
        return preprocess(image, spec), region(image.width, image.height, spec)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to the context length, unpadded.

        Raises:
            InvalidField: The encoder has no text tower.
        """
        return self.tokenizer.encode(texts)

    def embed_images(self, pixels: Sequence[Pixels]) -> Vectors:
        """Unit vectors, float32 [n, dim], of n images as given by `read_image`.

        Raises:
            InvalidField: The encoder has no image tower, or an array is not what `read_image` gives.
            InvalidField: A vector is all zeros, code `no_direction`.
            EmbedServeError: A vector is NaN, infinite or not of unit length, code `no_direction`.
            BundleError: The graph's output is not what the bundle promises.
        """
        tower = self._require_images()
        self._check_pixels(tower, pixels)
        step = self.images_per_run
        pieces = (np.stack(pixels[start : start + step]) for start in range(0, len(pixels), step))
        vectors = self._run(tower.graph, pieces, len(pixels))
        self._check_lengths(vectors)
        return vectors

    def embed_texts(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        """Unit vectors, float32 [n, dim], of n texts as given by `tokenize`.

        Raises: as `embed_images`.
        """
        tower = self._require_texts()
        by_length = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))  # so little is padded
        pieces = self._text_pieces(tower.tokenizer, [tokens[index] for index in by_length])
        vectors = np.empty((len(tokens), self.dim), np.float32)
        vectors[by_length] = self._run(tower.graph, pieces, len(tokens))
        self._check_lengths(vectors)
        return vectors

    def look(self, pixels: Sequence[Pixels], names: Collection[OutputName]) -> Looks:
        """As `embed_images`, with what the bundle offers beside the vectors.

        Args:
            pixels: Images as given by `read_image`.
            names: `patches`, `attention`, or both.

        Raises:
            InvalidField: As `embed_images`, or the bundle does not offer it, code `no_such_output`.
        """
        tower = self._require_images()
        for name in names:
            self.require_output(name)
        self._check_pixels(tower, pixels)
        wanted = (EMBEDDING, *sorted(names))
        step = self.images_per_run
        pieces = [np.stack(pixels[start : start + step]) for start in range(0, len(pixels), step)]
        parts = [tower.graph.run_for(wanted, piece) for piece in pieces]
        found = {name: np.concatenate([part[name] for part in parts]) for name in wanted}
        self._check_lengths(found[EMBEDDING])
        return Looks(found[EMBEDDING], {name: found[name] for name in names})

    def require_output(self, name: OutputName) -> ImageOutputs:
        """What the bundle says about its outputs. Raises InvalidField, code `no_such_output`."""
        self._require_images()
        image = self.bundle.description.image
        outputs = image.outputs if image else None
        if outputs is None or getattr(outputs, name) is None:
            raise InvalidField(
                f"The encoder '{self.name}' gives no '{name}' beside its vectors. Serve a bundle whose image "
                "tower offers it; /v1/models says what the one served does.",
                code="no_such_output",
            )
        return outputs

    def warm_up(self) -> None:
        """Runs batches of the sizes that requests will make, so that none of them waits for the first of its
        kind: kernels are loaded, memory is taken, TensorRT builds its engines (minutes, once).

        Where the largest batch does not fit into memory, later ones are smaller. Raises NotReady if none
        fits.
        """
        if self._images is not None:
            self.images_per_run = self._images.warm_up(self.images_per_run)
        if self._texts is not None:
            self.tokens_per_run = self._texts.warm_up(self.tokens_per_run)

    def prove(self) -> Proof:
        """Runs the bundle's probe through the whole path, decoding and tokenizing included.

        A tower without golden vector is run all the same, and the length of its vector checked.

        Raises:
            BundleError: A cosine below the probe's `min_cosine`, or a vector that is not of unit length.
        """
        return prove(self)

    def make_probe(self, image_png: bytes | None, text: str | None) -> Probe:
        """A probe with the vectors this encoder gives now, for whoever writes a bundle.

        Args:
            image_png: A small PNG file, or None to leave images out.
            text: A short text, or None to leave texts out.
        """
        return make_probe(self, image_png, text)

    def _require_images(self) -> Images:
        if self._images is None:
            raise InvalidField(
                f"The encoder '{self.name}' has no image tower. Send text, or serve an encoder with one."
            )
        return self._images

    def _require_texts(self) -> Texts:
        if self._texts is None:
            raise InvalidField(
                f"The encoder '{self.name}' has no text tower. Send images, or serve an encoder with one; "
                "a collection can classify images by their neighbours."
            )
        return self._texts

    def _text_pieces(
        self, tokenizer: Tokenizer, by_length: list[Sequence[int]]
    ) -> Iterator[NDArray[np.int64]]:
        start = 0
        for end in range(1, len(by_length) + 1):
            last = end == len(by_length)
            if last or (end + 1 - start) * tokenizer.padded_length(len(by_length[end])) > self.tokens_per_run:
                yield tokenizer.pad(by_length[start:end])
                start = end

    def _run(self, graph: Graph, pieces: Iterable[NDArray[np.generic]], count: int) -> Vectors:
        if not count:
            return np.zeros((0, self.dim), np.float32)
        vectors = np.concatenate([graph.run(piece) for piece in pieces])
        if vectors.shape != (count, self.dim):
            raise BundleError(
                f"'{graph.path}' gave vectors of the form {list(vectors.shape)} for {count} inputs; "
                f"encoder.json promises [{count}, {self.dim}]. Export the bundle again."
            )
        return vectors

    def _check_pixels(self, tower: Images, pixels: Sequence[Pixels]) -> None:
        shape = (tower.spec.height, tower.spec.width, 3)
        for index, one in enumerate(pixels):
            if one.shape != shape or one.dtype != np.uint8:
                raise InvalidField(
                    f"Image {index} is {one.dtype} {list(one.shape)}; the encoder '{self.name}' takes uint8 "
                    f"{list(shape)}. Prepare images with `read_image`."
                )

    def _check_lengths(self, vectors: Vectors) -> None:
        lengths = np.linalg.norm(vectors, axis=1)
        bad = np.flatnonzero(~(np.abs(lengths - 1) <= UNIT_TOLERANCE))  # NaN compares false
        if len(bad):
            # An input that holds nothing the encoder knows (padding alone, say) gives all zeros; NaN is the
            # encoder's own trouble.
            failure = InvalidField if lengths[bad[0]] == 0 else EmbedServeError
            raise failure(
                f"The encoder '{self.name}' gave a vector of length {lengths[bad[0]]:.3g} instead of 1 for "
                f"input {bad[0]}, so it cannot be compared. If other inputs work, this one holds nothing the "
                "encoder knows; if none do, run `embedserve check` on the bundle.",
                code="no_direction",
            )


def resolve(folder: Path | str) -> Path:
    """The folder that a user means: 'starter' is the bundle inside this package ('./starter' is a folder).

    Raises:
        BundleError: 'starter' is asked for and this installation lacks it.
    """
    if folder != "starter":
        return Path(folder)
    bundled = Path(str(resources.files("embedserve"))) / "starter"
    if not (bundled / "encoder.json").is_file():
        raise BundleError(
            f"This installation lacks the starter encoder ('{bundled}'). Install the package again, or build "
            "it with `embedserve export starter` (needs the extra 'train')."
        )
    return bundled


def _decode(data: bytes, limits: Limits, spec: Preprocessing) -> Image.Image:
    # The same size with and without thumbnail: one file must always give one vector.
    shrink_to = max(shrink_target(spec), THUMBNAIL_SIZE)
    return decode(data, limits, background=spec.background, shrink_to=shrink_to)
