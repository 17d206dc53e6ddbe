"""What happens before the networks are built: data → pixels → settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from embedserve.errors import BadRequest, InvalidField
from training.captions import Captions
from training.captions.wording import CaptionRules
from training.config import TrainConfig
from training.data import Pixels, Residence, native_size, open_pixels, open_source, split
from training.distributed import in_turn, world_size
from training.method import Method
from training.methods import find
from training.settings import DataFacts, Settings, image_sizes, resolve, typed_value

__all__ = ["Prepared", "caption_rules", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """Images and settings of a run."""

    pixels: Pixels
    train: NDArray[np.int64]
    """Rows to train on."""
    heldout: NDArray[np.int64]
    """Rows to measure k-NN on."""
    settings: Settings
    native_size: int
    """Median of the images' shorter sides, in pixels."""

    @property
    def grouped(self) -> bool:
        return self.settings.facts.groups

    def captions_for(self, method: Method[Any]) -> Captions | None:
        """The captions of all images as tokens of the method's text tower; None where it has none."""
        said, tower = self.pixels.source.captions, method.texts
        if tower is None or said is None:
            return None
        return Captions(said, tower.rules, self.settings.config.seed)

    def about_data(self, captions: Captions | None) -> dict[str, Any]:
        """What config.json says of the data, and of the captions where they are learned from."""
        return {
            "images": len(self.train),
            "heldout": len(self.heldout),
            "classes": list(self.pixels.source.class_names),
            "native_size": self.native_size,
            "skipped": [{"key": one.key, "reason": one.reason} for one in self.pixels.skipped],
            "fingerprint": self.pixels.fingerprint,
            **({} if captions is None else {"captions": self._about_captions(captions)}),
        }

    def _about_captions(self, captions: Captions) -> dict[str, Any]:
        return {
            **self.pixels.source.captions_from,
            "captions": len(captions.ids),
            "different": len(captions.texts),
            "remarks": captions.remarks(),
        }


def prepare(
    method: str,
    data: str,
    given: Mapping[str, str],
    device: torch.device,
    *,
    progress: Callable[[int, int], None],
) -> Prepared:
    """Opens the data, decodes it (or finds it decoded), and resolves every setting.

    Raises what `open_source`, `open_pixels` and `resolve` raise, and:
        BadRequest: All images are the same.
        InvalidField: The batch cannot be shared among the ranks.
    """

    def wanted(key: str, default: Any) -> Any:  # needed before the settings can be resolved
        return typed_value(TrainConfig, key, given[key]) if key in given else default

    on_gpu = device.type == "cuda"
    group_by = wanted("group_by", "")
    captions = caption_rules(find(method), given)
    source = open_source(data, group_by=group_by, label_by=wanted("label_by", ""), captions=captions)
    native = native_size(source)
    _, stored_size = image_sizes(given, native, on_gpu=on_gpu)
    folder = wanted("cache_folder", "")
    with in_turn():  # the first rank decodes, the others find its cache
        pixels = open_pixels(
            source,
            stored_size,
            device=device,
            residence=cast("Residence", wanted("cache", "auto")),
            folder=Path(folder) if folder else None,
            workers=wanted("workers", 0),
            progress=progress,
        )
    if pixels.distinct() < 2:
        raise BadRequest(
            f"All {len(pixels)} images of '{data}' are the same; there is nothing to tell apart.",
            param="data",
        )
    train, heldout = split(pixels.source, holdout=wanted("holdout", 0.1), seed=wanted("seed", 0))
    known = DataFacts(
        images=len(train), native_size=native, on_gpu=on_gpu, groups=bool(group_by), heldout=len(heldout)
    )
    settings = resolve(method, data, given, known)
    _check_ranks(settings.config)
    return Prepared(pixels, train, heldout, settings, native)


def caption_rules(method: type[Method[Any]], given: Mapping[str, str]) -> CaptionRules | None:
    """Where a method's captions are, from its options; None for one that learns from images alone."""
    if not method.captioned:
        return None

    def wanted(key: str) -> Any:
        default = next(one.default for one in fields(method.Options) if one.name == key)
        return typed_value(method.Options, key, given[key]) if key in given else default

    return CaptionRules(
        by=wanted("captions"), templates=tuple(wanted("templates").split("|")), filter=wanted("filter")
    )


def _check_ranks(config: TrainConfig) -> None:
    shares = world_size() * config.accumulate
    if config.batch_size % shares:
        raise InvalidField(
            f"batch_size={config.batch_size} cannot be shared by {world_size()} processes in "
            f"accumulate={config.accumulate} parts; use a multiple of {shares}.",
            param="batch_size",
        )
    if config.batch_size // shares < 2:
        raise InvalidField(
            f"batch_size={config.batch_size} leaves one image or none for a process at a time; "
            f"batch norm needs 2, so use at least {2 * shares}.",
            param="batch_size",
        )
