"""Encoders of Hugging Face transformers: `hf:facebook/dinov2-small`, or a folder of `save_pretrained`.

CLIP and SigLIP with both towers; DINOv2 (with registers too), ViT and BEiT with their class token, or the
mean of their patches. `hf:owner/name@revision` takes that revision of a repository on the hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from embedserve.bundle import Preprocessing, Scoring
from embedserve.errors import EmbedServeError, InvalidField, NotFound, closest
from training import torchvision_ops
from training.export.hashes import sha256_of
from training.export.image_networks import HuggingFaceAttention, HuggingFacePatches, HuggingFacePooled
from training.export.licences import licence_of, stated_in
from training.export.original import Choices, Original, OriginalImages, OriginalTexts, ready
from training.export.tokenizers import from_hugging_face

torchvision_ops.register()

import transformers  # noqa: E402 -- imports torchvision

__all__ = ["FAMILIES", "original"]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an encoder lies: a folder, or a repository on the hub at one revision."""

    name: str
    revision: str | None
    folder: Path | None

    @property
    def arguments(self) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": self.name, "revision": self.revision}


@dataclass(frozen=True, slots=True)
class _Family:
    """How one kind of model gives its vectors."""

    vectors: Literal["both towers", "class token", "its own pooling"]
    dim: Callable[[Any], int]
    options: Mapping[str, Any]
    """Of `from_pretrained`."""


FAMILIES: Mapping[str, _Family] = {
    "clip": _Family("both towers", lambda config: config.projection_dim, {}),
    "siglip": _Family("both towers", lambda config: config.vision_config.hidden_size, {}),
    "dinov2": _Family("class token", lambda config: config.hidden_size, {}),
    "dinov2_with_registers": _Family("class token", lambda config: config.hidden_size, {}),
    "vit": _Family("class token", lambda config: config.hidden_size, {"add_pooling_layer": False}),
    "beit": _Family("its own pooling", lambda config: config.hidden_size, {}),
}
"""`model_type` of a config.json → what to do with it."""


SIGLIP_TOKENS = (
    "Texts become the tokens of transformers' own SigLIP tokenizer but for typed special tokens (</s>, "
    "<unk>), which are text here, and some sequences of rare combining characters."
)


def original(rest: str, choices: Choices) -> Original:
    """An encoder of transformers.

    Args:
        rest: What follows `hf:`: a folder, or a repository with an optional `@revision`.
        choices: `random` builds it from its config.json only; `pooling` chooses between class token and mean
            of patches, for encoders of images alone.

    Raises:
        NotFound: No such folder, or a kind of model that is not in `FAMILIES`.
        InvalidField: Weights that do not fill the model, or preprocessing that a bundle cannot say.
        EmbedServeError: The hub cannot be reached and its cache lacks a file.
    """
    place = _place(rest)
    if choices.weights:
        raise InvalidField(
            "A model of Hugging Face lies in a folder with its configuration; give that folder as the source "
            f"(hf:FOLDER) instead of --weights '{choices.weights}'.",
            param="weights",
        )
    with _reaching(place):
        config = transformers.AutoConfig.from_pretrained(**place.arguments)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise NotFound(
            f"'{place.name}' is a {config.model_type} model; {closest(config.model_type, FAMILIES)}",
            param="source",
        )
    if choices.pooling != "auto" and family.vectors != "class token":
        raise InvalidField(
            f"A {config.model_type} model pools as it was trained; leave pooling at 'auto', not "
            f"'{choices.pooling}'.",
            param="pooling",
        )
    with _reaching(place):
        processor = _untyped(transformers.AutoImageProcessor).from_pretrained(
            **place.arguments, backend="pil"
        )
    tokenizer = None
    if family.vectors == "both towers":
        tokenizer = _tokenizer(place)
    model = ready(_model(place, config, family, random=choices.random))
    return Original(
        name=_encoder_name(place, random=choices.random),
        dim=family.dim(config),
        images=_images(model, family, processor, choices.pooling),
        texts=_texts(model, config, tokenizer) if tokenizer is not None else None,
        scoring=_scoring(model) if tokenizer is not None else Scoring(),
        licence=_licence(place),
        source=_origin(place, config, random=choices.random),
        notes=(SIGLIP_TOKENS,) if type(tokenizer).__name__ == "SiglipTokenizer" else (),
    )


