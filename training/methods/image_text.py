"""What CLIP, SigLIP and LiT share: two towers, projections into one space, and a learned scale.

options → towers → projections → which part learns → pairs of unit vectors; each method adds its loss
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training import open_clip_models
from training.backbones import Backbone
from training.captions.filters import Filter
from training.captions.wording import TEMPLATES
from training.chunks import in_chunks
from training.losses import unit
from training.method import Batch, Facts, Method, MethodOptions, ParameterRule, Recipe
from training.precision import full_precision
from training.text import TextTower, build_text, rebuild_text
from training.text.open_clip import text_of
from training.text.sentences import NAME as SENTENCES
from training.tuning import Tuning, fill, keep_locked, merged, tune
from training.views import Augmentation, View

__all__ = ["ImageText", "ImageTextOptions"]

LR = 1e-3
"""For any batch size: LiT and SigLIP were trained with it at 16,384 and more, open_clip's models of CC3M at
1,024. At 64, on 1,588 captioned drawings (copies among them) in six epochs, a quarter of it reached R@1 22%,
it 43%, and two and a half times as much 49%; the last is bold for towers that begin from nothing."""
TRAINED_LR = 0.1
"""Share of the learning rate for towers with trained weights, beside projections without."""
MOST_LENGTH = 16_384
"""Of shared vectors; more is a mistake, and would fill the memory."""
MANY_PAIRS = 100_000
"""Pairs from which crops are as weak as open_clip's; fewer are seen so often that they need to differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTextOptions(MethodOptions):
    """Settings of all methods that learn from captions."""

    text: str = ""
    """Text tower: sentences, open_clip:ViT-B-32, hf:FOLDER, transformer/4x256; '' suits the backbone."""
    text_start: str = ""
    """Weights of an open_clip text tower: a checkpoint of the whole model, or a tag."""
    shared_length: int = 512
    """Length of the vectors that images and texts share; a locked tower's own where there is one."""
    image_learns: Tuning = "all"
    """What of the image tower learns: all, blocks (the last ones), lora, or nothing."""
    text_learns: Tuning = "all"
    """The same for the text tower."""
    last_blocks: int = 2
    """How many blocks learn where 'blocks' do."""
    lora_rank: int = 8
    """Rank of the additions where 'lora' learns."""
    chunk: int = 0
    """Pairs that are in memory at once, for large batches (GradCache); 0 for all. Costs a second pass."""
    captions: str = ""
    """Where captions are: a column, txt (files beside the images), name (file names), label (class names)."""
    templates: str = "|".join(TEMPLATES)
    """Sentences around class names, with | between them."""
    filter: Filter = "none"
    """Captions that are left out: none, or align, for noise from the web."""

    def __post_init__(self) -> None:
        MethodOptions.__post_init__(self)
        for name, least in (("shared_length", 1), ("last_blocks", 1), ("lora_rank", 1), ("chunk", 0)):
            if getattr(self, name) < least:
                raise InvalidField(f"{name}={getattr(self, name)}; it must be at least {least}.", param=name)
        if self.shared_length > MOST_LENGTH:
            raise InvalidField(
                f"shared_length={self.shared_length}; it must be at most {MOST_LENGTH}.",
                param="shared_length",
            )
        if self.learns() == ("nothing", "nothing"):
            raise InvalidField(
                "Both towers are locked, so there is nothing to train. Lock one, or let one learn in part "
                "(image_learns or text_learns = blocks or lora).",
                param="text_learns",
            )

    def learns(self) -> tuple[Tuning, Tuning]:
        """What of the image tower and of the text tower learns."""
        return self.image_learns, self.text_learns


O = TypeVar("O", bound=ImageTextOptions)  # noqa: E741 -- as S in training.method


