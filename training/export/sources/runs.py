"""What `embedserve train` made: a run's folder (its best checkpoint, else its last) or a checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from embedserve.bundle import Preprocessing, Scoring
from embedserve.errors import InvalidField
from training.augment import IMAGENET_MEAN, IMAGENET_STD, centre, evaluation_share
from training.backbones import Backbone
from training.config import TrainConfig
from training.data.squares import squash
from training.evaluate.network import MethodEmbedding
from training.export.hashes import sha256_of
from training.export.image_networks import BackboneMean, BackbonePatches, attention_of
from training.export.original import Choices, Original, OriginalImages, OriginalTexts, ready
from training.method import Method
from training.methods.image_text import ImageText
from training.run import Trained, open_run

__all__ = ["EvaluationView", "original"]


def original(rest: str, choices: Choices) -> Original:
    """The encoder of a run that evaluations take as well: DINO's is its teacher.

    Args:
        rest: The run's folder, or a checkpoint.
        choices: `projection` adds what followed the encoder in the loss; `pooling` chooses between the class
            token and the mean of the patches of a vision transformer.

    Raises:
        NotFound: There is nothing at `rest`.
        InvalidField: It is no run or checkpoint, or a choice does not suit it.
        BadRequest: The checkpoint is damaged.
    """
    _refuse_what_runs_bring(rest, choices)
    trained = open_run(rest)
    method, config = trained.method, trained.settings.config
    network = ready(_network(method, choices))
    with torch.no_grad():
        dim = network(torch.zeros(1, 3, config.size, config.size)).shape[1]
    return Original(
        name=_name(trained),
        dim=dim,
        images=OriginalImages(
            network=network,
            preprocessing=_preprocessing(config),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            evaluated=EvaluationView(config.size, config.stored_size),
            patches=ready(BackbonePatches(method.encoder)),
            attention=_attention(method.encoder, config.size, choices),
        ),
        texts=_texts(method),
        scoring=_scoring(method),
        licence="unknown: ask who trained it",
        source=f"embedserve train {config.method}, step {trained.step:,}; {trained.path.name} with sha256 "
        f"{sha256_of(trained.path)}",
        notes=_notes(method, config, choices),
    )


class _TextVectors(nn.Module):
    """int64 [batch, length] → vectors of the space that images and captions share."""

    def __init__(self, method: Method[Any]) -> None:
        super().__init__()
        self.method = method

    def forward(self, tokens: Tensor) -> Tensor:
        return self.method.text_vectors(tokens)


def _texts(method: Method[Any]) -> OriginalTexts | None:
    if method.texts is None:
        return None
    rules = method.texts.rules
    return OriginalTexts(
        network=ready(_TextVectors(method)),
        tokenizer=rules.tokenizer,
        context_length=rules.context_length,
        pad_id=rules.pad_id,
        padding=rules.padding,
        cleaning=rules.cleaning,
        reference_tokens=rules.encode,
    )


def _scoring(method: Method[Any]) -> Scoring:
    """How cosines become probabilities, where the method learned it."""
    return Scoring(**method.scoring()) if isinstance(method, ImageText) else Scoring()


def _refuse_what_runs_bring(path: str, choices: Choices) -> None:
    given = {"weights": choices.weights, "random": choices.random, "size": choices.size}
    for name, value in given.items():
        if value:
            raise InvalidField(f"'{path}' brings its own weights and size; leave --{name} out.", param=name)


def _network(method: Method[Any], choices: Choices) -> nn.Module:
    encoder: Backbone = method.encoder
    if choices.pooling == "class" and encoder.kind != "vit":
        raise InvalidField(
            f"'{encoder.name}' is convolutional and has no class token; choose the pooling 'mean' or 'auto'.",
            param="pooling",
        )
    averaged = choices.pooling == "mean" and encoder.kind == "vit"
    if averaged and method.captioned:
        raise InvalidField(
            "Texts are compared with the vector that the run trained; leave pooling at 'auto'.",
            param="pooling",
        )
    if choices.projection:
        if averaged:
            raise InvalidField(
                "The projection head was trained behind the class token; leave --projection out, or "
                "leave pooling at 'auto'.",
                param="pooling",
            )
        if method.projection is None:
            raise InvalidField(
                f"{type(method).__name__} names no projection head; leave --projection out.",
                param="projection",
            )
        return nn.Sequential(encoder, method.projection)
    if averaged:
        return BackboneMean(encoder)
    return MethodEmbedding(method) if type(method).embed is not Method.embed else encoder


def _attention(encoder: Backbone, size: int, choices: Choices) -> nn.Module | None:
    if encoder.kind != "vit" or choices.pooling == "mean":
        return None
    return attention_of(encoder, size, size)


def _preprocessing(config: TrainConfig) -> Preprocessing:
    share = evaluation_share(config.size, config.stored_size)
    return Preprocessing(
        height=config.size,
        width=config.size,
        resize_to=round(config.size / share),
        interpolation="bilinear",  # of training's crops
    )


class EvaluationView:
    """The evaluation view of an image: cut from the stored square that training decoded it to."""

    def __init__(self, size: int, stored_size: int) -> None:
        self.size, self.stored_size = size, stored_size

    def __call__(self, image: Image.Image) -> Tensor:
        square = torch.from_numpy(squash(image, self.stored_size).copy())[None]
        return centre(
            square,
            torch.tensor([image.width / image.height]),
            self.size,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            share=evaluation_share(self.size, self.stored_size),
        )[0]


def _name(trained: Trained) -> str:
    """The folder's name, in the letters that a bundle's may have."""
    named = trained.folder.resolve().name if trained.folder else trained.path.stem
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", named).strip("-._")
    return f"{words or trained.settings.config.method}-{trained.step}"[-128:].lstrip("-._")


def _notes(method: Method[Any], config: TrainConfig, choices: Choices) -> tuple[str, ...]:
    kind = type(method)
    network = method.encoder.name
    notes = [f"Trained with {kind.__name__} ({kind.paper}); network {network}, {config.size} pixels."]
    if config.start:
        start = Path(config.start).name if Path(config.start).exists() else config.start
        notes.append(f"Training started from '{start}', whose licence may bind these weights too.")
    if choices.projection:
        notes.append("Its vectors are those behind the projection head, which the loss compared.")
    if choices.pooling == "mean":
        notes.append("Its vectors are the mean of the patches.")
    return tuple(notes)
