"""The one contract that every self-supervised method fulfils, and all that the loop knows of it.

A method is one file in `training/methods/`: options → networks → views → loss → what moves after a step.
The loop (`training.train`) owns the rest once: precision, optimiser, accumulation, ranks, checkpoints, logs.

    Method.recipe(facts)          optimiser and schedules that suit it
    Method.Options.suited_to      its own settings, resolved from the data
    Method(backbone, options)     networks and buffers; all state lives in parameters and buffers
      .views(augmentation)        what it wants to see of each image
      .loss(batch)                the loss and what else should be logged
      .before_step(now)           gradients that must not act yet
      .momentum_pairs()           what follows what by an exponential moving average
      .after_step(now)            that, and the queues
      .encoder, .embed(images)    what is evaluated and exported
      .projection                 what followed it in the loss
      .texts, .text_vectors()     the other side, where a method is `captioned`
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from embedserve.errors import InvalidField
from training.backbones import Backbone
from training.momentum import update_momentum
from training.queue import FeatureQueue
from training.schedules import Now, Schedule
from training.views import SMALL_IMAGE, Augmentation, View

if TYPE_CHECKING:
    from training.text import TextTower

__all__ = ["Batch", "Facts", "Losses", "Method", "MethodOptions", "ParameterRule", "Recipe", "Texts"]

Losses = dict[str, Tensor]
"""Scalars by name. 'loss' is minimised; the others are logged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What recipes and options follow: the size of things, never the name of a data set."""

    images: int
    """Images to train on."""
    size: int
    """Pixels of a side of a full-size view."""
    epochs: int
    batch_size: int
    """Images of one step, over all ranks and accumulated parts."""
    steps_per_epoch: int
    groups: bool = False
    """Whether positives come from groups."""
    backbone_kind: Literal["conv", "vit"] = "conv"
    """What is trained: some methods optimise a vision transformer otherwise."""
    started: bool = False
    """Whether it begins from trained weights."""

    @property
    def small(self) -> bool:
        """Whether the recipe for small images applies."""
        return self.size <= SMALL_IMAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a method is optimised. The learning rate of a step is lr × batch size ÷ 256."""

    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    """sgd, lars (for batches of 1,024 and more) or adamw."""
    lr: float = 0.12
    """Learning rate for a batch of 256; it is scaled in proportion to the batch."""
    lr_end: float = 0.0
    """Share of the learning rate that is left at the end of the cosine."""
    warmup_epochs: float = 10.0
    """Epochs of linear warm-up, at most a tenth of all."""
    weight_decay: float = 5e-4
    """For weights; biases and norms have none."""
    weight_decay_end: float | None = None
    """Where a cosine takes the weight decay to; without it the decay stays."""
    sgd_momentum: float = 0.9
    """Momentum of sgd and lars."""
    bias_lr: float = 1.0
    """Factor on the learning rate of biases and norms."""
    clip: float = 0.0
    """Largest norm of all gradients together; 0 does not clip."""


BOUNDS: tuple[tuple[str, tuple[float, float]], ...] = (
    (
        r"_epochs$|_length$|_crops$|_weight$|^(beta|memory|koleo|invariance|variance|covariance)$",
        (0, math.inf),
    ),
    (r"temperature|^(epsilon|redundancy|loss_scale)$", (1e-6, math.inf)),
    (r"momentum|_min$|_max$|_least$|_most$|_split$|_decay$|_smoothing$", (0, 1)),
    (r"_dim$|_size$|_layers$|_iterations$|^prototypes$", (1, math.inf)),
)
"""What the name of an option says of its value: the first pattern that fits counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodOptions:
    """A method's own settings. Defaults are the paper's; `suited_to` adapts them to the data.

    Raises InvalidField for numbers that make no sense, which the names say: a temperature is above 0, a
    momentum within 0..1, a length of a head at least 1.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            bounds = next((allowed for pattern, allowed in BOUNDS if re.search(pattern, one.name)), None)
            if bounds is not None and not bounds[0] <= value <= bounds[1]:
                least, most = bounds
                allowed = f"at least {least:g}" if math.isinf(most) else f"within {least:g} to {most:g}"
                raise InvalidField(f"{one.name}={value}; it must be {allowed}.", param=one.name)

    @classmethod
    def suited_to(cls, facts: Facts) -> Self:
        return cls()