# --- what lies where -----------------------------------------------------------------------------------


def _place(rest: str) -> _Place:
    folder = Path(rest)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise NotFound(
                f"'{folder}' holds no config.json; give a folder that save_pretrained wrote.", param="source"
            )
        return _Place(str(folder), None, folder)
    name, _, revision = rest.partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise NotFound(
            f"'{rest}' is neither a folder nor a repository of the Hugging Face hub; give a folder or "
            "owner/name, such as hf:facebook/dinov2-small.",
            param="source",
        )
    return _Place(name, revision or None, None)


@contextmanager
def _reaching(place: _Place) -> Iterator[None]:
    """Loads without transformers' own reports, and turns what goes wrong into a sentence."""
    logs = _untyped(transformers.utils.logging)
    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        advice = (
            "Complete the folder"
            if place.folder
            else "Without a network, fetch it on a machine that has one and copy its cache (HF_HOME), or "
            "save it with save_pretrained and give that folder"
        )
        raise EmbedServeError(
            f"transformers could not load '{place.name}': {text[:300]}{'…' if len(text) > 300 else ''} "
            f"{advice}.",
            code="not_fetched",
        ) from error
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")


def _tokenizer(place: _Place) -> Any:
    with _reaching(place):
        # transformers makes an empty tokenizer of a folder that has none.
        if not any(
            _untyped(transformers.utils).cached_file(
                place.name, file, revision=place.revision, _raise_exceptions_for_missing_entries=False
            )
            for file in VOCABULARIES
        ):
            raise OSError(f"it has no tokenizer ({', '.join(VOCABULARIES)}).")
        return transformers.AutoTokenizer.from_pretrained(**place.arguments)


def _model(place: _Place, config: Any, family: _Family, *, random: bool) -> nn.Module:
    # Attention written out, so that its weights can be an output; the vectors are the same.
    options = {**family.options, "attn_implementation": "eager"}
    if random:
        return cast(nn.Module, _untyped(transformers.AutoModel).from_config(config, **options))
    with _reaching(place):
        model, report = transformers.AutoModel.from_pretrained(
            **place.arguments, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:4])
        raise InvalidField(
            f"The weights of '{place.name}' leave parts of the model random: {missing}. They belong to "
            "another model; give a complete one.",
            param="source",
        )
    return cast(nn.Module, model)


def _untyped(factory: Any) -> Any:
    return factory  # transformers annotates only some of its classes


def _licence(place: _Place) -> str:
    if place.folder is None:
        return licence_of(place.name)
    return stated_in(place.folder) or "unknown: see who made the folder"


def _origin(place: _Place, config: Any, *, random: bool) -> str:
    version = f"transformers {transformers.__version__}"
    if place.folder is None:
        commit = getattr(config, "_commit_hash", None) or place.revision
        where = f"{place.name}{f'@{commit}' if commit else ''}"
    else:
        where = f"the folder {place.folder.resolve().name}"
        weights = sorted(file for file in place.folder.iterdir() if file.suffix in {".safetensors", ".bin"})
        if weights and not random:
            where += f", {weights[0].name} with sha256 {sha256_of(weights[0])}"
    return f"{version}: {where}{', random weights' if random else ''}"


def _encoder_name(place: _Place, *, random: bool) -> str:
    name = place.folder.resolve().name if place.folder else place.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-random" if random else name)
    return name.strip("-._")[:128] or "hugging_face"


# --- images --------------------------------------------------------------------------------------------


