"""Zero-shot classification: class names in sentences instead of labelled images to learn from.

A class is the mean direction of its name in all templates, as `/v1/classify` computes it; an image gets the
class of the largest cosine (Radford et al. 2021, section 3.1). Whether the probabilities behind that can be
believed is measured before and after the scale is fitted: on one half of the images, judged on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from embedserve.bundle import Scoring
from embedserve.classify import in_templates, mean_direction, probabilities
from embedserve.errors import InvalidField
from embedserve.label_sets import DEFAULT_TEMPLATES, check_templates
from training.captions.wording import in_words
from training.data import Source
from training.evaluate.calibration import (
    Bin,
    confidences,
    expected_calibration_error,
    fit_scoring,
    loss_of,
    reliability,
)
from training.evaluate.encoder import EvaluationEncoder, Reader, require_reader
from training.evaluate.labels import Images, embed_chosen, judged_rows
from training.evaluate.report import PICTURE_ONLY, Progress, silent
from training.evaluate.scoring_of_bundle import check_storable, store_scoring
from training.evaluate.zero_shot_picture import zero_shot_picture
from training.precision import full_precision

__all__ = [
    "LEAST_IMAGES",
    "Calibration",
    "ClassFigures",
    "ZeroShotResult",
    "ZeroShotSettings",
    "class_vectors",
    "evaluate_zero_shot",
    "store_zero_shot",
]

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

LEAST_IMAGES = 100
"""Labelled images that a calibration takes: fifty to fit, fifty to judge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShotSettings:
    """Settings of `zero_shot`."""

    templates: str = "|".join(DEFAULT_TEMPLATES)
    """Sentences around class names, with | between them; each has {} where the name goes."""
    images: Images = "auto"
    """auto: the data's test part, else what training held out, else all; or all."""
    store: bool = False
    """Write the fitted scale (and bias) into the bundle, so that /v1/classify gives these probabilities."""
    seed: int = 0
    """Of which images the scale is fitted on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassFigures:
    """One class."""

    images: int
    recall: float
    """Share of its images that are named so."""
    precision: float | None
    """Share of the images named so that are of it; None where none is."""
    confused_with: str | None
    """The class that most of its other images are named; None where all are right."""
    confused: int
    """How many of them are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How well probabilities fit, on the half of the images that nothing was fitted on.

    Errors are expected calibration errors over 15 bins (0..1) of the label that is named.
    """

    activation: str
    scale: float
    """The fitted one; cosines are multiplied with it."""
    bias: float
    """The fitted one of sigmoids; added to that."""
    scale_before: float
    """The encoder's own."""
    bias_before: float
    error: float
    """With what was fitted."""
    error_before: float
    """With the encoder's own scale and bias."""
    log_loss: float
    """Mean negative log-likelihood of an image, fitted."""
    log_loss_before: float
    fitted_on: int
    """Images."""
    judged_on: int
    bins: tuple[Bin, ...]
    bins_before: tuple[Bin, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroShotResult:
    """Accuracies are shares of the images, 0..1."""

    top1: float
    top5: float | None
    """None with five classes or fewer."""
    per_class: float
    """Mean of the classes' recalls: every class counts the same."""
    chance: float
    """Accuracy of always naming the class that is most frequent."""
    images: int
    classes: int
    """Classes to choose from."""
    templates: tuple[str, ...]
    calibration: Calibration | None
    """None where it cannot be measured."""
    uncalibrated: str = ""
    """Why it cannot."""
    skipped: int = 0
    """Images that could not be read."""
    by_class: dict[str, ClassFigures]
    """The classes that have images."""
    confusion: NDArray[np.int64] = field(metadata=PICTURE_ONLY)
    """[classes, classes]: images by true class (rows) and named class."""
    class_names: tuple[str, ...] = field(metadata=PICTURE_ONLY)

    def summary(self) -> str:
        """One or two lines for people."""
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.1%}"
        return (
            f"zero-shot top-1 {self.top1:.1%}{top5}, mean of classes {self.per_class:.1%} (most frequent "
            f"class {self.chance:.1%}): {self.images:,} images, {self.classes} classes, "
            f"{len(self.templates)} templates\n{self._calibrated()}"
        )

    def _calibrated(self) -> str:
        found = self.calibration
        if found is None:
            return f"calibration not measured: {self.uncalibrated}"
        biases = (
            f" and bias {found.bias:.4g} (from {found.bias_before:.4g})"
            if found.activation == "sigmoid"
            else ""
        )
        return (
            f"calibration error {found.error_before:.3f}, and {found.error:.3f} with scale {found.scale:.4g} "
            f"(from {found.scale_before:.4g}){biases}; log loss {found.log_loss_before:.3f}, then "
            f"{found.log_loss:.3f}: fitted on {found.fitted_on:,} images, judged on {found.judged_on:,}"
        )

    def picture(self) -> Image.Image:
        """The confusion of the classes, their recalls, and accuracy by confidence."""
        found = self.calibration
        bins = (found.bins_before, found.bins) if found is not None else None
        return zero_shot_picture(self.confusion, self.class_names, bins)


