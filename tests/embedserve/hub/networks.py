"""Small random networks of the kinds that are published, exported as their publishers do.

Each function writes one repository and returns the network it was made from, to be compared with.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tests.embedserve.hub import tokenizer_files
from training import torchvision_ops

torchvision_ops.register()

import transformers  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms.functional import crop as cut  # noqa: E402

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DIM, SIZE, WIDTH = 24, 32, 32
CARD = "---\nlicense: {licence}\ntags: [clip]\n---\n# A model\n"
Texts = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Network:
    """What the repository was made from: unit vectors by PyTorch, with its library's own preprocessing."""

    images: Callable[[Sequence[Image.Image]], np.ndarray] | None = None
    texts: Texts | None = None


class Called(nn.Module):
    """A function with parameters, for the exporter."""

    def __init__(self, owner: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs)


def export(
    owner: nn.Module,
    function: Callable[..., Any],
    path: Path,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    free: Mapping[str, Mapping[int, str]] | None = None,
    opset: int = 17,
) -> None:
    """As optimum and Immich export: traced, with the dimensions in `free` left open."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # ONNX has no such operator
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                Called(owner, function),
                tuple(inputs.values()),
                str(path),
                dynamo=False,
                opset_version=opset,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes=dict(free or {}),
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def pixels(transform: Callable[[Image.Image], Tensor], images: Sequence[Image.Image]) -> Tensor:
    return torch.stack([transform(image) for image in images])


def unit(vectors: Tensor) -> np.ndarray:
    return F.normalize(vectors, dim=-1).detach().numpy()


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def shortest_then_crop(resize: int, crop: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [
            transforms.Resize(resize, bicubic),
            lambda image: cut(
                image, int((image.height - crop) / 2), int((image.width - crop) / 2), crop, crop
            ),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


# ---- transformers.js: CLIP and SigLIP -------------------------------------------------------------------

CLIP_PREPROCESSOR = {
    "do_center_crop": True,
    "do_resize": True,
    "do_normalize": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "size": {"shortest_edge": SIZE},
    "resample": 3,
    "image_mean": MEAN,
    "image_std": STD,
}
MERGES = 600
BATCH_OF_IDS = {"input_ids": {0: "batch_size", 1: "sequence_length"}}
BATCH_OF_PIXELS = {"pixel_values": {0: "batch_size"}}


def huggingface_clip(*, padded_with: str = tokenizer_files.END) -> tuple[transformers.CLIPModel, str]:
    tokenizer = tokenizer_files.clip(MERGES)
    vocabulary = json.loads(tokenizer)["model"]["vocab"]
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": DIM,
    }
    config = transformers.CLIPConfig(
        text_config={
            **tower,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 77,
            "bos_token_id": vocabulary[tokenizer_files.START],
            "eos_token_id": vocabulary[tokenizer_files.END],
            "pad_token_id": vocabulary[padded_with],
        },
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
        projection_dim=DIM,
    )
    return random_weights(transformers.CLIPModel(config)), tokenizer


def random_weights(network: Any) -> Any:
    """Large enough that vectors of different inputs differ: the usual 0.02 makes them all alike."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.3, generator=generator)
        elif "bias" in name:
            nn.init.normal_(weight, std=0.1, generator=generator)
    return network.eval()


def transformers_tokens(folder: Path, length: int) -> Callable[[Sequence[str]], dict[str, Tensor]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda texts: tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )


