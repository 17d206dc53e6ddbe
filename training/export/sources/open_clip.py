"""Encoders of open_clip: `open_clip:ViT-B-32/laion2b_s34b_b79k`.

    ViT-B-32/laion2b_s34b_b79k     an architecture and a tag: weights from open_clip's cache or the hub
    ViT-B-32/path/to/weights.pt    or a file of one's own, which needs no network; --weights does the same
    hf-hub:laion/CLIP-ViT-B-32-…   a repository with an open_clip_config.json
    local-dir:folder               the same as a folder

Both towers, their preprocessing, their tokenizer and the learned scale of their similarities.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor, nn

from embedserve.bundle import Preprocessing, Scoring
from embedserve.errors import EmbedServeError, InvalidField, NotFound, closest
from training import torchvision_ops
from training.export.hashes import sha256_of
from training.export.image_networks import open_clip_parts
from training.export.licences import licence_of, stated_in
from training.export.original import Choices, Original, OriginalImages, OriginalTexts, ready
from training.export.text_networks import First, open_clip_text
from training.export.tokenizers import from_open_clip

torchvision_ops.register()

import open_clip  # noqa: E402 -- imports torchvision
from open_clip.transform import PreprocessCfg, image_transform_v2  # noqa: E402

__all__ = ["original"]

HUB, FOLDER = "hf-hub:", "local-dir:"
VERSION = f"open_clip {open_clip.__version__}"


@dataclass(frozen=True, slots=True)
class _Choice:
    """What to build, before anything is built or fetched."""

    model: str
    """As open_clip names it, with its `hf-hub:` or `local-dir:`."""
    label: str
    """What follows the architecture in the encoder's name."""
    origin: str
    licence: str
    weights: str | None = None
    """A file; None: random, or those that come with the model's repository."""
    tag: str = ""
    """As open_clip lists it; what it says about preprocessing and activation holds for any weights."""

    @property
    def trained(self) -> dict[str, Any]:
        """How the weights of the tag were trained: mean, std, resizing, activation."""
        return cast("dict[str, Any]", open_clip.get_pretrained_cfg(self.model, self.tag)) if self.tag else {}


def original(rest: str, choices: Choices) -> Original:
    """An encoder of open_clip, with both towers.

    Args:
        rest: What follows `open_clip:`; see the module.
        choices: `weights` is a checkpoint in open_clip's layout; `random` builds the architecture only. A
            tag is then optional, and gives the preprocessing.

    Raises:
        NotFound: The architecture, the tag or the file does not exist; names the closest.
        InvalidField: The weights do not fit, or the encoder needs something that a bundle cannot say.
        EmbedServeError: The weights or the tokenizer cannot be fetched.
    """
    if choices.pooling != "auto":
        raise InvalidField(
            f"open_clip's towers pool as they were trained; leave pooling at 'auto', not "
            f"'{choices.pooling}'.",
            param="pooling",
        )
    choice = _choose(rest, choices)
    if choice.tag and not choice.weights and not choices.random:
        choice = _fetched(choice)
    tokenizer = _tokenizer(choice)
    model = ready(_build(choice, random=choices.random))
    config = open_clip.get_model_config(choice.model)
    return Original(
        name=_encoder_name(choice),
        dim=config["embed_dim"],
        images=_images(model),
        texts=_texts(model, tokenizer),
        scoring=_scoring(model),
        licence=choice.licence,
        source=_revised(choice),
        notes=_notes(choice, model, config),
    )


# --- which model, which weights ------------------------------------------------------------------------


def _choose(rest: str, choices: Choices) -> _Choice:
    choice = _elsewhere(rest) if rest.startswith((HUB, FOLDER)) else _built_in(rest)
    if choices.random:
        return replace(choice, label="random", origin=f"{choice.origin}, random weights", weights=None)
    if choices.weights:
        choice = _with_file(choice, choices.weights)
    if not (choice.weights or choice.tag or rest.startswith((HUB, FOLDER))):
        raise InvalidField(
            f"'open_clip:{rest}' says no weights. Add one of its tags after a slash, or --weights FILE; "
            f"{closest('', open_clip.list_pretrained_tags_by_model(choice.model))}",
            param="source",
        )
    return choice