def evaluate_zero_shot(
    encoder: EvaluationEncoder, source: Source, settings: ZeroShotSettings, progress: Progress = silent
) -> ZeroShotResult:
    """Names labelled images by the words of their classes.

    Raises:
        InvalidField: No labels, one class, an encoder without text, templates that make no sense; or with
            `store`: no bundle of one's own, too few images, or nothing that fits.
    """
    reader = require_reader(encoder, "zero_shot")
    templates = check_templates(settings.templates.split("|"))

    def chosen(source: Source) -> Labels:
        return judged_rows(source, encoder, settings.images, evaluation="zero_shot")

    images = len(chosen(source))
    if settings.store:
        check_storable(encoder)
        if images < LEAST_IMAGES:
            raise InvalidField(_too_few(images), param="store")
    vectors = class_vectors(reader, source.class_names, templates)
    embedded = embed_chosen(encoder, source, chosen, progress)
    cosines, labels = _cosines(embedded.vectors, vectors), embedded.source.labels
    calibration, why = _calibration(cosines, labels, reader.scoring, settings.seed)
    if settings.store:
        _check_worth_storing(calibration, why)
    confusion = _confusion(cosines, labels)
    seen = confusion.sum(1) > 0
    return ZeroShotResult(
        top1=float(np.trace(confusion) / len(labels)),
        top5=_top5(cosines, labels) if cosines.shape[1] > 5 else None,
        per_class=float((np.diag(confusion)[seen] / confusion.sum(1)[seen]).mean()),
        chance=float(confusion.sum(1).max() / len(labels)),
        images=len(labels),
        classes=len(source.class_names),
        templates=templates,
        calibration=calibration,
        uncalibrated=why,
        skipped=len(embedded.skipped),
        by_class=_by_class(confusion, source.class_names),
        confusion=confusion,
        class_names=source.class_names,
    )


def store_zero_shot(
    encoder: EvaluationEncoder, settings: ZeroShotSettings, result: ZeroShotResult, told: dict[str, Any]
) -> None:
    """Where the settings ask for it: the fitted scoring goes into the bundle, with its figures.

    Args:
        told: What the bundle shall say of how it was measured: the command, the data.
    """
    found = result.calibration
    if not settings.store or found is None:
        return
    figures = {
        "top1": result.top1,
        "mean_of_classes": result.per_class,
        "images": result.images,
        "classes": result.classes,
        "templates": list(result.templates),
        "calibration_error": found.error,
        "calibration_error_before": found.error_before,
        "logit_scale_before": found.scale_before,
        "logit_bias_before": found.bias_before,
        "fitted_on": found.fitted_on,
    }
    store_scoring(check_storable(encoder), found.scale, found.bias, "zero_shot", {**told, **figures})