def _images(model: nn.Module, family: _Family, processor: Any, pooling: str) -> OriginalImages:
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_normalize:
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)

    def reference(image: Image.Image) -> Tensor:
        return cast(Tensor, processor(images=image, return_tensors="pt")["pixel_values"][0])

    kind = "features" if family.vectors == "both towers" else "pooled"
    if family.vectors == "class token":
        kind = "mean" if pooling == "mean" else "class"
    return OriginalImages(
        network=HuggingFacePooled(model, cast(Any, kind)).eval(),
        preprocessing=_preprocessing(processor),
        mean=mean,
        std=std,
        reference=reference,
        patches=HuggingFacePatches(model).eval(),
        attention=HuggingFaceAttention(model).eval() if HuggingFaceAttention.fits(model) else None,
    )


def _preprocessing(processor: Any) -> Preprocessing:
    def refuse(what: str) -> InvalidField:
        return InvalidField(
            f"{type(processor).__name__} {what}, which a bundle cannot say. Edit preprocessor_config.json to "
            "resize, rescale by 1/255 and crop to one size.",
            param="source",
        )

    interpolation = {1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(int(processor.resample or 0))
    if interpolation is None:
        raise refuse(f"resamples by Pillow's filter {processor.resample}")
    if not processor.do_resize or not processor.do_rescale or abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise refuse("does not resize, or does not rescale by 1/255")
    size, cropped = processor.size, bool(getattr(processor, "do_center_crop", False))
    shortest, height, width = size.get("shortest_edge"), size.get("height"), size.get("width")
    crop = processor.crop_size if cropped else size
    crop_height, crop_width = crop.get("height"), crop.get("width")
    if not (crop_height and crop_width) or not (shortest or (height and width)) or size.get("longest_edge"):
        raise refuse(f"gives images of several sizes ({dict(size)})")
    if not shortest and height * crop_width != width * crop_height:
        raise refuse(f"stretches to {height} × {width} and crops to {crop_height} × {crop_width}")
    resize_to = shortest or min(height, width)
    if resize_to < min(crop_height, crop_width):
        raise refuse(f"crops {crop_height} × {crop_width} out of less ({resize_to})")
    return Preprocessing(
        height=crop_height,
        width=crop_width,
        resize="shortest" if shortest else "squash",
        resize_to=resize_to,
        interpolation=cast(Any, interpolation),
        odd_crop="down",
    )


# --- texts ---------------------------------------------------------------------------------------------


class _TextFeatures(nn.Module):
    """int64 [batch, length] → float32 [batch, dim]. No mask: CLIP looks back only, SigLIP saw its padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self.model).get_text_features(input_ids=ids).pooler_output)


def _texts(model: nn.Module, config: Any, tokenizer: Any) -> OriginalTexts:
    context = config.text_config.max_position_embeddings
    padding: Literal["longest", "context"] = "longest" if config.model_type == "clip" else "context"
    tokens = from_hugging_face(tokenizer, context)
    network = _TextFeatures(model).eval()

    def reference_vectors(texts: Sequence[str]) -> Tensor:
        padded = tokenizer(
            list(texts), padding="max_length", max_length=context, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            return functional.normalize(network(padded["input_ids"]), dim=-1)

    return OriginalTexts(
        network=network,
        tokenizer=tokens.tokenizer,
        context_length=context,
        pad_id=tokens.pad_id,
        padding=padding,
        cleaning=tokens.cleaning,
        reference_tokens=tokens.reference,
        reference_vectors=reference_vectors,
    )


def _scoring(model: nn.Module) -> Scoring:
    scale = float(cast(Tensor, model.logit_scale).detach().exp())
    bias = getattr(model, "logit_bias", None)
    if bias is None:
        return Scoring(activation="softmax", logit_scale=scale)
    return Scoring(activation="sigmoid", logit_scale=scale, logit_bias=float(bias.detach()))
