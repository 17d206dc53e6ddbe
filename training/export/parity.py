"""Serving against PyTorch: is a bundle the network that it was made from?

The whole path of a server (decode, preprocess or tokenize, ONNX Runtime) is compared with the library's own
preprocessing and tokenizer before the untouched network, on every picture and text of the calibration set.
`measure` gives the figures, `require` refuses a bundle that departs and says where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from embedserve.config import Limits
from embedserve.decode import decode
from embedserve.encoder import Encoder
from embedserve.errors import EmbedServeError, InvalidField
from embedserve.preprocess import preprocess
from training.export.calibration import Calibration, Picture
from training.export.original import Original, OriginalImages, OriginalTexts
from training.export.towers import ImageGraph, TextGraph, unit

__all__ = ["LEAST_COSINE", "MOST_OF_SPREAD", "Departed", "measure", "require", "torch_images", "torch_texts"]

Vectors = NDArray[np.float32]
Pixels = NDArray[np.uint8]
Figures = dict[str, Any]
Tower = Literal["image", "text"]

LEAST_COSINE = 0.9999
"""Of any vector to PyTorch's, in float32."""

MOST_OF_SPREAD = 0.1
"""How far a vector may be from PyTorch's, in distances between different inputs (their median). Some encoders
give all inputs nearly the same vector, random ones above all: there every cosine is close to 1."""

NO_SPREAD = 1e-4
"""Below this median distance all inputs have one vector, and a share of it says nothing."""

ALONE = 4
"""Images that are embedded one by one as well, to be compared with the same ones in company."""
BATCHES = (2, 17)
SAME_PIXELS = 8
"""Images on which the graph alone is compared, to tell its departures from those of preprocessing."""
NEIGHBOURS = 10
LABELS = 10
MOST_LENGTHS = 24
TORCH_BATCH = 8
LIMITS = Limits()


class Departed(EmbedServeError):
    """A bundle is not the network that it was made from."""

    status, code, type = 500, "departs", "server_error"


def measure(encoder: Encoder, original: Original, calibration: Calibration) -> Figures:
    """Every figure of a bundle's agreement with its network; JSON types, for `Description.parity`.

    Args:
        encoder: The bundle as serving loads it.
        original: What it was made from.
        calibration: What is compared.
    """
    figures: Figures = {"measured_on": calibration.origin}
    sides: dict[str, tuple[Vectors, Vectors]] = {}
    if original.images is not None:
        figures["image"], sides["image"] = _images(encoder, original.images, calibration.pictures)
    if original.texts is not None:
        figures["text"], sides["text"] = _texts(encoder, original.texts, calibration.texts)
    if len(sides) == 2:
        figures["zero_shot"] = _zero_shot(sides, original)
    return figures


def require(figures: Mapping[str, Any], *, least: float = LEAST_COSINE) -> None:
    """Raises Departed where a cosine is below `least`, saying which part of the path departs."""
    for tower in ("image", "text"):
        found = figures.get(tower)
        if found is None:
            continue
        _require(tower, "graph", "on the same input", found["graph"], least)
        for what, one in found["alone_or_in_a_batch"].items():
            _require(tower, "graph", f"alone and in a batch of {what}", one, least)
        if tower == "text":
            if found["tokens_equal"] < found["tokens_compared"]:
                raise Departed(
                    f"The export is refused: {found['tokens_compared'] - found['tokens_equal']} of "
                    f"{found['tokens_compared']} texts have other tokens than with the library's tokenizer, "
                    f"the first is {found['other_tokens']!r}. The tokenizer departs."
                )
            _require(tower, "graph", "at some length", found["lengths"], least)
        part = "preprocessing" if tower == "image" else "tokenizer or the padding"
        _require(tower, part, "of the whole path", found, least)


