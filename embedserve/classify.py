"""Labels for images: zero-shot by text prompts, or by the vote of labelled neighbours.

Zero-shot: each label is the mean of the unit vectors of its prompts in all templates, scaled to unit length
again (the prompt ensembles of Radford et al. 2021, "Learning transferable visual models from natural language
supervision", section 3.1.4). Probabilities are activation(scale · cosine + bias) with the bundle's scale and
bias: softmax over the labels, or for SigLIP encoders a sigmoid for each label on its own.

Neighbours: each of the k nearest votes for its label with weight exp(cosine / τ), τ = 0.07 (Wu et al. 2018,
"Unsupervised feature learning via non-parametric instance discrimination", section 3.4).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from embedserve.bundle import Scoring
from embedserve.errors import EmbedServeError, InvalidField, NotFound, TooLarge, closest
from embedserve.towers import Towers

__all__ = [
    "DEFAULT_TEMPLATES",
    "Activation",
    "Classifier",
    "LabelSet",
    "LabelSets",
    "Scored",
    "Vote",
    "check_labels",
    "check_templates",
    "in_templates",
    "mean_direction",
    "probabilities",
    "vote",
]

Activation = Literal["softmax", "sigmoid"]
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

TEMPERATURE = 0.07
MAX_TEMPLATES = 100
MAX_LABEL_CHARACTERS = 1000
MAX_PROMPTS = 20_000
"""Texts that one classification may embed: labels × prompts × templates."""
CACHED_LABELS = 8192
"""Label vectors kept, about 20 MB for 640 dimensions."""
EMBED_AT_ONCE = 256
"""Prompts handed to the text tower at a time, so that a long list leaves room in its queue for others."""
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclass(frozen=True, slots=True)
class Scored:
    """One label for one image."""

    label: str
    probability: float
    cosine: float


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Labels with their prompts, and how to use them."""

    labels: Mapping[str, Sequence[str]]
    """Label → the phrases that mean it, such as {"cat": ["a cat", "a kitten"]}."""
    templates: Sequence[str] = DEFAULT_TEMPLATES
    activation: Activation | None = None
    """None: the encoder's own."""


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


def probabilities(
    cosines: NDArray[np.floating[Any]], scoring: Scoring, activation: Activation | None = None
) -> NDArray[np.float64]:
    """float64 (n, labels) from cosines of that shape, without overflow for any scale."""
    logits = scoring.logit_scale * cosines.astype(np.float64) + scoring.logit_bias
    if (activation or scoring.activation) == "sigmoid":
        small = np.exp(-np.abs(logits))
        return np.where(logits >= 0, 1.0, small) / (1.0 + small)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares


def in_templates(prompts: Sequence[str], templates: Sequence[str]) -> list[str]:
    """The texts that stand for a label: each of its prompts in each template."""
    return [template.replace("{}", prompt) for prompt in prompts for template in templates]


def mean_direction(rows: Sequence[Vectors], prompts: Sequence[str]) -> Vectors:
    """The vector of a label: the mean of its texts' unit vectors, float32 (dim,), of unit length again.

    Args:
        rows: One for each of `in_templates`.
        prompts: For the message.

    Raises InvalidField when they cancel out.
    """
    mean = np.mean(np.stack(rows), axis=0, dtype=np.float64)
    norm = float(np.linalg.norm(mean))
    if norm < 1e-6:
        raise InvalidField(
            f"The prompts of '{prompts[0][:80]}' cancel out; their mean has no direction. Use fewer prompts.",
            param="labels",
        )
    return np.asarray(mean / norm, dtype=np.float32)


