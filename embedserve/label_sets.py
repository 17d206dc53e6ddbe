"""Labels with what tells images of one from those of another, and where they are saved.

Two kinds. `LabelSet` holds words: each label with its prompts, for encoders that read text. `LinearLabelSet`
holds numbers: a linear classifier on one encoder's vectors, fitted to labelled images by `embedserve train
probe`, for encoders with or without text.
"""

from __future__ import annotations

import base64
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from embedserve.bundle import Bundle, pack_vector
from embedserve.errors import Conflict, EmbedServeError, InvalidField, NotFound, TooLarge, closest

__all__ = [
    "DEFAULT_TEMPLATES",
    "Activation",
    "Fitted",
    "LabelSet",
    "LabelSets",
    "LinearLabelSet",
    "ProbeKind",
    "as_json",
    "check_encoder",
    "check_labels",
    "check_templates",
    "linear_label_set",
]

Activation = Literal["softmax", "sigmoid"]
ProbeKind = Literal["linear", "prototypes"]
Vectors = NDArray[np.float32]

DEFAULT_TEMPLATES = (
    "{}",
    "a photo of {}.",
    "a picture that shows {}.",
    "a close-up of {}.",
    "a drawing of {}.",
    "{} in front of a plain background.",
)
"""Photographs, drawings and bare words: what is classified is not known beforehand."""

MAX_TEMPLATES = 100
MAX_LABEL_CHARACTERS = 1000
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Labels as words, and how to use them."""

    labels: Mapping[str, Sequence[str]]
    """Label → the phrases that mean it, such as {"cat": ["a cat", "a kitten"]}."""
    templates: Sequence[str] = DEFAULT_TEMPLATES
    activation: Activation | None = None
    """None: the encoder's own."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """How a linear label set came about, and what it may be trusted with."""

    kind: ProbeKind
    """linear: multinomial logistic regression; prototypes: the mean direction of each label's images."""
    counts: Mapping[str, int]
    """Label → images that it was fitted to, in the labels' order."""
    judged: int = 0
    """Images that were held out once each, to be judged by a fit without them; 0 where no label has two."""
    accuracy: float | None = None
    """Share of those that were named right, 0..1."""
    ece: float | None = None
    """Expected calibration error on those: how far probabilities are from the share that was right, 0..1."""
    collection: str | None = None
    field: str | None = None
    """The metadata field that held the labels."""


@dataclass(frozen=True, slots=True, eq=False)
class LinearLabelSet:
    """Labels as a linear classifier: probabilities are softmax(weights · vector + bias).

    Where `dim` is less than the encoder's, only the vector's first `dim` numbers count, at unit length again.
    """

    labels: tuple[str, ...]
    weights: Vectors = field(repr=False)
    """float32 (labels, dim)."""
    bias: NDArray[np.float64] = field(repr=False)
    """float64 (labels,)."""
    encoder: str
    """The name of the encoder whose vectors these are."""
    fingerprint: str
    """sha256 (hex) of what decides its vectors (`embedserve.bundle.Bundle.fingerprint`)."""
    fitted: Fitted

    @property
    def dim(self) -> int:
        return int(self.weights.shape[1])


def check_labels(
    given: Sequence[str] | Mapping[str, str | Sequence[str]], limit: int
) -> dict[str, list[str]]:
    """Labels as label → prompts; a bare label is its own prompt.

    Raises InvalidField (none, empty, given twice, too long), TooLarge (more than `limit`).
    """
    if isinstance(given, Mapping):
        entries = [
            (label, [prompts] if isinstance(prompts, str) else list(prompts))
            for label, prompts in given.items()
        ]
    else:
        entries = [(label, [label]) for label in given]
    if not entries:
        raise InvalidField("'labels' is empty; give the words to choose from.", param="labels")
    if len(entries) > limit:
        raise TooLarge(f"'labels' has {len(entries)} labels; at most {limit} are allowed.", param="labels")
    labels: dict[str, list[str]] = {}
    for label, prompts in entries:
        if label in labels:
            raise InvalidField(f"The label '{label[:80]}' is given twice; give it once.", param="labels")
        if not label.strip() or not prompts or not all(prompt.strip() for prompt in prompts):
            raise InvalidField(
                f"The label '{label[:80]}' is empty or has an empty prompt; write out what it means.",
                param="labels",
            )
        if max(map(len, [label, *prompts])) > MAX_LABEL_CHARACTERS:
            raise TooLarge(
                f"The label '{label[:40]}…' or a prompt of it is longer than {MAX_LABEL_CHARACTERS} "
                "characters; a label is a few words.",
                param="labels",
            )
        labels[label] = prompts
    return labels


