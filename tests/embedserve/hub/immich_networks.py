"""Small random open_clip models, exported as Immich does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.embedserve.hub import tokenizer_files
from tests.embedserve.hub.networks import (
    DIM,
    MEAN,
    SIZE,
    STD,
    WIDTH,
    Network,
    export,
    pixels,
    random_weights,
    unit,
    write_json,
)

import open_clip  # isort: skip -- importable once `networks` has prepared torchvision


def clip(folder: Path, *, old: bool) -> Network:
    """`old`: float32 pixels and a batch of one, as Immich exported at first; else uint8 and any batch."""
    config = {
        "embed_dim": DIM,
        "vision_cfg": {"layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 8, "image_size": SIZE},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 2},
    }
    network = random_weights(open_clip.CLIP(**config))
    (folder / "textual").mkdir(parents=True)
    _graphs(folder, network, context=77, mean=MEAN, std=STD, old=old)
    write_json(
        folder / "visual/preprocess_cfg.json",
        {
            "size": [SIZE, SIZE],
            "mode": "RGB",
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "fill_color": 0,
        },
    )
    write_json(folder / "config.json", config)
    tokenizer_files.write(
        folder / "textual",
        tokenizer_files.clip(),
        pad=tokenizer_files.END,
        context=77,
        names=("input_ids", "attention_mask"),
    )
    transform = open_clip.image_transform(SIZE, is_train=False, mean=MEAN, std=STD)
    tokens = open_clip.SimpleTokenizer(context_length=77)
    return Network(
        lambda images: unit(network.encode_image(pixels(transform, images))),
        lambda texts: unit(network.encode_text(tokens(list(texts)))),
    )


def siglip(folder: Path) -> Network:
    half = (0.5, 0.5, 0.5)
    tokenizer = tokenizer_files.siglip()
    config = {
        "embed_dim": DIM,
        "init_logit_bias": -10,
        "vision_cfg": {"layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 8, "image_size": SIZE},
        "text_cfg": {
            "context_length": 64,
            "vocab_size": len(json.loads(tokenizer)["model"]["vocab"]),
            "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": WIDTH,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "pool_type": "last",
            "proj_bias": True,
        },
    }
    network = random_weights(
        open_clip.CustomTextCLIP(**{**config, "text_cfg": {**config["text_cfg"], "hf_tokenizer_name": None}})
    )
    (folder / "textual").mkdir(parents=True)
    _graphs(folder, network, context=64, mean=half, std=half, old=False)
    write_json(
        folder / "visual/preprocess_cfg.json",
        {"size": SIZE, "mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "squash"},
    )
    write_json(folder / "config.json", config)
    tokenizer_files.write(folder / "textual", tokenizer, pad="</s>", context=64, names=("input_ids",))
    transform = open_clip.image_transform(
        SIZE, is_train=False, mean=half, std=half, resize_mode="squash", interpolation="bicubic"
    )
    tokens = open_clip.tokenizer.HFTokenizer(str(folder / "textual"), context_length=64, clean="canonicalize")
    return Network(
        lambda images: unit(network.encode_image(pixels(transform, images))),
        lambda texts: unit(network.encode_text(tokens(list(texts)))),
    )


def _graphs(
    folder: Path, network: Any, *, context: int, mean: Sequence[float], std: Sequence[float], old: bool
) -> None:
    def normalised(image: Tensor) -> Tensor:
        values = image.permute(0, 3, 1, 2).float() / 255
        return (values - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    def image_embedding(image: Tensor) -> Tensor:
        return network.encode_image(image if old else normalised(image), normalize=True)

    def text_embedding(text: Tensor) -> Tensor:
        return network.encode_text(text, normalize=True)

    image = torch.zeros(1, 3, SIZE, SIZE) if old else torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8)
    free = None if old else {"image": {0: "batch"}, "text": {0: "batch"}}
    text = torch.ones(1 if old else 2, context, dtype=torch.int32)
    names = ("embedding", "embedding") if old else ("image_embedding", "text_embedding")
    export(
        network,
        image_embedding,
        folder / "visual/model.onnx",
        {"image": image},
        names[:1],
        free and {"image": free["image"]},
    )
    export(
        network,
        text_embedding,
        folder / "textual/model.onnx",
        {"text": text},
        names[1:],
        free and {"text": free["text"]},
    )
