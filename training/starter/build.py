"""The starter as an encoder bundle: networks → ONNX graphs → proof against PyTorch → folder."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from embedserve.bundle import (
    Bundle,
    Description,
    ImageTower,
    Probe,
    Scoring,
    TextTower,
    new_bundle,
    open_bundle,
    seal,
)
from embedserve.encoder import Encoder
from training.export.calibration import PROBE_TEXT, drawing, probe_png
from training.export.graphs import export_graph
from training.starter import meaning, sources, visual
from training.starter.compact import Store, store_weights
from training.starter.towers import PAD, SEMANTIC, SIZE, VISUAL, ImageNetwork, TextNetwork, class_table

__all__ = ["BEST", "LOGIT_SCALE", "LOOKS", "SHARPNESS", "Networks", "build", "networks"]

LOOKS = 0.75
"""a: three quarters of an image–image cosine are looks. `benchmarks/starter_quality.py` compares others."""
BEST, SHARPNESS = 20, 0.6
LOGIT_SCALE = 33.0
"""Least negative log-likelihood of zero-shot probabilities; `benchmarks/starter_quality.py` fits it."""
MIN_COSINE = 0.999
DIM = SEMANTIC + VISUAL
MEASURED = Path(__file__).parent / "measured.json"
"""Quality, as `benchmarks/starter_quality.py --record` wrote it down."""
LICENCE = "Apache-2.0"

HARD_TEXTS = (
    "",
    ".",
    "a",
    "🍒",
    "red fruit",
    "Ein Hund, 狗, كلب",
    "SELECT * FROM t;",
    "12345 67890",
    "word " * 300,
)

TEXT_STORES: dict[str, Store] = {"words": "int8 rows", "positions": "float16"}


@dataclass(frozen=True)
class Networks:
    """The starter in PyTorch, float32: what the bundle is measured against."""

    image: ImageNetwork
    text: TextNetwork
    tokenizer: Tokenizer

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, cut to the context, unpadded."""
        return [encoded.ids for encoded in self.tokenizer.encode_batch(list(texts))]

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """float32 [n, 640]."""
        return torch.cat([self.text(torch.from_numpy(part)) for part in _padded(self.tokens(texts))])

    def embed_meanings(self, texts: Sequence[str]) -> Tensor:
        """The semantic part of `embed_texts`, float32 [n, 384]; short texts are run with short ones."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = self.embed_texts([texts[index] for index in order])
        return vectors[torch.from_numpy(np.argsort(order))][:, :SEMANTIC]

    @torch.no_grad()
    def embed_images(self, pixels: NDArray[np.uint8]) -> Tensor:
        """uint8 [n, 224, 224, 3] → float32 [n, 640]."""
        return torch.cat(
            [self.image(torch.from_numpy(pixels[i : i + 32])) for i in range(0, len(pixels), 32)]
        )


def networks(*, looks: float = LOOKS, learned: bool = True) -> Networks:
    """Reads the weights and joins them. Takes a few seconds, most of it for the class descriptions.

    Args:
        looks: a, the visual part's share.
        learned: Whether what was learned from drawings has a say; without, meaning is ConSE alone.
    """
    text = TextNetwork(sources.sentence_weights(), sources.CONTEXT_LENGTH).eval()
    tokenizer = Tokenizer.from_str(sources.tokenizer_json().decode("utf-8"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(sources.CONTEXT_LENGTH)

    def join(classes: Tensor) -> Networks:
        mean, basis = visual.load()
        image = ImageNetwork(
            _fold_batch_norms(sources.classifier()),
            classes,
            mean,
            basis,
            looks=looks,
            best=BEST,
            sharpness=SHARPNESS,
            meaning=meaning.load() if learned else None,
        )
        return Networks(image.eval(), text, tokenizer)

    return join(class_table(sources.class_descriptions(), join(torch.zeros(0)).embed_meanings))


def build(out: Path) -> Bundle:
    """Writes the bundle to `out` and proves it: graphs against PyTorch, then the whole path by its probe.

    Raises:
        BundleError: `out` holds something else, or an ingredient is missing.
        RuntimeError: A graph departs from its network by more than the probe would forgive.
    """
    with new_bundle(out) as folder:
        joined = networks()
        image_graph, text_graph = graphs(joined)
        drawings = _drawings(200)
        parity = {
            "image": _agreement(image_graph, [drawings[i : i + 25] for i in range(0, 200, 25)], joined.image),
            "text": _agreement(text_graph, _padded(joined.tokens(_texts(300))), joined.text),
            "command": "embedserve export starter",
        }
        measured = json.loads(MEASURED.read_text(encoding="utf-8"))
        onnx.save(image_graph, folder / "image.onnx")
        onnx.save(text_graph, folder / "text.onnx")
        (folder / "tokenizer.json").write_bytes(sources.tokenizer_json())
        (folder / "LICENSES.md").write_text(_beside("licences.md"), encoding="utf-8")
        (folder / "README.md").write_text(_card(parity, measured), encoding="utf-8")
        description = Description(
            name="starter",
            dim=DIM,
            image=ImageTower(preprocessing=visual.PREPROCESSING),
            text=TextTower(context_length=sources.CONTEXT_LENGTH, pad_id=PAD),
            scoring=Scoring(logit_scale=LOGIT_SCALE),
            dims=(SEMANTIC, DIM),
            precision="float32; weights stored in float16 (image) and int8 (text)",
            parity=parity,
            evaluation=measured,
            licence=LICENCE,
            source=", ".join(f"{name} {version}" for name, version in sources.versions().items()),
        )
        seal(folder, description)
        probe = Encoder.load(folder).make_probe(probe_png(), PROBE_TEXT)
        seal(folder, description.model_copy(update={"probe": _with_least(probe)}))
    Encoder.load(out).prove()
    return open_bundle(out)


def graphs(joined: Networks) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The two graphs as they are shipped, weights stored in 16 (image) and 8 bits (text)."""
    image, text = full_graphs(joined)
    return store_weights(image, {}, "float16"), store_weights(text, TEXT_STORES, "int8 blocks")