def _require(tower: str, part: str, where: str, found: Mapping[str, Any], least: float) -> None:
    cosine, share = found["min_cosine"], found.get("worst_of_spread")
    of = f" ('{found['worst']}')" if found.get("worst") else ""
    if not cosine >= least:  # NaN compares false
        raise Departed(
            f"The export is refused: the {tower} vector with the least cosine {where} has {cosine:.6f} to "
            f"PyTorch's{of}; {least} is needed. The {part} departs."
        )
    if share is not None and not share <= MOST_OF_SPREAD:
        raise Departed(
            f"The export is refused: {where} a {tower} vector is {share:.3f} of the distance between "
            f"different inputs away from PyTorch's{of}; {MOST_OF_SPREAD} is allowed. The {part} departs."
        )


# ------------------------------------------------------------------------------------------------- images


def torch_images(original: OriginalImages, image: Image.Image) -> Tensor:
    """An RGB image → what the network takes, by the library's own preprocessing where there is one.

    Returns:
        float32 [3, height, width], normalised.
    """
    if original.reference is not None:
        return original.reference(image)
    graph = ImageGraph(nn.Identity(), original.mean, original.std)
    return graph.normalized(torch.from_numpy(preprocess(image, original.preprocessing).copy())[None])[0]


def _images(
    encoder: Encoder, original: OriginalImages, pictures: Sequence[Picture]
) -> tuple[Figures, tuple[Vectors, Vectors]]:
    graph = ImageGraph(original.network, original.mean, original.std)
    served: list[Pixels] = []
    theirs: list[Vectors] = []
    shrunk: list[int] = []
    worst_pixel = 0.0
    for part in _parts(pictures, TORCH_BATCH):
        inputs = []
        for picture in part:
            whole = decode(picture.data, LIMITS, background=original.preprocessing.background)
            inputs.append(torch_images(original, whole))
            pixels = encoder.read_image(picture.data, LIMITS)
            if not np.array_equal(pixels, preprocess(whole, original.preprocessing)):
                shrunk.append(len(served))  # a large JPEG, of which serving decodes a fraction
            else:
                worst_pixel = max(worst_pixel, _pixel_difference(graph, pixels, inputs[-1]))
            served.append(pixels)
        with torch.no_grad():
            theirs.append(unit(original.network(torch.stack(inputs))).numpy())
    expected = np.concatenate(theirs)
    found = _embedded(encoder, "image", served)
    names = [one.name for one in pictures]
    whole_ones = np.setdiff1d(np.arange(len(pictures)), shrunk)
    figures = _agreement(found[whole_ones], expected[whole_ones], [names[row] for row in whole_ones])
    own = original.reference is None
    figures |= {
        "compared_with": "serving's own preprocessing" if own else "the library's own preprocessing",
        "top10_overlap": _overlap(found, expected),
        "graph": _graph_agreement(graph, served, found, names),
        "alone_or_in_a_batch": _image_batches(encoder, served),
    }
    if not own:
        figures["worst_pixel"] = round(worst_pixel, 2)
    if original.evaluated is not None:
        evaluated = _evaluated(original, original.evaluated, pictures)
        figures["as_evaluated"] = _agreement(found, evaluated, names)
    if shrunk:
        figures["large_jpegs"] = _agreement(found[shrunk], expected[shrunk], [names[row] for row in shrunk])
    return figures, (found, expected)


def _evaluated(
    original: OriginalImages, see: Callable[[Image.Image], Tensor], pictures: Sequence[Picture]
) -> Vectors:
    background = original.preprocessing.background
    images = (see(decode(one.data, LIMITS, background=background)) for one in pictures)
    with torch.no_grad():
        return torch.cat([unit(original.network(image[None])) for image in images]).numpy()


def _pixel_difference(graph: ImageGraph, pixels: Pixels, expected: Tensor) -> float:
    """The largest difference of a channel of a pixel, in levels of 0..255."""
    difference = graph.normalized(torch.from_numpy(pixels.copy())[None])[0] - expected
    return float((difference.abs() * graph.std).max()) * 255


def _graph_agreement(
    graph: ImageGraph, served: Sequence[Pixels], found: Vectors, names: Sequence[str]
) -> Figures:
    """On the pixels that serving saw."""
    some = served[:SAME_PIXELS]
    with torch.no_grad():
        parts = [graph(torch.from_numpy(np.stack(part))) for part in _parts(some, TORCH_BATCH)]
    vectors = torch.cat([one if isinstance(one, Tensor) else one[0] for one in parts]).numpy()
    return _agreement(found[: len(some)], vectors, names)


