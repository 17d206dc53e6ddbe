"""From `--set key=value` and the data to the settings of a run, each with where it comes from.

Settings are four frozen objects whose field names do not overlap: the run's own (`TrainConfig`), the method's
`Recipe` and options, and the `Augmentation`. A value is the user's where there is one, else what suits the
data and the machine, else the default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

from embedserve.errors import InvalidField, closest
from training.backbones import default_backbone, kind_of
from training.config import TrainConfig
from training.method import Facts, Method, MethodOptions, Recipe
from training.methods import find
from training.views import SMALL_IMAGE, Augmentation

__all__ = [
    "DataFacts",
    "Settings",
    "image_sizes",
    "keys",
    "parse_assignments",
    "resolve",
    "typed_value",
]

D = TypeVar("D")

IMAGES_ON_GPU, IMAGES_ON_CPU = 12_000_000, 10_000
"""Images that a run goes through by default, over all epochs: 200 epochs of 60,000 images on a GPU; some
minutes of ResNet-18 at 64 pixels on two cores."""


@dataclass(frozen=True, slots=True)
class DataFacts:
    """What is known of the data and the machine when settings are resolved."""

    images: int
    """Images to train on."""
    heldout: int
    native_size: int
    """Median of the shorter sides, in pixels."""
    on_gpu: bool
    groups: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a run. `origin` says for each key 'set', 'suited' or 'default'."""

    config: TrainConfig
    recipe: Recipe
    augmentation: Augmentation
    options: MethodOptions
    facts: Facts
    origin: Mapping[str, str] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Every setting by its key."""
        parts = (self.config, self.recipe, self.augmentation, self.options)
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        parts = ("config", "recipe", "augmentation", "options", "facts")
        return {
            **{name: dataclasses.asdict(getattr(self, name)) for name in parts},
            "origin": dict(self.origin),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Settings:
        """Raises InvalidField when a field is missing or unknown: written by another version."""
        method = find(saved["config"]["method"])
        kinds: dict[str, type[Any]] = {
            "config": TrainConfig,
            "recipe": Recipe,
            "augmentation": Augmentation,
            "options": method.Options,
            "facts": Facts,
        }
        try:
            parts = {name: TypeAdapter(kind).validate_python(saved[name]) for name, kind in kinds.items()}
        except (ValidationError, KeyError) as error:
            raise InvalidField(f"The run was written by another version of EmbedServe: {error}") from None
        return cls(**parts, origin=saved.get("origin", {}))


def parse_assignments(assignments: Sequence[str]) -> dict[str, str]:
    """`["epochs=20", "lr=.1"]` as a dict. Raises InvalidField for a text without '='."""
    parsed: dict[str, str] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InvalidField(
                f"--set '{text}' is not of the form key=value, such as epochs=20.", param="set"
            )
        parsed[key.strip()] = value.strip()
    return parsed


def keys(method: type[Method[Any]]) -> dict[str, type[Any]]:
    """Every key that can be set for a method → the class that has it."""
    owners: dict[str, type[Any]] = {}
    for owner in (TrainConfig, Recipe, Augmentation, method.Options):
        for one in dataclasses.fields(owner):
            if one.name in owners:
                raise TypeError(f"{owner.__name__}.{one.name} hides {owners[one.name].__name__}.{one.name}")
            owners[one.name] = owner
    return {name: owner for name, owner in owners.items() if name not in {"method", "data"}}


def image_sizes(given: Mapping[str, Any], native: int, *, on_gpu: bool) -> tuple[int, int]:
    """(size, stored_size) in pixels: of a full-size view, and of the images that crops are cut from.

    Args:
        given: Keys that the user set.
        native: Median shorter side of the images.
    """
    if "size" in given:
        size = int(typed_value(TrainConfig, "size", str(given["size"])))
    else:
        most = 224 if on_gpu else SMALL_IMAGE
        size = max(8, min(most, round(native / 4) * 4))
    if "stored_size" in given:
        return size, int(typed_value(TrainConfig, "stored_size", str(given["stored_size"])))
    # A crop of a fifth of the area is enlarged about twice either way; a margin of 8/7 keeps evaluation's
    # centre crop sharp (256 for 224), as is usual.
    return size, size if native <= size * 8 / 7 else round(size * 8 / 7 / 8) * 8


def resolve(method: str, data: str, given: Mapping[str, str], known: DataFacts) -> Settings:
    """All settings of a run of `method` on `data`.

    Args:
        method: A key of `training.methods.METHODS`.
        given: What the user set, as text.
        known: The facts that defaults follow.

    Raises:
        NotFound: The method is unknown.
        InvalidField: A key or value is not allowed, the batch is larger than the data, or there are too few
            images.
    """
    kind = find(method)
    owners = keys(kind)
    for key in given:
        if key not in owners:
            raise InvalidField(
                f"--set {key}: there is no such key for {method}; {closest(key, owners)}", param=key
            )
    typed = {key: typed_value(owners[key], key, value) for key, value in given.items()}

    def build(owner: type[D], suited: D) -> D:
        return dataclasses.replace(  # type: ignore[type-var]
            suited, **{key: value for key, value in typed.items() if owners[key] is owner}
        )

    config = build(TrainConfig, _suited_config(method, data, known, typed))
    if config.batch_size > known.images:
        raise InvalidField(
            f"batch_size={config.batch_size} is more than the {known.images} images to train on; "
            f"use at most {known.images}, or more images.",
            param="batch_size",
        )
    facts = Facts(
        images=known.images,
        size=config.size,
        epochs=config.epochs,
        batch_size=config.batch_size,
        steps_per_epoch=known.images // config.batch_size,
        groups=known.groups,
        backbone_kind=kind_of(config.backbone, config.start),
        started=bool(config.start),
    )
    suited = kind.recipe(facts)
    if config.start:
        suited = dataclasses.replace(suited, lr=suited.lr * kind.lr_from_weights)
    recipe = build(Recipe, suited)
    augmentation = build(Augmentation, kind.augmentation(facts))
    options = build(kind.Options, kind.Options.suited_to(facts))
    settings = Settings(config, recipe, augmentation, options, facts)
    classes = (TrainConfig, Recipe, Augmentation, kind.Options)
    defaults = {one.name: one.default for owner in classes for one in dataclasses.fields(owner)}
    asked = {"method", "data", *given}
    origin = {
        key: "set" if key in asked else "default" if value == defaults.get(key) else "suited"
        for key, value in settings.values().items()
    }
    return dataclasses.replace(settings, origin=origin)


def _suited_config(method: str, data: str, known: DataFacts, typed: Mapping[str, Any]) -> TrainConfig:
    if known.images < 4:
        raise InvalidField(
            f"'{data}' has {known.images} images to train on; "
            "at least 4 are needed, and some hundred to learn anything.",
            param="data",
        )
    size, stored_size = image_sizes(typed, known.native_size, on_gpu=known.on_gpu)
    most = (512 if size <= SMALL_IMAGE else 256) if known.on_gpu else 64
    batch_size = min(most, 2 ** int(math.log2(max(known.images // 4, 2))))
    epochs = (
        min(max(IMAGES_ON_GPU // known.images, 100), 800)
        if known.on_gpu
        else min(max(IMAGES_ON_CPU // known.images, 5), 50)
    )
    steps = known.images // int(typed.get("batch_size", batch_size) or 1) * int(typed.get("epochs", epochs))
    return TrainConfig(
        method=method,
        data=data,
        # The weights to start from know their own network.
        backbone=""
        if typed.get("start", "") not in {"", "imagenet"}
        else default_backbone(size, find(method).backbone_kind, on_gpu=known.on_gpu),
        size=size,
        stored_size=stored_size,
        epochs=epochs,
        batch_size=batch_size,
        log_every=max(1, min(50, steps // 100)),
        knn_every=max(1, int(typed.get("epochs", epochs)) // 20),
        checkpoint_every=max(1, min(1000, steps // 10)),
    )


def typed_value(owner: type[Any], key: str, value: str) -> Any:
    """`value` as the type of the dataclass field `key`. Raises InvalidField saying what is allowed."""
    kind = get_type_hints(owner)[key]
    try:
        return TypeAdapter(kind).validate_strings(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InvalidField(f"--set {key}={value}: {reason[0].lower()}{reason[1:]}.", param=key) from None