def class_vectors(
    reader: Reader, class_names: Sequence[str], templates: Sequence[str], progress: Progress = silent
) -> NDArray[np.float32]:
    """float32 [classes, dim]: what `/v1/classify` would compare images with for these labels."""
    texts = [text for name in class_names for text in in_templates([in_words(name)], templates)]
    vectors = (
        reader.embed(texts, progress=progress).cpu().numpy().reshape(len(class_names), len(templates), -1)
    )
    return np.stack(
        [mean_direction(list(rows), [name]) for rows, name in zip(vectors, class_names, strict=True)]
    )


@full_precision
def _cosines(images: torch.Tensor, classes: NDArray[np.float32]) -> Floats:
    """float64 [n, classes], from float32 as serving computes them."""
    units = torch.nn.functional.normalize(images.float(), dim=1)
    return (
        (units @ torch.from_numpy(classes).to(units.device).T).clamp(-1, 1).cpu().numpy().astype(np.float64)
    )


def _calibration(
    cosines: Floats, labels: Labels, before: Scoring, seed: int
) -> tuple[Calibration | None, str]:
    """The calibration, or why there is none."""
    if len(labels) < LEAST_IMAGES:
        return None, _too_few(len(labels))
    order = np.random.default_rng(seed).permutation(len(labels))
    half, rest = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    try:
        fitted = fit_scoring(cosines[half], labels[half], before)
    except InvalidField as error:
        return None, str(error)
    cosines, labels = cosines[rest], labels[rest]
    bins, bins_before = (
        reliability(*confidences(probabilities(cosines, scoring), labels)) for scoring in (fitted, before)
    )
    return (
        Calibration(
            activation=before.activation,
            scale=fitted.logit_scale,
            bias=fitted.logit_bias,
            scale_before=before.logit_scale,
            bias_before=before.logit_bias,
            error=expected_calibration_error(bins),
            error_before=expected_calibration_error(bins_before),
            log_loss=loss_of(cosines, labels, fitted),
            log_loss_before=loss_of(cosines, labels, before),
            fitted_on=len(half),
            judged_on=len(rest),
            bins=bins,
            bins_before=bins_before,
        ),
        "",
    )


def _check_worth_storing(found: Calibration | None, why: str) -> None:
    if found is None:
        raise InvalidField(why, param="store")
    if not found.log_loss < found.log_loss_before:
        raise InvalidField(
            f"On the {found.judged_on:,} images that nothing was fitted on, the fitted scale "
            f"{found.scale:.4g} is no better than the encoder's own {found.scale_before:.4g} (log loss "
            f"{found.log_loss:.4g}, {found.log_loss_before:.4g} before); nothing is stored. "
            "More images would tell more.",
            param="store",
        )


def _too_few(images: int) -> str:
    return (
        f"A scale is fitted on one half of the images and judged on the other, which takes {LEAST_IMAGES} "
        f"labelled images at least; there are {images}."
    )


def _confusion(cosines: Floats, labels: Labels) -> NDArray[np.int64]:
    classes = cosines.shape[1]
    pairs = labels * classes + cosines.argmax(1)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes).astype(np.int64)


def _top5(cosines: Floats, labels: Labels) -> float:
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :5]
    return float((best == labels[:, None]).any(1).mean())


def _by_class(confusion: NDArray[np.int64], names: Sequence[str]) -> dict[str, ClassFigures]:
    found, named = {}, confusion.sum(0)
    for one in np.flatnonzero(confusion.sum(1)).tolist():
        images, right = int(confusion[one].sum()), int(confusion[one, one])
        others = confusion[one].copy()
        others[one] = 0
        most = int(others.argmax())
        found[names[one]] = ClassFigures(
            images=images,
            recall=right / images,
            precision=right / int(named[one]) if named[one] else None,
            confused_with=names[most] if others[most] else None,
            confused=int(others[most]),
        )
    return found