def _image_batches(encoder: Encoder, served: Sequence[Pixels]) -> Figures:
    """The first images in batches against each by itself."""
    most = encoder.images_per_run

    def embedded(images: Sequence[Pixels], at_once: int) -> Vectors:
        encoder.images_per_run = at_once
        return _embedded(encoder, "image", images)

    try:
        alone = embedded(_cycled(served, ALONE), 1)
        return {
            str(size): _agreement(embedded(_cycled(served, size), size)[:ALONE], alone[:size])
            for size in BATCHES
        }
    finally:
        encoder.images_per_run = most


# -------------------------------------------------------------------------------------------------- texts


def torch_texts(original: OriginalTexts, tokens: Sequence[Sequence[int]]) -> Vectors:
    """Unit vectors from PyTorch of token ids, each text alone and without padding that it does not need."""
    graph = TextGraph(original.network)
    vectors = []
    for ids in tokens:
        row = list(ids)
        if original.padding == "context":
            row += [original.pad_id] * (original.context_length - len(row))
        with torch.no_grad():
            vectors.append(graph(torch.tensor([row or [original.pad_id]])))
    return torch.cat(vectors).numpy()


def _texts(
    encoder: Encoder, original: OriginalTexts, texts: Sequence[str]
) -> tuple[Figures, tuple[Vectors, Vectors]]:
    tokens = encoder.tokenize(texts)
    found = _embedded(encoder, "text", tokens)
    names = [text[:60] for text in texts]
    by_tokens = torch_texts(original, tokens)
    if original.reference_vectors is not None:
        expected = original.reference_vectors(texts).numpy()
        compared = "the library's own tokenizer and network"
    else:
        expected, compared = by_tokens, "the network on the same tokens"
    figures = _agreement(found, expected, names)
    figures |= {
        "compared_with": compared,
        "top10_overlap": _overlap(found, expected),
        "graph": _agreement(found, by_tokens, names),
        "alone_or_in_a_batch": _text_batches(encoder, tokens),
        "lengths": _lengths(encoder, original, tokens),
        "tokens_compared": 0,
        "tokens_equal": 0,
    }
    if original.reference_tokens is not None:
        theirs = original.reference_tokens(texts)
        same = [ours == other for ours, other in zip(tokens, theirs, strict=True)]
        figures |= {"tokens_compared": len(same), "tokens_equal": sum(same)}
        if not all(same):
            figures["other_tokens"] = names[same.index(False)]
    return figures, (found, expected)


def _text_batches(encoder: Encoder, tokens: Sequence[Sequence[int]]) -> Figures:
    """Texts of mixed lengths together, so that most of them are padded, against each by itself."""
    most = encoder.tokens_per_run
    try:
        encoder.tokens_per_run = 1
        alone = _embedded(encoder, "text", _cycled(tokens, max(BATCHES)))
        encoder.tokens_per_run = max(BATCHES) * encoder.tokenizer.context
        return {
            str(size): _agreement(_embedded(encoder, "text", _cycled(tokens, size)), alone[:size])
            for size in BATCHES
        }
    finally:
        encoder.tokens_per_run = most


def _lengths(encoder: Encoder, original: OriginalTexts, tokens: Sequence[Sequence[int]]) -> Figures:
    """A long text cut to each length from 1 to the context, its last token kept at its end."""
    longest = max(tokens, key=len)
    lengths = np.unique(np.geomspace(1, len(longest), MOST_LENGTHS).round().astype(int)).tolist()
    if len(longest) > 1:
        lengths = sorted({*lengths, len(longest) - 1})
    rows = [[*longest[: length - 1], longest[-1]] for length in lengths]
    found = np.concatenate([_embedded(encoder, "text", [row]) for row in rows])
    figures = _agreement(found, torch_texts(original, rows), [f"{length} tokens" for length in lengths])
    return figures | {"shortest": lengths[0], "longest": lengths[-1]}