def _elsewhere(rest: str) -> _Choice:
    where = rest.split(":", 1)[1]
    if rest.startswith(HUB):
        return _Choice(rest, "", f"{VERSION}: {rest}", licence_of(where))
    folder = Path(where)
    if not (folder / "open_clip_config.json").is_file():
        raise NotFound(
            f"'{folder}' holds no open_clip_config.json; give the folder that does.", param="source"
        )
    licence = stated_in(folder) or "unknown: see who made the folder"
    return _Choice(rest, "", f"{VERSION}: the folder {folder.name}", licence)


def _built_in(rest: str) -> _Choice:
    architecture, _, tag = rest.partition("/")
    if architecture not in open_clip.list_models():
        raise NotFound(
            f"open_clip has no architecture '{architecture}'; "
            f"{closest(architecture, open_clip.list_models())}",
            param="source",
        )
    choice = _Choice(architecture, "", f"{VERSION}: {architecture}", "unknown: see who trained the weights")
    if not tag:
        return choice
    known = open_clip.list_pretrained_tags_by_model(architecture)
    if config := open_clip.get_pretrained_cfg(architecture, tag):
        hub, address = config.get("hf_hub", ""), config.get("url", "")
        repository = "/".join(hub.split("/")[:2])
        return replace(
            choice,
            label=tag,
            origin=f"{VERSION}: {architecture}/{tag} ({hub.rstrip('/') or address})",
            licence=licence_of(repository, tag),
            tag=tag,
        )
    if Path(tag).is_file():
        return _with_file(choice, Path(tag))
    raise NotFound(
        f"open_clip has no weights '{tag}' for {architecture}, and no such file exists; "
        f"{closest(tag, known)}",
        param="source",
    )


def _with_file(choice: _Choice, file: Path) -> _Choice:
    if not file.is_file():
        raise NotFound(f"The weights '{file}' do not exist; give a checkpoint of open_clip.", param="weights")
    return replace(
        choice,
        label=choice.label or file.stem,
        origin=f"{VERSION}: {choice.model} with {file.name}, sha256 {sha256_of(file)}",
        weights=str(file),
    )


def _fetched(choice: _Choice) -> _Choice:
    with _reaching(f"the weights of {choice.model}/{choice.tag}", "--weights FILE"):
        path = Path(open_clip.download_pretrained(choice.trained))
    return replace(choice, weights=str(path), origin=choice.origin + _revision(path))


def _revised(choice: _Choice) -> str:
    if not choice.model.startswith(HUB):
        return choice.origin
    config = try_to_load_from_cache(choice.model.removeprefix(HUB), "open_clip_config.json")
    return choice.origin + (_revision(Path(config)) if isinstance(config, str) else "")


def _revision(path: Path) -> str:
    """In the hub's cache a file's folder is named after its revision."""
    return f", revision {path.parent.name}" if path.parent.parent.name == "snapshots" else ""


def _build(choice: _Choice, *, random: bool) -> nn.Module:
    file = None if random else choice.weights
    try:
        with _reaching(f"the model {choice.model}", "local-dir:FOLDER"):
            model = open_clip.create_model(
                choice.model,
                load_weights=not random and file is None,
                require_pretrained=not random and file is None,
                pretrained_text=False,
                force_quick_gelu=bool(choice.trained.get("quick_gelu")),
                force_preprocess_cfg=choice.trained,
            )
    except EmbedServeError as error:
        if _misfit(error.__cause__):
            raise _does_not_fit(choice, error.__cause__) from None
        raise
    if file:
        try:
            open_clip.load_checkpoint(model, file)
        except Exception as error:  # noqa: BLE001 -- what torch, safetensors and open_clip raise shares no base
            if _misfit(error):
                raise _does_not_fit(choice, error) from None
            raise InvalidField(
                f"'{file}' cannot be read as a checkpoint: {_one_line(error)} Save its state_dict with "
                "torch.save or safetensors.",
                param="weights",
            ) from None
    return cast(nn.Module, model)


def _misfit(error: BaseException | None) -> bool:
    return isinstance(error, RuntimeError) and "state_dict" in str(error)


def _does_not_fit(choice: _Choice, error: BaseException | None) -> InvalidField:
    return InvalidField(
        f"The weights do not fit the architecture {choice.model}: {_one_line(error)} Choose the one that "
        "they were trained with.",
        param="weights",
    )


