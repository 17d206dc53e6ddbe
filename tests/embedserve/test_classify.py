"""Zero-shot scores, prompt ensembles, fitted classifiers and the vote of neighbours, without HTTP."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest

from embedserve.bundle import Scoring
from embedserve.classify import Classifier, linear_scores, probabilities, vote
from embedserve.collections import Neighbour
from embedserve.errors import TooLarge
from embedserve.label_sets import Fitted, LinearLabelSet
from embedserve.towers import Towers
from tests.embedserve.colours import axis


def exact(logits: list[float], activation: str) -> list[float]:
    getcontext().prec = 60
    exponentials = [Decimal(logit).exp() for logit in logits]
    if activation == "softmax":
        return [float(each / sum(exponentials)) for each in exponentials]
    return [float(each / (1 + each)) for each in exponentials]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (100.0, 0.0), (112.67, -16.77), (5000.0, 3.0)])
def test_probabilities_agree_with_60_digits(activation: str, scale: float, bias: float) -> None:
    cosines = np.random.default_rng(1).uniform(-1, 1, (5, 7))
    scoring = Scoring(activation=activation, logit_scale=scale, logit_bias=bias)
    found = probabilities(cosines, scoring)
    expected = [exact([scale * cosine + bias for cosine in row], activation) for row in cosines]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)


def test_the_caller_may_choose_the_activation() -> None:
    cosines = np.array([[0.5, -0.5]])
    assert probabilities(cosines, Scoring(logit_scale=1), "sigmoid")[0, 0] == pytest.approx(
        1 / (1 + math.exp(-0.5))
    )


@pytest.mark.anyio
async def test_a_label_is_the_mean_direction_of_its_prompts(towers: Towers) -> None:
    labels = {"warm": ["red", "red green"], "cool": ["blue"]}
    found = await Classifier(towers).label_vectors(labels, ["{}", "{} dark"])
    rows = [axis("red"), axis("red") + axis("dark"), axis("red") + axis("green")]
    rows.append(rows[2] + axis("dark"))
    mean = sum(row / np.linalg.norm(row) for row in rows)
    np.testing.assert_allclose(found[0], mean / np.linalg.norm(mean), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.anyio
async def test_braces_in_a_label_stay_as_they_are(towers: Towers) -> None:
    found = await Classifier(towers).label_vectors({"{0} red {x}": ["{0} red {x}"], "{}": ["{}"]}, ["{}"])
    assert found.shape == (2, 8)


@pytest.mark.anyio
async def test_known_labels_are_not_embedded_again(towers: Towers) -> None:
    classifier = Classifier(towers, cached=2)
    first = await classifier.label_vectors({"a": ["red"], "b": ["blue"]}, ["{}"])
    before = towers.queues["text"].items
    again = await classifier.label_vectors({"x": ["blue"], "y": ["red"]}, ["{}"])
    np.testing.assert_array_equal(again, first[::-1])
    assert towers.queues["text"].items == before
    await classifier.label_vectors({"a": ["red"]}, ["{} small"])  # other templates are other vectors
    assert towers.queues["text"].items == before + 1
    await classifier.label_vectors({"b": ["red"]}, ["{}"])  # still among the last two
    assert towers.queues["text"].items == before + 1
    await classifier.label_vectors({"b": ["blue"]}, ["{}"])  # pushed out
    assert towers.queues["text"].items == before + 2


@pytest.mark.anyio
async def test_more_labels_than_the_cache_holds_still_work(towers: Towers) -> None:
    labels = {str(n): [word] for n, word in enumerate(["red", "green", "blue", "dark"])}
    found = await Classifier(towers, cached=2).label_vectors(labels, ["{}"])
    np.testing.assert_allclose(found, [axis(w) for w in ("red", "green", "blue", "dark")], atol=1e-6)


@pytest.mark.anyio
async def test_too_many_prompts_are_refused_before_any_is_embedded(towers: Towers) -> None:
    before = towers.queues["text"].items
    with pytest.raises(TooLarge, match="at most 20000"):
        await Classifier(towers).label_vectors({str(n): ["red"] for n in range(2001)}, ["{}"] * 10)
    assert towers.queues["text"].items == before


@pytest.mark.anyio
async def test_the_best_labels_come_first(towers: Towers) -> None:
    classifier = Classifier(towers)
    label_vectors = await classifier.label_vectors({"r": ["red"], "g": ["green"], "b": ["blue"]}, ["{}"])
    images = np.stack([axis("green", "blue", 0.3), axis("red")])
    first, second = classifier.score(images, ["r", "g", "b"], label_vectors, top=2)
    assert [scored.label for scored in first] == ["g", "b"]
    assert second[0].label == "r"
    assert first[0].cosine == pytest.approx(math.cos(0.3), abs=1e-6)
    everything = classifier.score(images, ["r", "g", "b"], label_vectors)
    assert sum(scored.probability for scored in everything[0]) == pytest.approx(1)


def test_a_fitted_classifier_gives_the_softmax_of_its_scores() -> None:
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(4, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights, bias = generator.normal(size=(3, 5)).astype(np.float32) * 30, np.array([0.5, -2.0, 1.0])
    saved = LinearLabelSet(("a", "b", "c"), weights, bias, "tiny", "f", Fitted("linear", {}))
    for vector, scored in zip(vectors, linear_scores(vectors, saved), strict=True):
        logits = [
            float(np.dot(row.astype(float), vector) + shift) for row, shift in zip(weights, bias, strict=True)
        ]
        expected = dict(zip("abc", exact(logits, "softmax"), strict=True))
        assert [one.label for one in scored] == sorted("abc", key=expected.__getitem__, reverse=True)
        for one in scored:
            assert one.probability == pytest.approx(expected[one.label], rel=1e-9)
            row = weights["abc".index(one.label)]
            assert one.cosine == pytest.approx(float(row @ vector / np.linalg.norm(row)), abs=1e-6)
    assert [len(scored) for scored in linear_scores(vectors, saved, top=2)] == [2, 2, 2, 2]


def test_a_label_without_weights_has_cosine_0_and_no_overflow_happens() -> None:
    weights = np.array([[0, 0], [3e38, 0]], np.float32)
    saved = LinearLabelSet(("none", "huge"), weights, np.zeros(2), "tiny", "f", Fitted("linear", {}))
    ((best, other),) = linear_scores(np.array([[1, 0]], np.float32), saved)
    assert (best.label, best.probability, best.cosine) == ("huge", 1.0, 1.0)
    assert (other.probability, other.cosine) == (0.0, 0.0)


def neighbour(score: float, *labels: str | int | float | bool) -> Neighbour:
    return Neighbour(f"{score}", score, labels)


def test_neighbours_vote_with_softmax_weights() -> None:
    votes = vote([neighbour(0.9, "cat"), neighbour(0.8, "dog"), neighbour(0.7, "cat")])
    weights = [math.exp(score / 0.07) for score in (0.9, 0.8, 0.7)]
    assert [(each.label, each.neighbours) for each in votes] == [("cat", 2), ("dog", 1)]
    assert votes[0].probability == pytest.approx((weights[0] + weights[2]) / sum(weights))
    assert sum(each.probability for each in votes) == pytest.approx(1)


def test_a_colder_vote_listens_to_the_nearest() -> None:
    near_and_far = [neighbour(0.9, "near"), *[neighbour(0.8, "far")] * 5]
    assert vote(near_and_far, temperature=1.0)[0].label == "far"
    assert vote(near_and_far, temperature=0.001)[0].label == "near"
    assert vote(near_and_far, temperature=1e-9)[0].probability == pytest.approx(1)


def test_several_labels_share_a_vote_and_true_is_not_one() -> None:
    votes = vote([neighbour(0.5, "a", "b"), neighbour(0.5, True), neighbour(0.5, 1)])
    assert {(type(each.label), each.label): each.probability for each in votes} == pytest.approx(
        {(str, "a"): 1 / 6, (str, "b"): 1 / 6, (bool, True): 1 / 3, (int, 1): 1 / 3}
    )
    assert vote([]) == []