# -------------------------------------------------------------------------------------------- both towers


def _zero_shot(sides: Mapping[str, tuple[Vectors, Vectors]], original: Original) -> Figures:
    """Probabilities of the first texts as labels, for every image."""
    scoring = original.scoring
    probabilities = []
    for image, text in zip(sides["image"], sides["text"], strict=True):
        logits = scoring.logit_scale * torch.from_numpy(image @ text[:LABELS].T) + scoring.logit_bias
        probabilities.append(
            torch.softmax(logits, dim=1) if scoring.activation == "softmax" else torch.sigmoid(logits)
        )
    ours, theirs = probabilities
    same = ours.argmax(dim=1) == theirs.argmax(dim=1)
    return {
        "images": len(ours),
        "labels": ours.shape[1],
        "same_best": round(float(same.float().mean()), 4),
        "worst_probability": round(float((ours - theirs).abs().max()), 6),
    }


# ------------------------------------------------------------------------------------------------ figures


def _agreement(found: Vectors, expected: Vectors, names: Sequence[str] = ()) -> Figures:
    """How two sets of unit vectors, [n, dim], agree row by row. Two zero vectors agree."""
    difference = np.linalg.norm(found.astype(np.float64) - expected, axis=1)
    both = np.linalg.norm(found, axis=1).astype(np.float64) * np.linalg.norm(expected, axis=1)
    products = (found.astype(np.float64) * expected).sum(axis=1)
    # Through the difference: a product of float32 vectors that are equal is 1 only to within 1e-7.
    cosines = np.where(both > 0.5, products / np.maximum(both, 0.5), 1 - difference**2 / 2)
    worst = int(np.argmin(np.where(np.isnan(cosines), -2, cosines)))
    figures: Figures = {
        "n": len(found),
        "min_cosine": round(float(np.minimum(cosines, 1).min()), 7),
        "mean_cosine": round(float(np.minimum(cosines, 1).mean()), 7),
        "worst_difference": float(f"{np.abs(found - expected).max():.2g}"),
    }
    spread = _spread(expected)
    if spread > NO_SPREAD:
        figures["worst_of_spread"] = float(f"{difference.max() / spread:.2g}")
    if names:
        figures["worst"] = names[worst]
    return figures


def _spread(vectors: Vectors) -> float:
    """The median distance of two different rows; 0 where there are fewer than three."""
    if len(vectors) < 3:
        return 0.0
    rows, columns = np.triu_indices(len(vectors), 1)
    return float(np.median(np.linalg.norm(vectors[rows] - vectors[columns], axis=1)))


def _overlap(found: Vectors, expected: Vectors) -> float:
    """The mean share of the nearest `NEIGHBOURS` that are the same."""
    count = min(NEIGHBOURS, len(found) - 1)
    if count < 1:
        return 1.0
    ours, theirs = (_nearest(vectors, count) for vectors in (found, expected))
    return round(float(np.mean([len(a & b) / count for a, b in zip(ours, theirs, strict=True)])), 4)


def _nearest(vectors: Vectors, count: int) -> list[set[int]]:
    cosines = vectors.astype(np.float64) @ vectors.T
    np.fill_diagonal(cosines, -2)
    return [set(row.tolist()) for row in np.argsort(-cosines, axis=1, kind="stable")[:, :count]]


def _embedded(encoder: Encoder, tower: Tower, inputs: Sequence[Any]) -> Vectors:
    """Vectors of inputs; zeros for those in which the encoder finds nothing, as its network gives."""
    try:
        return encoder.embed_images(inputs) if tower == "image" else encoder.embed_texts(inputs)
    except InvalidField as error:
        if error.code != "no_direction":
            raise
        if len(inputs) == 1:
            return np.zeros((1, encoder.dim), np.float32)
    return np.concatenate([_embedded(encoder, tower, [one]) for one in inputs])


def _cycled(inputs: Sequence[Any], count: int) -> list[Any]:
    return [inputs[index % len(inputs)] for index in range(count)]


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
