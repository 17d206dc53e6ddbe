"""Retrieval across the towers: against loops, with several captions for an image and shared ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from embedserve.bundle import Scoring
from embedserve.errors import InvalidField
from tests.training.evaluate.samples import EyeEncoder, mean_colour, source_of, unit
from training.data import Source
from training.evaluate import ranking
from training.evaluate.captions import CaptionsSettings, Pairs, evaluate_captions, found_both_ways
from training.evaluate.drawing import RIGHT, WRONG


def _captions(count: int, seed: int = 0) -> tuple[tuple[str, ...], ...]:
    """One to three captions for each image; some wordings are those of several images."""
    chance = np.random.default_rng(seed)
    return tuple(
        tuple({f"wording {one}" for one in chance.integers(0, 2 * count, chance.integers(1, 4))})
        for _ in range(count)
    )


def _literal(images, texts_of, captions):
    """Ranks of the nearest right answer, with loops in float64: for each image, and for each caption."""
    wordings = list(dict.fromkeys(text for texts in captions for text in texts))
    images = unit(images.double())
    texts = {one: unit(texts_of[one][None].double())[0] for one in wordings}

    def rank(scores, right):
        best = max(score for answer, score in scores.items() if answer in right)
        return 1 + sum(score >= best for answer, score in scores.items() if answer not in right)

    to_text = [
        rank({one: float(images[row] @ texts[one]) for one in wordings}, set(own))
        for row, own in enumerate(captions)
    ]
    to_image = [
        rank(
            {row: float(images[row] @ texts[one]) for row in range(len(images))},
            {row for row, others in enumerate(captions) if one in others},
        )
        for own in captions
        for one in own
    ]
    return to_text, to_image


@pytest.mark.parametrize("chunk", [2**23, 60])
def test_recall_and_median_rank_are_the_literal_ones(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    captions = _captions(40)
    pairs = Pairs(captions)
    assert len(pairs.wordings) < len(pairs.images)  # some are shared
    images = torch.randn(40, 5, generator=generator) * 3
    texts = torch.randn(len(pairs.wordings), 5, generator=generator)
    for text, row in zip(pairs.texts, pairs.images, strict=True):
        texts[text] += 0.5 * images[row]
    expected = _literal(images, dict(zip(pairs.wordings, texts, strict=True)), captions)
    for found, ranks in zip(found_both_ways(images, texts, pairs), expected, strict=True):
        assert found.queries == len(ranks)
        for k in (1, 5, 10):
            share = sum(rank <= k for rank in ranks) / len(ranks)
            assert getattr(found, f"recall_at_{k}") == pytest.approx(share)
        assert found.median_rank == pytest.approx(np.median(ranks))
    assert 0 < expected[0].count(1) < 40


def test_any_caption_of_an_image_is_right_and_a_shared_one_for_all_its_images() -> None:
    pairs = Pairs((("a", "b"), ("b",), ("c",)))
    images = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    texts = torch.tensor([[0.0, 0, 1], [1.0, 0.1, 0], [0, 0.5, 1.0]])  # a: far off; b: image 0; c: image 2
    to_text, to_image = found_both_ways(images, texts, pairs)
    assert to_text.recall_at_1 == pytest.approx(1 / 3)  # image 0 by b; image 1 finds c; image 2 finds a
    assert to_image.recall_at_1 == pytest.approx(3 / 4)  # b twice, c; not a
    assert (to_text.queries, to_text.gallery, to_image.queries, to_image.gallery) == (3, 3, 4, 3)
    assert to_text.chance == pytest.approx((2 + 1 + 1) / 3 / 3)


def test_vectors_that_are_all_the_same_find_nothing() -> None:
    pairs = Pairs((("a",), ("b",), ("c",)))
    for found in found_both_ways(torch.ones(3, 2), torch.ones(3, 2), pairs):
        assert (found.recall_at_1, found.median_rank) == (0, 3)


# --------------------------------------------------------------------------------------- an encoder


class _Colours:
    """A caption is a colour as three numbers."""

    scoring = Scoring()

    def embed(self, texts: Sequence[str], *, progress=lambda done, total: None) -> torch.Tensor:
        return unit(torch.tensor([[float(one) for one in text.split()] for text in texts]) - 127.5)


def _painted(count: int = 30, seed: int = 0) -> tuple[EyeEncoder, Source]:
    """Plain pictures whose caption is their colour."""
    levels = np.random.default_rng(seed).integers(0, 256, (count, 3)).astype(np.uint8)
    source = source_of([np.broadcast_to(one, (8, 8, 3)) for one in levels], name="painted")
    captions = tuple((" ".join(map(str, one)),) for one in levels.tolist())
    encoder = mean_colour()
    encoder.reader = _Colours()
    return encoder, dataclasses.replace(source, captions=captions)


def test_an_encoder_that_knows_the_words_finds_everything_and_shows_it() -> None:
    encoder, source = _painted()
    result = evaluate_captions(encoder, source, CaptionsSettings())
    assert result.image_to_text.recall_at_1 == result.text_to_image.recall_at_1 == 1
    assert (result.images, result.captions, result.wordings) == (30, 30, 30)
    assert result.summary().startswith("image → caption: recall@1 100.0%")
    assert [right for _, right in result.images_shown[0].captions] == [True, False, False, False, False]
    assert [right for _, right in result.texts_shown[0].images] == [True, False, False, False, False]
    colours = {colour for _, colour in result.picture().getcolors(2**24)}
    assert {RIGHT, WRONG} <= colours


def test_what_training_held_out_is_asked_and_of_many_images_some_are_drawn() -> None:
    encoder, source = _painted()
    encoder.holdout = 0.2
    assert evaluate_captions(encoder, source, CaptionsSettings()).images == 6
    assert evaluate_captions(encoder, source, CaptionsSettings(images="all")).images == 30
    assert evaluate_captions(encoder, source, CaptionsSettings(images="all", most=7)).images == 7
    source.test[:4] = True
    assert evaluate_captions(encoder, source, CaptionsSettings()).images == 4


def test_images_without_captions_and_encoders_without_words_are_refused() -> None:
    encoder, source = _painted()
    with pytest.raises(InvalidField, match="opened without captions"):
        evaluate_captions(encoder, dataclasses.replace(source, captions=None), CaptionsSettings())
    with pytest.raises(InvalidField, match="no text tower"):
        evaluate_captions(mean_colour(), source, CaptionsSettings())
    with pytest.raises(InvalidField, match="two of each"):
        evaluate_captions(encoder, source.select(np.arange(1)), CaptionsSettings())
    with pytest.raises(InvalidField, match="most=1"):
        CaptionsSettings(most=1)