def transformers_js_clip(folder: Path, *, masks: bool = False) -> Network:
    """`masks`: the text graph takes an attention mask, as some exports do."""
    network, tokenizer = huggingface_clip()
    texts = network.text_model, network.text_projection
    names = ("input_ids", "attention_mask") if masks else ("input_ids",)

    def text_embeds(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return texts[1](texts[0](input_ids=ids, attention_mask=mask).pooler_output)

    def image_embeds(values: Tensor) -> Tensor:
        return network.visual_projection(network.vision_model(pixel_values=values).pooler_output)

    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = dict(zip(names, (ids, torch.tensor([[1, 1, 1], [1, 1, 0]])), strict=False))
    free = {name: {0: "batch_size", 1: "sequence_length"} for name in names}
    export(network, text_embeds, folder / "onnx/text_model.onnx", inputs, ["text_embeds"], free)
    values = torch.zeros(2, 3, SIZE, SIZE)
    export(
        network,
        image_embeds,
        folder / "onnx/vision_model.onnx",
        {"pixel_values": values},
        ["image_embeds"],
        BATCH_OF_PIXELS,
    )
    write_json(folder / "preprocessor_config.json", CLIP_PREPROCESSOR)
    write_json(folder / "config.json", {"model_type": "clip", "logit_scale_init_value": 2.6592})
    tokenizer_files.write(
        folder, tokenizer, pad=tokenizer_files.END, context=77, names=("input_ids", "attention_mask")
    )
    (folder / "README.md").write_text(CARD.format(licence="mit"))
    transform, tokens = shortest_then_crop(SIZE, SIZE, MEAN, STD), transformers_tokens(folder, 77)

    def text_vectors(lines: Sequence[str]) -> np.ndarray:
        found = tokens(lines)
        return unit(text_embeds(found["input_ids"], found["attention_mask"]))

    return Network(lambda images: unit(image_embeds(pixels(transform, images))), text_vectors)


def add_variants(folder: Path) -> None:
    """The same towers in half precision and in integers, as the tools of ONNX Runtime write them."""
    for name in ("vision_model", "text_model"):
        whole = onnx.load(folder / f"onnx/{name}.onnx")
        onnx.save(convert_float_to_float16(whole), folder / f"onnx/{name}_fp16.onnx")
        quantize_dynamic(folder / f"onnx/{name}.onnx", folder / f"onnx/{name}_quantized.onnx")


def move_weights_outside(folder: Path) -> None:
    """As exporters do above 2 GB, where one file of protobuf cannot hold them."""
    for name in ("vision_model", "text_model"):
        path = folder / f"onnx/{name}.onnx"
        model = onnx.load(path)
        path.unlink()
        onnx.save(model, path, save_as_external_data=True, location=f"{name}.onnx_data", size_threshold=64)


def transformers_js_siglip(folder: Path) -> Network:
    tokenizer = tokenizer_files.siglip()
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vocabulary = len(json.loads(tokenizer)["model"]["vocab"])
    config = transformers.SiglipConfig(
        text_config={
            **tower,
            "vocab_size": vocabulary,
            "max_position_embeddings": 64,
            "projection_size": WIDTH,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 1,
        },
        vision_config={**tower, "image_size": SIZE, "patch_size": 8},
    )
    network = random_weights(transformers.SiglipModel(config))

    def text_vector(ids: Tensor) -> Tensor:
        return network.text_model(input_ids=ids).pooler_output

    def image_vector(values: Tensor) -> tuple[Tensor, Tensor]:
        found = network.vision_model(pixel_values=values)
        return found.last_hidden_state, found.pooler_output

    export(
        network,
        text_vector,
        folder / "onnx/text_model.onnx",
        {"input_ids": torch.ones(2, 64, dtype=torch.int64)},
        ["pooler_output"],
        BATCH_OF_IDS,
    )
    export(
        network,
        image_vector,
        folder / "onnx/vision_model.onnx",
        {"pixel_values": torch.zeros(2, 3, SIZE, SIZE)},
        ["last_hidden_state", "pooler_output"],
        BATCH_OF_PIXELS,
    )
    half = (0.5, 0.5, 0.5)
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_resize": True,
            "size": {"height": SIZE, "width": SIZE},
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_mean": half,
            "image_std": half,
        },
    )
    write_json(
        folder / "config.json", {"model_type": "siglip", "text_config": {"model_type": "siglip_text_model"}}
    )
    tokenizer_files.write(folder, tokenizer, pad="</s>", context=64, names=("input_ids",))
    (folder / "README.md").write_text(CARD.format(licence="apache-2.0"))
    squash = transforms.Compose(
        [
            transforms.Resize((SIZE, SIZE), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(half, half),
        ]
    )
    tokens = transformers_tokens(folder, 64)
    return Network(
        lambda images: unit(image_vector(pixels(squash, images))[1]),
        lambda texts: unit(text_vector(tokens(texts)["input_ids"])),
    )


# ---- DINOv2 ---------------------------------------------------------------------------------------------


def dinov2(folder: Path) -> Network:
    config = transformers.Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=8,
        mlp_ratio=2,
    )
    network = random_weights(transformers.Dinov2Model(config))

    def hidden(values: Tensor) -> Tensor:
        return network(pixel_values=values).last_hidden_state

    export(
        network,
        hidden,
        folder / "onnx/model.onnx",
        {"pixel_values": torch.zeros(2, 3, SIZE, SIZE)},
        ["last_hidden_state"],
        BATCH_OF_PIXELS,
        opset=18,
    )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_center_crop": True,
            "crop_size": {"height": SIZE, "width": SIZE},
            "size": {"shortest_edge": 40},
            "resample": 3,
            "image_mean": mean,
            "image_std": std,
        },
    )
    write_json(folder / "config.json", {"model_type": "dinov2"})
    (folder / "README.md").write_text(CARD.format(licence="apache-2.0"))
    transform = shortest_then_crop(40, SIZE, mean, std)
    return Network(lambda images: unit(hidden(pixels(transform, images))[:, 0]))


# ---- Qdrant ---------------------------------------------------------------------------------------------


def qdrant_clip(vision: Path, text: Path) -> Network:
    network = transformers_js_clip(vision, masks=True)
    text.mkdir(parents=True)
    (vision / "onnx/text_model.onnx").rename(text / "model.onnx")
    (vision / "onnx/vision_model.onnx").rename(vision / "model.onnx")
    (vision / "onnx").rmdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (vision / name).rename(text / name)
    write_json(text / "config.json", {"model_type": "clip_text_model", "max_position_embeddings": 77})
    (text / "README.md").write_text(CARD.format(licence="mit"))
    return network
