"""Retrieval: recall and average precision against loops, and what may be asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from embedserve.errors import InvalidField
from tests.training.evaluate.samples import EyeEncoder, coloured, mean_colour, source_of, unit, without_labels
from training.evaluate import retrieval
from training.evaluate.retrieval import RetrievalSettings, evaluate_retrieval, leave_one_out, nearest_others


def _literal(features, belongs, query):
    """Rank of the first right image, and average precision, with loops in float64."""
    rows = unit(features.double())
    others = sorted(
        (row for row in range(len(rows)) if row != query), key=lambda row: -float(rows[query] @ rows[row])
    )
    found, first, precisions = 0, None, []
    for rank, row in enumerate(others, start=1):
        if belongs[row] == belongs[query]:
            found += 1
            first = first or rank
            precisions.append(found / rank)
    return first, sum(precisions) / len(precisions)


@pytest.mark.parametrize("chunk", [2**23, 100])
def test_ranks_and_average_precision_are_the_literal_ones(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 4, generator=generator) * 5
    belongs = torch.arange(40) % 7
    queries = torch.arange(3, 40, 2)
    first, precision = leave_one_out(features, belongs, queries)
    expected = [_literal(features, belongs.tolist(), query) for query in queries.tolist()]
    assert first.tolist() == [one for one, _ in expected]
    np.testing.assert_allclose(precision.numpy(), [one for _, one in expected], atol=1e-6)


def test_an_image_does_not_find_itself():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    near = nearest_others(features, torch.tensor([0, 2]), 3)
    assert near.tolist() == [[1, 3, 2], [3, 0, 1]] or near.tolist() == [[1, 3, 2], [3, 1, 0]]
    first, precision = leave_one_out(features, torch.tensor([0, 1, 0, 1]), torch.tensor([0]))
    assert first.tolist() == [3]
    assert precision.tolist() == pytest.approx([1 / 3])


def test_a_perfect_encoder_finds_the_rest_of_its_class_first():
    result = evaluate_retrieval(mean_colour(), coloured(40), RetrievalSettings())
    assert (result.by, result.recall_at_1, result.mean_average_precision) == ("labels", 1, pytest.approx(1))
    assert (result.queries, result.gallery, result.alone) == (40, 40, 0)
    assert result.chance == pytest.approx(9 / 39)
    assert "recall@1 100.0%" in result.summary()


def test_neighbours_are_framed_by_whether_they_belong():
    encoder = EyeEncoder(lambda pixels: [pixels[0, 0, 0] - 100, pixels[0, 0, 1] - 100])
    levels = [(10, 0), (11, 0), (12, 0), (0, 200)]
    images = [np.full((4, 4, 3), (*level, 0), np.uint8) for level in levels]
    result = evaluate_retrieval(encoder, source_of(images, groups=[5, 5, 9, 9]), RetrievalSettings())
    first = result.examples[0]
    assert [tile.frame for tile in first] == [None, retrieval.RIGHT, retrieval.WRONG, retrieval.WRONG]
    picture = result.picture()
    colours = {colour for _, colour in picture.getcolors(2**20)}
    assert {retrieval.RIGHT, retrieval.WRONG} <= colours


def test_groups_count_before_labels_and_either_can_be_asked_for():
    source = replace(coloured(16), groups=np.arange(16) // 2)
    assert evaluate_retrieval(mean_colour(), source, RetrievalSettings()).by == "groups"
    assert evaluate_retrieval(mean_colour(), source, RetrievalSettings(by="labels")).by == "labels"


def test_images_that_nothing_belongs_with_are_found_but_not_asked_for():
    images = [coloured(4).fetch(row) for row in range(4)] * 2
    source = source_of(images, groups=[0, 1, 2, 3, 0, 1, 4, 5])
    result = evaluate_retrieval(mean_colour(), source, RetrievalSettings())
    assert (result.queries, result.gallery, result.alone) == (4, 8, 4)


def test_images_without_a_label_belong_with_nothing():
    source = coloured(16)
    source.labels[:8] = -1
    result = evaluate_retrieval(mean_colour(), source, RetrievalSettings())
    assert (result.queries, result.alone) == (8, 8)


def test_a_trained_encoder_is_asked_for_what_it_has_not_seen():
    encoder = mean_colour()
    encoder.holdout = 0.25
    result = evaluate_retrieval(encoder, coloured(40), RetrievalSettings())
    assert (result.queries, result.gallery) == (10, 40)
    assert evaluate_retrieval(encoder, coloured(40), RetrievalSettings(queries="all")).queries == 40


def test_many_queries_are_drawn_from_with_a_seed(monkeypatch):
    asked = []
    monkeypatch.setattr(
        retrieval, "leave_one_out", lambda *args: asked.append(args[2].tolist()) or leave_one_out(*args)
    )
    for seed in (0, 0, 1):
        assert (
            evaluate_retrieval(mean_colour(), coloured(40), RetrievalSettings(most=5, seed=seed)).queries == 5
        )
    assert asked[0] == asked[1] != asked[2]


def test_without_groups_and_labels_it_says_how_to_name_them():
    with pytest.raises(InvalidField, match="group_by"):
        evaluate_retrieval(mean_colour(), without_labels(coloured()), RetrievalSettings())
    with pytest.raises(InvalidField, match="by=groups"):
        evaluate_retrieval(mean_colour(), coloured(), RetrievalSettings(by="groups"))


def test_groups_of_one_image_cannot_be_asked_for():
    source = replace(coloured(8), groups=np.arange(8))
    with pytest.raises(InvalidField, match="two images or more"):
        evaluate_retrieval(mean_colour(), source, RetrievalSettings())


def test_no_query_is_no_setting():
    with pytest.raises(InvalidField, match="most=0"):
        RetrievalSettings(most=0)
