"""An encoder as its source has it → a bundle that is proven to be the same."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from embedserve.bundle import (
    Bundle,
    Description,
    ImageOutputs,
    ImageTower,
    TextTower,
    new_bundle,
    open_bundle,
    seal,
)
from embedserve.config import Limits
from embedserve.encoder import Encoder
from training.export import parity
from training.export.calibration import PROBE_TEXT, Calibration, probe_png
from training.export.card import card
from training.export.graphs import write_graph
from training.export.original import Original, OriginalImages, OriginalTexts
from training.export.precision import LEAST_COSINE, Chosen, Inputs, Wanted, choose
from training.export.towers import ImageGraph, TextGraph

__all__ = ["write"]

MOST_AT_ONCE = 4096
"""Rows of a batch that the graphs are declared for."""


def write(
    original: Original,
    out: Path,
    *,
    calibration: Calibration,
    precision: Wanted = "fp32",
    command: str = "",
    say: Callable[[str], None] = lambda step: None,
) -> Bundle:
    """Writes the bundle of `original` to `out`, measured against it; nothing is left where that fails.

    Args:
        original: What a source handed over.
        out: New, empty, or the folder of a bundle, which is replaced at the very end.
        calibration: What serving and PyTorch are compared on.
        precision: What to compute in; 'auto' is what is fastest on this machine's CPU and keeps enough.
        command: What was typed, for the model card.
        say: Told what is being done, before each step that takes a while.

    Raises:
        Departed: Serving's vectors are not those of the network.
        BundleError: `out` holds something else.
        EmbedServeError: The network cannot be written as a graph, or the precision that was asked for costs
            too much of its vectors.
    """
    with new_bundle(out) as folder:
        say("Writing it as ONNX graphs")
        description = _write_towers(folder, original)
        seal(folder, description)
        encoder = Encoder.load(folder)
        say(f"Comparing serving with PyTorch ({calibration.origin})")
        figures = parity.measure(encoder, original, calibration)
        parity.require(figures)
        notes = original.notes
        if precision != "fp32":
            say("Measuring other precisions")
            description, chosen = _reduce(folder, description, encoder, calibration, precision)
            figures |= {"precision": {tower: one.figures for tower, one in chosen.items()}}
            notes += tuple(f"{tower}: {note}" for tower, one in chosen.items() for note in one.notes)
            encoder = Encoder.load(folder)
        probe = encoder.make_probe(
            probe_png() if original.images else None, PROBE_TEXT if original.texts else None
        )
        if "int8" in description.precision:
            probe = probe.model_copy(update={"min_cosine": LEAST_COSINE})
        description = description.model_copy(update={"parity": figures, "probe": probe})
        text = card(description, replace(original, notes=notes), command)
        (folder / "README.md").write_text(text, encoding="utf-8")
        seal(folder, description)
    Encoder.load(out).prove()
    return open_bundle(out)


def _write_towers(folder: Path, original: Original) -> Description:
    images, texts = original.images, original.texts
    image = text = None
    if images is not None:
        outputs = _write_images(folder / "image.onnx", images, original.dim)
        image = ImageTower(preprocessing=images.preprocessing, outputs=outputs)
    if texts is not None:
        _write_texts(folder / "text.onnx", texts, original.dim)
        (folder / "tokenizer.json").write_text(texts.tokenizer, encoding="utf-8")
        text = TextTower(
            context_length=texts.context_length,
            pad_id=texts.pad_id,
            padding=texts.padding,
            cleaning=texts.cleaning,
        )
    return Description(
        name=original.name,
        dim=original.dim,
        image=image,
        text=text,
        scoring=original.scoring,
        dims=original.dims,
        licence=original.licence,
        source=original.source,
    )


def _reduce(
    folder: Path, description: Description, encoder: Encoder, calibration: Calibration, wanted: Wanted
) -> tuple[Description, dict[str, Chosen]]:
    """Puts graphs in another precision where the float32 ones lie, and seals the folder again."""
    inputs: dict[str, Inputs] = {}
    if encoder.has_images:
        rows = [encoder.read_image(one.data, Limits()) for one in calibration.pictures]
        inputs["image"] = Inputs(rows, np.stack)
    if encoder.has_text:
        # A text without tokens has no vector of its own.
        tokens = [np.array(ids, np.int64) for ids in encoder.tokenize(calibration.texts) if ids]
        inputs["text"] = Inputs(tokens, lambda rows: encoder.tokenizer.pad([row.tolist() for row in rows]))
    chosen: dict[str, Chosen] = {}
    with tempfile.TemporaryDirectory(prefix=".precision-", dir=folder.parent) as trials:
        for tower, some in inputs.items():
            path = folder / f"{tower}.onnx"
            chosen[tower] = choose(path, wanted, some, Path(trials))
            if chosen[tower].path != path:
                _replace(path, chosen[tower].path)
    words = {one.words for one in chosen.values()}
    if len(words) > 1:
        words = {", ".join(f"{one.words} ({tower})" for tower, one in chosen.items())}
    description = description.model_copy(update={"precision": words.pop()})
    seal(folder, description)
    return description, chosen


def _replace(path: Path, other: Path) -> None:
    """Takes a graph, and its weights where they lie beside it under the name that it knows them by."""
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    other.replace(path)
    beside = other.with_name(f"{other.name}.data")
    if beside.exists():
        beside.replace(path.with_name(beside.name))


def _write_images(path: Path, images: OriginalImages, dim: int) -> ImageOutputs | None:
    spec = images.preprocessing
    further = {"patches": images.patches, "attention": images.attention}
    offered = {name: network for name, network in further.items() if network is not None}
    shapes = _shapes(offered, spec.height, spec.width)
    grid = _grid(shapes, spec.height, spec.width)
    if grid is None:
        offered, shapes = {}, {}
    network = ImageGraph(images.network, images.mean, images.std, list(offered.values()))
    pixels = torch.zeros(2, spec.height, spec.width, 3, dtype=torch.uint8)
    outputs: dict[str, Sequence[int | str]] = {"embedding": ("batch", dim)}
    outputs |= {name: ("batch", *shape) for name, shape in shapes.items()}
    free = {0: ("batch", MOST_AT_ONCE)}
    write_graph(path, network, pixels, name="pixels", axes=free, outputs=outputs)
    if grid is None:
        return None
    return ImageOutputs(
        rows=grid[0],
        columns=grid[1],
        patches=shapes["patches"][1] if "patches" in shapes else None,
        attention=shapes["attention"][0] if "attention" in shapes else None,
    )


def _shapes(networks: dict[str, nn.Module], height: int, width: int) -> dict[str, tuple[int, int]]:
    """What each network gives for one image."""
    image = torch.zeros(1, 3, height, width)
    with torch.no_grad():
        return {name: tuple(network(image).shape[1:]) for name, network in networks.items()}


def _grid(shapes: dict[str, tuple[int, int]], height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of square cells; None where there are none, or they do not fill the image."""
    cells = {shape[0] if name == "patches" else shape[1] for name, shape in shapes.items()}
    if len(cells) != 1:
        return None
    count = cells.pop()
    rows = max(1, round(math.sqrt(count * height / width)))
    return (rows, count // rows) if count % rows == 0 else None


def _write_texts(path: Path, texts: OriginalTexts, dim: int) -> None:
    free = {0: ("batch", MOST_AT_ONCE)}
    length = texts.context_length
    if texts.padding == "longest":
        free[1] = ("length", texts.context_length)
        length = min(8, texts.context_length)
    network, tokens = TextGraph(texts.network), torch.ones(2, length, dtype=torch.int64)
    write_graph(path, network, tokens, name="tokens", axes=free, outputs={"embedding": ("batch", dim)})
