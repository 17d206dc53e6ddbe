"""Mixing, diversity, grouping and linking, on vectors that can be checked by eye."""

from __future__ import annotations

import doctest

import numpy as np
import pytest

from embedserve import ranking
from embedserve.errors import InvalidField
from embedserve.ranking import Links, best_per_group, field_value, group_key, mix, mmr

EAST, NORTH = np.array([1, 0], np.float32), np.array([0, 1], np.float32)


def unit(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    array = rng.standard_normal((rows, dim))
    return (array / np.linalg.norm(array, axis=1, keepdims=True)).astype(np.float32)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(ranking).failed == 0


def test_equal_weights_give_the_direction_between_two_vectors() -> None:
    np.testing.assert_allclose(mix(np.stack([EAST, NORTH]), [1, 1]), [0.5**0.5, 0.5**0.5], atol=1e-6)


def test_only_the_ratio_of_weights_matters() -> None:
    vectors = np.stack([EAST, NORTH])
    np.testing.assert_allclose(mix(vectors, [3, -1]), mix(vectors, [3e300, -1e300]), atol=1e-6)
    np.testing.assert_allclose(mix(vectors, [3, -1]), np.array([3, -1]) / 10**0.5, atol=1e-6)


def test_a_negative_weight_alone_turns_the_vector_around() -> None:
    np.testing.assert_array_equal(mix(EAST[None], [-2]), -EAST)


def test_parts_that_cancel_out_are_refused() -> None:
    with pytest.raises(InvalidField, match="cancel out"):
        mix(np.stack([EAST, EAST]), [1, -1])


def test_weights_that_are_all_zero_are_refused() -> None:
    with pytest.raises(InvalidField, match="All weights are 0"):
        mix(np.stack([EAST, NORTH]), [0, 0])


def slow_mmr(relevance: list[float], vectors: np.ndarray, k: int, diversity: float) -> list[int]:
    """The formula, word for word."""
    chosen: list[int] = []
    while len(chosen) < min(k, len(relevance)):
        best, best_value = -1, -np.inf
        for i in range(len(relevance)):
            if i in chosen:
                continue
            alike = max((float(vectors[i] @ vectors[j]) for j in chosen), default=0.0)
            value = (1 - diversity) * relevance[i] - diversity * alike
            if not chosen:
                value = relevance[i]
            if value > best_value:
                best, best_value = i, value
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("diversity", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_mmr_agrees_with_its_formula(diversity: float) -> None:
    rng = np.random.default_rng(1)
    query, vectors = unit(rng, 1, 6)[0], unit(rng, 40, 6)
    vectors = vectors[np.argsort(-(vectors @ query))]
    relevance = [float(score) for score in vectors @ query]
    assert mmr(relevance, vectors, 12, diversity) == slow_mmr(relevance, vectors, 12, diversity)


def test_mmr_without_diversity_keeps_the_order() -> None:
    assert mmr([0.9, 0.8, 0.7], unit(np.random.default_rng(2), 3, 4), 3, 0.0) == [0, 1, 2]


def test_mmr_passes_over_the_copy_of_what_it_chose() -> None:
    assert mmr([0.9, 0.9, 0.5], np.stack([EAST, EAST, NORTH]), 2, 0.5) == [0, 2]


def test_mmr_of_nothing_is_nothing() -> None:
    assert mmr([], np.empty((0, 2), np.float32), 5, 0.5) == []


def test_the_best_of_each_group_is_its_first() -> None:
    assert best_per_group(["a", "b", "a", "c", "b"]) == [0, 1, 3]


def test_group_keys_follow_json_equality() -> None:
    assert group_key(1) == group_key(1.0) != group_key("1")
    assert group_key(True) != group_key(1)
    assert group_key({"a": 1, "b": [2]}) == group_key({"b": [2], "a": 1}) != group_key({"a": 1})
    assert len({group_key(value) for value in (None, False, 0, "", "null", [], {})}) == 7


def test_a_field_with_a_dot_is_looked_up_in_objects() -> None:
    metadata = {"a": {"b": {"c": 1}}, "plain": 2, "list": [1]}
    assert [field_value(metadata, field) for field in ("a.b.c", "plain", "a.x.c", "list.b", "none")] == [
        1,
        2,
        None,
        None,
        None,
    ]


def test_links_make_groups_by_single_linkage() -> None:
    links = Links()
    for one, other, similarity in [("b", "c", 0.96), ("a", "b", 0.99), ("x", "y", 1.0), ("b", "a", 0.99)]:
        links.add(one, other, similarity)
    # c is no closer to anything than .96; a and c never met.
    assert links.groups() == [(("a", "b", "c"), 0.96), (("x", "y"), 1.0)]


def test_groups_of_one_size_come_the_most_alike_first() -> None:
    links = Links()
    links.add("a", "b", 0.95)
    links.add("c", "d", 0.99)
    links.add("e", "f", 0.95)
    assert [ids for ids, _ in links.groups()] == [("c", "d"), ("a", "b"), ("e", "f")]


def test_a_long_chain_is_one_group() -> None:
    links = Links()
    names = [f"{i:05d}" for i in range(20_000)]
    for one, other in zip(names[1:], names, strict=False):
        links.add(one, other, 0.97)
    assert links.groups() == [(tuple(names), 0.97)]


def test_links_agree_with_connected_components_of_a_random_graph() -> None:
    rng = np.random.default_rng(3)
    links, joined = Links(), {i: {i} for i in range(200)}
    for one, other in rng.integers(0, 200, (150, 2)).tolist():
        if one == other:
            continue
        links.add(str(one), str(other), 1.0)
        union = joined[one] | joined[other]
        for member in union:
            joined[member] = union
    expected = {tuple(sorted(map(str, group))) for group in joined.values() if len(group) > 1}
    assert {ids for ids, _ in links.groups()} == expected