def full_graphs(joined: Networks) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The two graphs with float32 weights."""
    outputs = {"embedding": ("batch", DIM)}
    pixels = torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
    image = export_graph(joined.image, pixels, "pixels", {0: ("batch", 4096)}, outputs)
    axes = {0: ("batch", 4096), 1: ("length", sources.CONTEXT_LENGTH)}
    text = export_graph(joined.text, torch.ones(2, 8, dtype=torch.int64), "tokens", axes, outputs)
    return image, text


def _agreement(
    model: onnx.ModelProto, batches: Sequence[NDArray[np.generic]], network: nn.Module
) -> dict[str, Any]:
    """Cosines between the graph in ONNX Runtime and the network in PyTorch, float32."""
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    cosines: list[float] = []
    for batch in batches:
        with torch.no_grad():
            expected = network(torch.from_numpy(batch)).numpy()
        cosines += (session.run(None, {name: batch})[0] * expected).sum(axis=1).tolist()
    least = min(cosines)
    if not least >= 0.98:
        raise RuntimeError(
            f"a vector of the exported graph has cosine {least:.4f} to PyTorch's; at least 0.98 is needed"
        )
    return {
        "n": len(cosines),
        "min_cosine": round(least, 4),
        "mean_cosine": round(sum(cosines) / len(cosines), 5),
    }


def _fold_batch_norms(network: nn.Module) -> nn.Module:
    """Each batch norm into the convolution before it: the same numbers, half the nodes."""
    from timm.layers.norm_act import BatchNormAct2d

    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (first_name, first), (name, norm) in pairwise(children):
            if isinstance(first, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(parent, first_name, fuse_conv_bn_eval(first, norm))
                setattr(parent, name, nn.Sequential(norm.drop, norm.act))
    return network


def _padded(tokens: Sequence[Sequence[int]], size: int = 50) -> list[NDArray[np.int64]]:
    """Batches of `size` texts, each padded to its longest."""
    batches = []
    for start in range(0, len(tokens), size):
        part = tokens[start : start + size]
        batch = np.full((len(part), max(map(len, part))), PAD, np.int64)
        for row, ids in zip(batch, part, strict=True):
            row[: len(ids)] = ids
        batches.append(batch)
    return batches


def _texts(count: int) -> list[str]:
    """Hard ones first, such as none at all, then class names and definitions by turns."""
    descriptions = sources.class_descriptions()[:: 2 * 1000 // count]
    return [*HARD_TEXTS, *(text for names, definition in descriptions for text in (names[0], definition))][
        :count
    ]


def _drawings(count: int) -> NDArray[np.uint8]:
    """Pictures of shapes, ramps and noise, uint8 [count, 224, 224, 3]; the same ones every time."""
    draw = random.Random(0)  # noqa: S311
    return np.stack([np.asarray(drawing(draw, SIZE, SIZE)) for _ in range(count)])


def _with_least(probe: Probe) -> Probe:
    return probe.model_copy(update={"min_cosine": MIN_COSINE})


def _beside(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _card(parity: dict[str, Any], measured: dict[str, Any]) -> str:
    rows = [
        f"| {tower} | {parity[tower]['n']} | {parity[tower]['min_cosine']} | {parity[tower]['mean_cosine']} |"
        for tower in ("image", "text")
    ]
    parts = {
        "parity": "\n".join(rows),
        "measured": measured["table"],
        "drawings": measured["drawings"],
        "scale": f"{LOGIT_SCALE:g}",
    }
    card = _beside("card.md")
    for name, text in parts.items():
        card = card.replace(f"{{{name}}}", text)
    return card