class Classifier:
    """Zero-shot classification with the towers' encoder. One per app; used from one event loop."""

    def __init__(self, towers: Towers, *, cached: int = CACHED_LABELS) -> None:
        self._towers = towers
        self._cached = cached
        self._vectors: OrderedDict[tuple[tuple[str, ...], tuple[str, ...]], Vectors] = OrderedDict()

    def check_text(self) -> None:
        """Raises InvalidField for an encoder without a text tower, naming the way that remains."""
        if not self._towers.encoder.has_text:
            raise InvalidField(
                f"The encoder '{self._towers.encoder.name}' has no text tower, so it cannot compare images "
                "with words. Put labelled images in a collection and ask "
                "POST /v1/collections/{name}/classify.",
                param="labels",
                code="no_text_tower",
            )

    async def label_vectors(self, labels: Mapping[str, Sequence[str]], templates: Sequence[str]) -> Vectors:
        """Unit vectors, float32 (labels, dim), in the labels' order. Those known already are not computed.

        Raises InvalidField (no text tower), TooLarge (too many prompts), Busy.
        """
        self.check_text()
        prompts_each = sum(len(prompts) for prompts in labels.values()) * len(templates)
        if prompts_each > MAX_PROMPTS:
            raise TooLarge(
                f"The labels' prompts times the templates make {prompts_each} texts; at most {MAX_PROMPTS} "
                "are embedded at once. Use fewer templates, or classify in two steps.",
                param="labels",
            )
        frame = tuple(templates)
        keys = {label: (tuple(prompts), frame) for label, prompts in labels.items()}
        known = {key: self._vectors[key] for key in keys.values() if key in self._vectors}
        missing = [key for key in dict.fromkeys(keys.values()) if key not in known]
        known.update(zip(missing, await self._embed(missing), strict=True))
        for key in keys.values():
            self._vectors[key] = known[key]
            self._vectors.move_to_end(key)
        while len(self._vectors) > self._cached:
            self._vectors.popitem(last=False)
        return np.stack([known[key] for key in keys.values()])

    async def _embed(self, keys: Sequence[tuple[tuple[str, ...], tuple[str, ...]]]) -> list[Vectors]:
        texts = [text for prompts, templates in keys for text in in_templates(prompts, templates)]
        rows: list[Vectors] = []
        for start in range(0, len(texts), EMBED_AT_ONCE):
            for row in await self._towers.texts(texts[start : start + EMBED_AT_ONCE]):
                if isinstance(row, EmbedServeError):
                    raise row
                rows.append(row)
        vectors, start = [], 0
        for prompts, templates in keys:
            end = start + len(prompts) * len(templates)
            vectors.append(mean_direction(rows[start:end], prompts))
            start = end
        return vectors

    def score(
        self,
        vectors: Vectors,
        labels: Sequence[str],
        label_vectors: Vectors,
        *,
        activation: Activation | None = None,
        top: int | None = None,
    ) -> list[list[Scored]]:
        """For each row of `vectors`, (n, dim), the `top` labels, most probable first.

        A softmax over one label is 1, whatever the image; its cosine tells more then.
        """
        scoring = self._towers.encoder.bundle.description.scoring
        cosines = np.clip(vectors @ label_vectors.T, -1, 1)
        shares = probabilities(cosines, scoring, activation)
        order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
        return [
            [Scored(labels[i], float(row_shares[i]), float(row_cosines[i])) for i in row]
            for row, row_shares, row_cosines in zip(order, shares, cosines, strict=True)
        ]


# --- the vote of neighbours -----------------------------------------------------------------------------


class Voter(Protocol):
    """A labelled neighbour; `embedserve.collections.Neighbour` is one."""

    @property
    def score(self) -> float: ...
    @property
    def labels(self) -> Sequence[str | int | float | bool]: ...


@dataclass(frozen=True, slots=True)
class Vote:
    """What the neighbours say about one label."""

    label: str | int | float | bool
    probability: float
    """The label's share of all weights."""
    neighbours: int
    """How many voted for it."""


def vote(neighbours: Sequence[Voter], *, temperature: float = TEMPERATURE) -> list[Vote]:
    """Labels by their share of the neighbours' weights exp(score / temperature), the largest first.

    A neighbour with several labels divides its weight among them. No neighbours, no votes.
    """
    if not neighbours:
        return []
    scores = np.array([neighbour.score for neighbour in neighbours], dtype=np.float64)
    weights = np.exp((scores - scores.max()) / temperature)
    weights /= weights.sum()
    # True == 1 == 1.0 in Python, but they are different labels.
    votes: dict[tuple[type, object], tuple[str | int | float | bool, float, int]] = {}
    for neighbour, weight in zip(neighbours, weights, strict=True):
        for label in neighbour.labels:
            key = (bool if isinstance(label, bool) else object, label)
            _, share, count = votes.get(key, (label, 0.0, 0))
            votes[key] = (label, share + float(weight) / len(neighbour.labels), count + 1)
    ranked = sorted(votes.values(), key=lambda entry: (-entry[1], str(entry[0])))
    return [Vote(label, min(share, 1.0), count) for label, share, count in ranked]


# --- saved label sets -----------------------------------------------------------------------------------


class LabelSets:
    """Label sets as JSON files below one folder, each written whole or not at all. Blocking: use a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """All saved names, sorted."""
        return sorted(path.stem for path in self._folder.glob("*.json") if NAME.fullmatch(path.stem))

    def get(self, name: str) -> LabelSet:
        """Raises NotFound with the closest name, EmbedServeError for a damaged file."""
        path = self._path(name)
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            return LabelSet(
                labels={label: list(prompts) for label, prompts in saved["labels"].items()},
                templates=tuple(saved["templates"]),
                activation=saved["activation"],
            )
        except FileNotFoundError:
            raise NotFound(
                f"There is no label set '{name}'; {closest(name, self.names())} "
                "Save one with PUT /v1/labelsets/{name}.",
                param="label_set",
                code="label_set_not_found",
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise EmbedServeError(
                f"The file of the label set '{name}' is damaged; save the set again.",
                code="label_set_damaged",
            ) from None

    def put(self, name: str, labels: LabelSet) -> bool:
        """Saves, durably; True when the name is new. Raises InvalidField for a name that is not allowed."""
        path = self._path(name)
        self._folder.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        saved = {
            "labels": {label: list(prompts) for label, prompts in labels.labels.items()},
            "templates": list(labels.templates),
            "activation": labels.activation,
        }
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name}-", dir=self._folder)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(saved, file, ensure_ascii=False, indent=2)
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