def check_templates(templates: Sequence[str] | None) -> tuple[str, ...]:
    """The templates; the default ones for None. Raises InvalidField unless each holds `{}` exactly once."""
    if templates is None:
        return DEFAULT_TEMPLATES
    if not 1 <= len(templates) <= MAX_TEMPLATES:
        raise InvalidField(
            f"'templates' has {len(templates)} entries; give 1 to {MAX_TEMPLATES}, or leave it out for the "
            "default ones.",
            param="templates",
        )
    for index, template in enumerate(templates):
        if template.count("{}") != 1 or len(template) > MAX_LABEL_CHARACTERS:
            raise InvalidField(
                f"'templates[{index}]' is '{template[:80]}'; a template holds {{}} exactly once, where the "
                f"label goes, as in 'a photo of {{}}.', and has at most {MAX_LABEL_CHARACTERS} characters.",
                param=f"templates[{index}]",
            )
    return tuple(templates)


def linear_label_set(
    *,
    labels: Sequence[str],
    weights: str,
    bias: Sequence[float],
    dim: int,
    encoder: str,
    fingerprint: str,
    fitted: Fitted,
) -> LinearLabelSet:
    """The set, from the form in which it is sent and saved.

    Args:
        weights: base64 of little-endian float32, label after label (`embedserve.bundle.pack_vector`).
        dim: Numbers of each label in `weights`.

    Raises InvalidField: fewer than two labels, one given twice or empty, sizes that do not fit together,
    numbers that are not finite, counts or figures that cannot be.
    """
    check_labels(labels, len(labels))
    if len(labels) < 2:
        raise InvalidField("'labels' has one label; a classifier needs two or more.", param="labels")
    try:
        flat = np.frombuffer(base64.b64decode(weights, validate=True), "<f4").astype(np.float32)
    except ValueError:
        raise InvalidField(
            "'weights' is not base64 of little-endian float32 numbers.", param="weights"
        ) from None
    if dim < 1 or flat.size != len(labels) * dim:
        raise InvalidField(
            f"'weights' holds {flat.size} numbers; {len(labels)} labels of dim {dim} need "
            f"{len(labels) * dim}.",
            param="weights",
        )
    if len(bias) != len(labels):
        raise InvalidField(
            f"'bias' has {len(bias)} numbers; give one for each of the {len(labels)} labels.", param="bias"
        )
    shift = np.asarray(bias, np.float64)
    for name, numbers in (("weights", flat), ("bias", shift)):
        if not np.isfinite(numbers).all():
            raise InvalidField(f"'{name}' holds a number that is not finite; fit the set again.", param=name)
    _check_fitted(fitted, labels)
    return LinearLabelSet(
        tuple(labels),
        flat.reshape(len(labels), dim),
        np.asarray(bias, np.float64),
        encoder,
        fingerprint,
        fitted,
    )


