"""open_clip's own zero-shot classifier and ours agree, on the same weights and images.

The architectures have their full width, images and vocabulary, but `DEPTH` blocks of each transformer, since
writing a graph takes a second for each; FULL_DEPTH=1 in the environment takes all (two minutes).
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embedserve.classify import Classifier
from embedserve.config import ServeConfig
from embedserve.encoder import Encoder
from embedserve.towers import Towers
from tests.training.export.texts import sentencepiece_like
from training.export.calibration import built_in
from training.export.original import Choices
from training.export.sources.open_clip import original
from training.export.write import write

import open_clip  # isort: skip -- after the source, which prepares torchvision
import timm  # isort: skip

LABELS = ["cat", "fire engine", "Tuscan village", "c++ source code", "naïve painting"]
TEMPLATES = ("a photo of a {}.", "{}", "a low-resolution picture of “{}” &amp; nothing else")
DEPTH = None if os.environ.get("FULL_DEPTH") else 2
SHARP = {"init_logit_scale": float(np.log(100))}
"""Random weights tell labels apart by little; as trained ones do, the scale makes that count."""
SIZES = [(224, 224), (320, 240), (97, 211)]


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize(
            (width, height)
        )
        for width, height in SIZES
    ]


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def open_clips(model: Any, tokenizer: Any, transform: Any) -> np.ndarray[Any, Any]:
    """[images, labels] of probabilities, in open_clip's own words."""
    with torch.no_grad():
        classifier = open_clip.build_zero_shot_classifier(model, tokenizer, LABELS, TEMPLATES)
        vectors = model.encode_image(torch.stack([transform(one) for one in pictures()]), normalize=True)
        logits = model.logit_scale.exp() * vectors @ classifier
        chances = logits.softmax(dim=1) if model.logit_bias is None else (logits + model.logit_bias).sigmoid()
    return np.asarray(chances)


def ours(folder: Path) -> np.ndarray[Any, Any]:
    """[images, labels] of probabilities, as /v1/classify computes them."""

    async def classify() -> np.ndarray[Any, Any]:
        encoder = Encoder.load(folder, threads=1)
        towers = Towers(encoder, ServeConfig())
        try:
            classifier = Classifier(towers)
            labels = await classifier.label_vectors({label: [label] for label in LABELS}, TEMPLATES)
            pixels = [encoder.read_image(png(picture), ServeConfig().limits) for picture in pictures()]
            rows = classifier.score(encoder.embed_images(pixels), LABELS, labels)
        finally:
            await towers.close()
        return np.array(
            [[{one.label: one.probability for one in row}[label] for label in LABELS] for row in rows]
        )

    return asyncio.run(classify())


def described(architecture: str, at: Path) -> str:
    """The architecture as a folder, with a scale as trained weights have it, and less deep.

    SigLIP with a small vocabulary as well: its own lies on the hub.
    """
    config = open_clip.get_model_config(architecture) | SHARP
    preprocessing = {}
    if DEPTH:
        config["text_cfg"]["layers"] = DEPTH
        config["vision_cfg"]["layers"] = [1] * 4 if architecture.startswith("RN") else DEPTH
    if "SigLIP" in architecture:
        config["init_logit_bias"] = -5
        config["text_cfg"]["vocab_size"] = 300
        preprocessing = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}
        sentencepiece_like(at)
    at.mkdir(exist_ok=True)
    (at / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": preprocessing})
    )
    return f"local-dir:{at}"


@pytest.fixture
def shallow_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip has no option for the depth of a timm tower."""
    if DEPTH:
        create = timm.create_model
        monkeypatch.setattr(timm, "create_model", functools.partial(create, depth=DEPTH))


@pytest.mark.usefixtures("shallow_timm")
@pytest.mark.parametrize("architecture", ["ViT-B-32", "RN50-quickgelu", "ViT-B-16-SigLIP"])
def test_probabilities_agree_to_a_thousandth(architecture: str, tmp_path: Path) -> None:
    source = described(architecture, tmp_path / architecture)
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms(source, load_weights=False)
    expected = open_clips(model.eval(), open_clip.get_tokenizer(source), transform)
    del model  # the full ones take a gigabyte
    torch.manual_seed(0)
    few = built_in(images=4, texts=12)
    bundle = write(original(source, Choices(random=True)), tmp_path / "bundle", calibration=few)
    found = ours(bundle.folder)
    assert np.ptp(expected, axis=1).max() > 0.02  # the labels differ, so that agreement says something
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