@dataclass(frozen=True, slots=True)
class Texts:
    """A caption of each image of a batch."""

    tokens: Tensor
    """int64 [B, length], padded as the method's text tower wants it."""
    ids: Tensor
    """int64 [B]: one number for each wording."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of `Method.loss` sees on one rank."""

    views: Sequence[Tensor]
    """One float32 [B, 3, size, size] for each of the method's views, in their order."""
    ids: Tensor
    """int64 [B]: one number for each image, or for each group where positives come from groups."""
    now: Now
    values: Mapping[str, float] = field(default_factory=dict)
    """Value of each of the method's schedules at this step."""
    texts: Texts | None = None
    """A caption of each image, for methods that are `captioned`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterRule:
    """How the parameters of one module differ from the rest for the optimiser."""

    module: nn.Module
    fixed_lr: bool = False
    """Neither warm-up nor cosine (SimSiam's predictor)."""
    lr: float = 1.0
    """Factor on the learning rate."""
    decay: bool = True
    """False switches weight decay off."""


S = TypeVar("S", bound=MethodOptions)


class Method(nn.Module, ABC, Generic[S]):
    """Base of all methods. See the module for the order in which the loop calls what.

    Attributes:
        paper: Authors, year and arXiv number.
        summary: One line for `embedserve train --list`.
        backbone_kind: Which default backbone it takes.
        captioned: Whether it learns from captions.
        lr_from_weights: Share of the learning rate where it begins from trained weights, which more would
            undo. On 4,214 drawings an epoch of SimCLR took the starter's k-NN from 66.4% to 64.3% at a
            quarter of its rate, and at a twelfth to 65.4%, which five more epochs brought back to 66.2%.
        Options: Its settings.
        backbone: The network that learns.
    """

    paper: ClassVar[str]
    summary: ClassVar[str]
    backbone_kind: ClassVar[Literal["conv", "vit"]] = "conv"
    captioned: ClassVar[bool] = False
    lr_from_weights: ClassVar[float] = 0.1
    Options: ClassVar[type[MethodOptions]]

    def __init__(self, backbone: Backbone, options: S, facts: Facts) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = options

    @classmethod
    def recipe(cls, facts: Facts) -> Recipe:
        """What optimises this method well on such data."""
        return Recipe()

    @classmethod
    def backbone_options(cls, facts: Facts) -> Mapping[str, bool]:
        """Keyword arguments for `training.backbones.build` that it needs, such as a mask token."""
        return {}

    @classmethod
    def augmentation(cls, facts: Facts) -> Augmentation:
        """How strongly views differ unless the user says otherwise."""
        return Augmentation.suited_to(facts.size)

    @classmethod
    @abstractmethod
    def views(cls, augmentation: Augmentation, options: S, facts: Facts) -> tuple[View, ...]:
        """The views of each image, full-size ones first."""

    @abstractmethod
    def loss(self, batch: Batch) -> Losses:
        """The losses of a batch. It changes no state but what `after_step` then completes."""

    def forward(self, batch: Batch) -> Losses:
        return self.loss(batch)

    def schedules(self) -> dict[str, Schedule]:
        """Named quantities that the loop computes each step, logs, and gives to `loss` in `Batch.values`.

        One named 'momentum' drives `momentum_pairs`.
        """
        return {}

    def momentum_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """(online, momentum) modules of one form; the second follows the first."""
        return []

    def parameter_rules(self) -> list[ParameterRule]:
        """Modules whose parameters the optimiser treats otherwise. The first rule that fits counts."""
        return []

    def before_step(self, now: Now) -> None:
        """Called after backward and clipping, before the optimiser; a gradient set to None does not act."""

    @torch.no_grad()
    def after_step(self, now: Now, values: Mapping[str, float]) -> None:
        """Called after the optimiser: the moving averages, then the queues."""
        for online, momentum in self.momentum_pairs():
            update_momentum(online, momentum, values["momentum"])
        for module in self.modules():
            if isinstance(module, FeatureQueue):
                module.flush()

    @property
    def encoder(self) -> Backbone:
        """The backbone to evaluate and export; the momentum encoder where that is the better one."""
        return self.backbone

    @property
    def projection(self) -> nn.Module | None:
        """What followed the encoder's features in the loss, [B, encoder.dim] → [B, length]; None: nothing.

        Where the loss compares predictions with projections, these are the projections.
        """
        return None

    def embed(self, images: Tensor) -> Tensor:
        """Features for transfer: float [B, 3, H, W] → float [B, dim], not normalised."""
        features: Tensor = self.encoder(images)
        return features

    # What only methods that are `captioned` need:

    @property
    def texts(self) -> TextTower | None:
        """The text tower."""
        return None

    def text_vectors(self, tokens: Tensor) -> Tensor:
        """int64 [B, length] → vectors [B, length] that are compared with those of `embed`."""
        raise NotImplementedError

    def carried(self) -> dict[str, Any]:
        """Plain values that a checkpoint needs to build the networks again, beside the settings."""
        return {}

    def begin_from(self, start: str) -> None:
        """Takes what the weights that the run starts from have beside the backbone."""

    @property
    def replayable(self) -> bool:
        """Whether calls of the backbone may be recorded and replayed (`training.recording`)."""
        return True

    @property
    def local_batch_norm(self) -> bool:
        """Whether batch norms must not be joined over ranks (MoCo's shuffled batch norm)."""
        return False

    def logit_count(self) -> int:
        """K where the loss is a cross-entropy over K classes that can stay stuck at ln K, else 0."""
        return 0
