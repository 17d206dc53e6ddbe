"""Labels for images: zero-shot by text prompts, by a fitted classifier, or by labelled neighbours' votes.

Zero-shot: each label is the mean of the unit vectors of its prompts in all templates, scaled to unit length
again (the prompt ensembles of Radford et al. 2021, "Learning transferable visual models from natural language
supervision", section 3.1.4). Probabilities are activation(scale · cosine + bias) with the bundle's scale and
bias: softmax over the labels, or for SigLIP encoders a sigmoid for each label on its own.

Fitted: softmax(W · vector + b) with what a `LinearLabelSet` holds.

Neighbours: each of the k nearest votes for its label with weight exp(cosine / τ), τ = 0.07 (Wu et al. 2018,
"Unsupervised feature learning via non-parametric instance discrimination", section 3.4).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from embedserve.bundle import Scoring
from embedserve.errors import EmbedServeError, InvalidField, TooLarge
from embedserve.label_sets import Activation, LinearLabelSet
from embedserve.towers import Towers

__all__ = [
    "Classifier",
    "Scored",
    "Vote",
    "in_templates",
    "linear_scores",
    "mean_direction",
    "probabilities",
    "vote",
]

Vectors = NDArray[np.float32]

TEMPERATURE = 0.07
MAX_PROMPTS = 20_000
"""Texts that one classification may embed: labels × prompts × templates."""
CACHED_LABELS = 8192
"""Label vectors kept, about 20 MB for 640 dimensions."""
EMBED_AT_ONCE = 256
"""Prompts handed to the text tower at a time, so that a long list leaves room in its queue for others."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One label for one image."""

    label: str
    probability: float
    cosine: float


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


def linear_scores(vectors: Vectors, saved: LinearLabelSet, *, top: int | None = None) -> list[list[Scored]]:
    """For each row of `vectors`, (n, dim of the set) and of unit length, the `top` labels by probability.

    `cosine` is that of the vector and the label's weights: for prototypes the likeness to the label's images.
    """
    products = vectors.astype(np.float64) @ saved.weights.astype(np.float64).T
    lengths = np.linalg.norm(saved.weights.astype(np.float64), axis=1)
    shares = probabilities(products + saved.bias, Scoring(activation="softmax", logit_scale=1.0))
    return _ranked(saved.labels, shares, np.clip(products / np.maximum(lengths, 1e-12), -1, 1), top)


def _ranked(
    labels: Sequence[str], shares: NDArray[np.float64], cosines: NDArray[np.floating[Any]], top: int | None
) -> list[list[Scored]]:
    order = np.argsort(-shares, axis=1, kind="stable")[:, :top]
    return [
        [Scored(labels[i], float(row_shares[i]), float(row_cosines[i])) for i in row]
        for row, row_shares, row_cosines in zip(order, shares, cosines, strict=True)
    ]


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
                "with words. Put labelled images in a collection and fit a label set to them (`embedserve "
                "train probe`), or ask POST /v1/collections/{name}/classify.",
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
        return _ranked(labels, shares, cosines, top)


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