class ImageText(Method[O]):
    """Base of the methods that learn from captions.

    Args:
        carried: What a checkpoint says of the text tower, to build it without what it once came from.
    """

    captioned = True
    lr_from_weights = 1.0  # by `parameter_rules`, as projections may begin from nothing
    Options = ImageTextOptions
    first_scale: float
    """What cosines are multiplied with at first."""
    activation: Literal["softmax", "sigmoid"] = "softmax"

    def __init__(
        self, backbone: Backbone, options: O, facts: Facts, carried: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(backbone, options, facts)
        self.started = facts.started
        name = options.text or _suited_text(backbone)
        tower = rebuild_text(carried["text"]) if carried else build_text(name, start=options.text_start)
        length = _shared_length(backbone, tower, options)
        self.text = tower
        image_learns, text_learns = options.learns()
        blocks, rank = options.last_blocks, options.lora_rank
        tune(backbone, image_learns, blocks=blocks, rank=rank, name="image_learns")
        tune(tower, text_learns, blocks=blocks, rank=rank, name="text_learns")
        self.image_projection = _projection(backbone.dim, length, image_learns, backbone.name)
        self.text_projection = _projection(tower.dim, length, text_learns, tower.name)
        self.log_scale = nn.Parameter(torch.tensor(math.log(self.first_scale)))
        self.train()

    def train(self, mode: bool = True) -> ImageText[O]:
        """As in torch; a locked tower, and what is locked of one, stays in evaluation mode."""
        super().train(mode)
        for tower, learns in zip((self.backbone, self.text), self.options.learns(), strict=True):
            if learns == "nothing":
                tower.eval()
            elif learns != "all":
                keep_locked(tower)
        return self

    def carried(self) -> dict[str, Any]:
        return {"text": self.text.carried()}

    def begin_from(self, start: str) -> None:
        """The text side of a run like this one, or of an open_clip checkpoint that the images come from."""
        begin_from(self, start)

    @property
    def texts(self) -> TextTower:
        return self.text

    @property
    def replayable(self) -> bool:
        return not self.options.chunk  # a recording keeps what chunks are there to forget

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        return Recipe(optimizer="adamw", lr=LR * 256 / facts.batch_size, weight_decay=0.1, clip=1.0)

    @classmethod
    def augmentation(cls, facts: Facts) -> Augmentation:
        """Crops alone: a caption may speak of colours, of left and right, or of what is written."""
        crop = 0.5 if facts.images < MANY_PAIRS else 0.9
        return Augmentation(
            crop_min=crop,
            flip=0,
            brightness=0,
            contrast=0,
            saturation=0,
            hue=0,
            jitter=0,
            grayscale=0,
            blur=0,
        )

    @classmethod
    def views(cls, augmentation: Augmentation, options: O, facts: Facts) -> tuple[View, ...]:
        return (augmentation.view(facts.size),)

    def parameter_rules(self) -> list[ParameterRule]:
        image_learns, text_learns = self.options.learns()
        trained: list[tuple[nn.Module, str]] = [(self.backbone, image_learns)] if self.started else []
        trained += [(self.text, text_learns)] if self.text.trained else []
        return [
            ParameterRule(module=tower, lr=TRAINED_LR)
            for tower, learns in trained
            if learns != "lora"  # whose additions begin from nothing
        ]

    # ----------------------------------------------------------------------------------------- vectors

    def image_vectors(self, images: Tensor) -> Tensor:
        """[B, 3, size, size] → unit vectors [B, length] of the shared space."""
        features = _seen(self.backbone, images, self.options.chunk, self.options.learns()[0])
        return unit(self.image_projection(features))

    def text_vectors(self, tokens: Tensor) -> Tensor:
        """int64 [B, length] → unit vectors [B, length] of the shared space."""
        features = _seen(self.text, tokens, self.options.chunk, self.options.learns()[1])
        return unit(self.text_projection(features))

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Vectors of images and captions, and the ids of both, as the losses take them."""
        if batch.texts is None:
            raise ValueError(f"{type(self).__name__} needs captions")
        return (
            self.image_vectors(batch.views[0]),
            self.text_vectors(batch.texts.tokens),
            batch.ids,
            batch.texts.ids,
        )

    @full_precision
    def scale(self) -> Tensor:
        """float [], what cosines are multiplied with."""
        return self.log_scale.exp()

    def embed(self, images: Tensor) -> Tensor:
        features: Tensor = self.image_projection(self.backbone(images))
        return features

    @property
    def projection(self) -> nn.Module | None:
        return self.image_projection

    def scoring(self) -> dict[str, Any]:
        """How cosines become probabilities, as a bundle's `Scoring` says it."""
        return {"activation": self.activation, "logit_scale": float(self.log_scale.detach().exp())}


def clamp_scale(log_scale: Tensor, most: float) -> None:
    """Keeps the scale within 1 to `most`, as CLIP does to stay stable."""
    log_scale.clamp_(0, math.log(most))


def _suited_text(backbone: Backbone) -> str:
    return backbone.name if backbone.name.startswith(open_clip_models.PREFIX) else SENTENCES


def _shared_length(backbone: Backbone, tower: TextTower, options: ImageTextOptions) -> int:
    """A locked tower's vectors stay as they are, and an open_clip model's own projections fit each other."""
    image_learns, text_learns = options.learns()
    if image_learns == "nothing":
        return backbone.dim
    if text_learns == "nothing" or _own_space(backbone.name, tower.name):
        return tower.dim
    return options.shared_length


def _own_space(image: str, text: str) -> bool:
    return image == text and image.startswith(open_clip_models.PREFIX)


def _projection(dim: int, length: int, learns: Tuning, name: str) -> nn.Module:
    """Nothing where a tower's vectors have the length already and are in the space, else a linear layer."""
    if learns == "nothing" and dim == length:
        return nn.Identity()
    if name.startswith(open_clip_models.PREFIX) and dim == length:
        return nn.Identity()
    layer = nn.Linear(dim, length, bias=False)
    nn.init.normal_(layer.weight, std=dim**-0.5)
    return layer


def _seen(tower: nn.Module, batch: Tensor, chunk: int, learns: Tuning) -> Tensor:
    if learns == "nothing":
        with torch.no_grad():
            return in_chunks(tower, batch, chunk)
    return in_chunks(tower, batch, chunk)


def begin_from(method: ImageText[Any], start: str) -> None:
    """Text tower, projections and scale of the weights that the images start from, where they have any."""
    from training import checkpoint
    from training.backbones.starting import checkpoint_of

    file, name = checkpoint_of(start), method.backbone.name
    if file is None:
        one_model = name.startswith(open_clip_models.PREFIX) and method.text.name == name
        if one_model and not method.options.text_start:
            _begin_from_open_clip(method, name.removeprefix(open_clip_models.PREFIX), start)
        return
    state = checkpoint.load(file)
    if state.get("carried", {}).get("text", {}).get("name") != method.text.name:
        return
    taken = {key: one for key, one in state["model"].items() if not key.startswith("backbone.")}
    fill(method, merged(taken))
    method.text.trained = True


@torch.no_grad()
def _begin_from_open_clip(method: ImageText[Any], architecture: str, start: str) -> None:
    model = open_clip_models.create(architecture)
    open_clip_models.load(model, start, architecture)
    text = text_of(model, architecture, trained=True, rules=method.text.rules)
    fill(method.text.network, text.network.state_dict())
    method.text.trained = True
    for ours, theirs in (("log_scale", "logit_scale"), ("bias", "logit_bias")):
        value, learned = getattr(method, ours, None), getattr(model, theirs, None)
        if value is not None and learned is not None:
            value.copy_(learned)