@contextmanager
def _reaching(what: str, instead: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except EmbedServeError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        raise EmbedServeError(
            f"open_clip could not get {what}: {_one_line(error)} Without a network, fetch it on a "
            f"machine that has one and copy its cache (HF_HOME), or use {instead}.",
            code="not_fetched",
        ) from error


def _one_line(error: BaseException | None) -> str:
    text = " ".join(str(error).split())
    return f"{text[:300]}…" if len(text) > 300 else f"{text.rstrip('.')}."


def _encoder_name(choice: _Choice) -> str:
    model = choice.model.split(":", 1)[-1].rstrip("/")
    model = Path(model).name if choice.model.startswith(FOLDER) else model
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{model}-{choice.label}" if choice.label else model)
    return name.strip("-._")[:128] or "open_clip"


def _notes(choice: _Choice, model: nn.Module, config: dict[str, Any]) -> tuple[str, ...]:
    notes = []
    if choice.trained.get("quick_gelu") and not config.get("quick_gelu"):
        notes.append(
            f"The weights {choice.tag} were trained with QuickGELU, so it is used; open_clip itself does so "
            f"only under the name {choice.model}-quickgelu."
        )
    if cast(Any, model.visual).preprocess_cfg["resize_mode"] == "longest":
        notes.append("Transparent pixels become the colour that open_clip fills borders with.")
    return tuple(notes)


# --- the towers ----------------------------------------------------------------------------------------


def _images(model: nn.Module) -> OriginalImages:
    visual = cast(nn.Module, model.visual)
    config = PreprocessCfg(**cast(Any, visual).preprocess_cfg)
    transform = image_transform_v2(config, is_train=False)
    patches, attention = open_clip_parts(visual)

    def reference(image: Image.Image) -> Tensor:
        return cast(Tensor, transform(image))

    return OriginalImages(
        network=First(visual) if getattr(visual, "output_tokens", False) else visual,
        preprocessing=_preprocessing(config),
        mean=_rgb(config.mean),
        std=_rgb(config.std),
        reference=reference,
        patches=patches,
        attention=attention,
    )


def _preprocessing(config: PreprocessCfg) -> Preprocessing:
    height, width = (config.size, config.size) if isinstance(config.size, int) else config.size
    mode = cast(Literal["shortest", "longest", "squash"], config.resize_mode)
    if height != width and mode != "squash":
        raise InvalidField(
            f"This encoder resizes to {height} × {width} by its {mode} side; serving knows that only for "
            "squares.",
            param="source",
        )
    return Preprocessing(
        height=height,
        width=width,
        resize=mode,
        resize_to=min(height, width),
        interpolation="bilinear" if config.interpolation == "bilinear" else "bicubic",
        background=(config.fill_color,) * 3 if mode == "longest" else (255, 255, 255),
    )


def _rgb(values: float | Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = [values] * 3 if isinstance(values, float | int) else values
    return float(red), float(green), float(blue)


def _tokenizer(choice: _Choice) -> Any:
    with _reaching(f"the tokenizer of {choice.model}", "local-dir:FOLDER with its files in the folder"):
        return open_clip.get_tokenizer(choice.model)


def _texts(model: nn.Module, tokenizer: Any) -> OriginalTexts:
    tokens = from_open_clip(tokenizer)
    network, padding = open_clip_text(model)

    def reference_vectors(texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, cast(Any, model).encode_text(tokenizer(list(texts)), normalize=True))

    return OriginalTexts(
        network=network.eval(),
        tokenizer=tokens.tokenizer,
        context_length=tokens.context_length,
        pad_id=tokens.pad_id,
        padding=padding,
        cleaning=tokens.cleaning,
        reference_tokens=tokens.reference,
        reference_vectors=reference_vectors,
    )


def _scoring(model: nn.Module) -> Scoring:
    scale = float(cast(Tensor, model.logit_scale).detach().exp())
    bias = cast("Tensor | None", model.logit_bias)
    if bias is None:
        return Scoring(activation="softmax", logit_scale=scale)
    return Scoring(activation="sigmoid", logit_scale=scale, logit_bias=float(bias.detach()))