def _check_fitted(fitted: Fitted, labels: Sequence[str]) -> None:
    """Raises InvalidField for counts that are not the labels' or below 1, and for shares outside 0..1."""
    if list(fitted.counts) != list(labels) or min(fitted.counts.values()) < 1:
        raise InvalidField(
            "'fitted.counts' must say for each label, in the labels' order, to how many images (1 or more) "
            "it was fitted.",
            param="fitted.counts",
        )
    if not 0 <= fitted.judged <= sum(fitted.counts.values()):
        raise InvalidField(
            f"'fitted.judged' is {fitted.judged}; it is 0 to {sum(fitted.counts.values())}, the images that "
            "the counts add up to.",
            param="fitted.judged",
        )
    for name, share in (("accuracy", fitted.accuracy), ("ece", fitted.ece)):
        if (share is None) != (fitted.judged == 0) or not (share is None or 0 <= share <= 1):
            raise InvalidField(
                f"'fitted.{name}' is {share}; it is a share, 0 to 1, of the images judged, and null where "
                "none were.",
                param=f"fitted.{name}",
            )


def check_encoder(saved: LinearLabelSet, bundle: Bundle, *, param: str = "label_set") -> None:
    """Raises Conflict for a set that was fitted to another encoder's vectors."""
    if saved.fingerprint == bundle.fingerprint and saved.dim <= bundle.dim:
        return
    raise Conflict(
        f"These labels were fitted to vectors of the encoder '{saved.encoder}' ({saved.fingerprint[:8]}, "
        f"{saved.dim} numbers); this server runs '{bundle.name}' ({bundle.fingerprint[:8]}, {bundle.dim} "
        "numbers). Fit them anew with `embedserve train probe`, or serve the encoder they belong to.",
        param=param,
        code="encoder_mismatch",
    )


def as_json(saved: LabelSet | LinearLabelSet) -> dict[str, Any]:
    """How a set is sent and saved."""
    if isinstance(saved, LabelSet):
        return {
            "labels": {label: list(prompts) for label, prompts in saved.labels.items()},
            "templates": list(saved.templates),
            "activation": saved.activation,
        }
    return {
        "kind": "linear",
        "labels": list(saved.labels),
        "dim": saved.dim,
        "weights": pack_vector(saved.weights),
        "bias": saved.bias.tolist(),
        "encoder": saved.encoder,
        "fingerprint": saved.fingerprint,
        "fitted": asdict(saved.fitted),
    }


def _from_json(saved: dict[str, Any]) -> LabelSet | LinearLabelSet:
    if saved.get("kind") == "linear":
        given = {name: value for name, value in saved.items() if name != "kind"}
        return linear_label_set(**{**given, "fitted": Fitted(**saved["fitted"])})
    return LabelSet(
        labels={label: list(prompts) for label, prompts in saved["labels"].items()},
        templates=tuple(saved["templates"]),
        activation=saved["activation"],
    )


class LabelSets:
    """Label sets as JSON files below one folder, each written whole or not at all. Blocking: use a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """All saved names, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.json") if NAME.fullmatch(path.stem))

    def get(self, name: str) -> LabelSet | LinearLabelSet:
        """Raises NotFound with the closest name, EmbedServeError for a damaged file."""
        path = self._path(name)
        try:
            return _from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise NotFound(
                f"There is no label set '{name}'; {closest(name, self.names())} "
                "Save one with PUT /v1/labelsets/{name}.",
                param="label_set",
                code="label_set_not_found",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, InvalidField):
            raise EmbedServeError(
                f"The file of the label set '{name}' is damaged; save the set again.",
                code="label_set_damaged",
            ) from None

    def put(self, name: str, labels: LabelSet | LinearLabelSet) -> bool:
        """Saves, durably; True when the name is new. Raises InvalidField for a name that is not allowed."""
        path = self._path(name)
        self._folder.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=self._folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(as_json(labels), file, ensure_ascii=False, indent=2)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._sync_folder()
        return new

    def delete(self, name: str) -> None:
        """Raises NotFound."""
        try:
            self._path(name).unlink()
        except FileNotFoundError:
            raise NotFound(
                f"There is no label set '{name}'; {closest(name, self.names())}", code="label_set_not_found"
            ) from None
        self._sync_folder()

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise InvalidField(
                f"'{name[:80]}' cannot name a label set; use 1 to 64 of a-z, 0-9, - and _, beginning with a "
                "letter or digit.",
                param="name",
            )
        return self._folder / f"{name}.json"

    def _sync_folder(self) -> None:
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
