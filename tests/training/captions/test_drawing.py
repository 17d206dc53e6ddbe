"""Captions as token ids, and the draw of one for each image and step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from embedserve.errors import InvalidField
from tests.training.data.samples import folder_of
from tests.training.ranks import on_ranks
from tests.training.text.examples import word_rules
from training.batches import Batches
from training.captions import CaptionRules, Captions
from training.data import open_pixels, open_source
from training.views import Augmentation

SAID = [("red", "red shoe", "a shoe"), ("hat",), ("red", "blue hat")]


@pytest.fixture(scope="module")
def captions() -> Captions:
    return Captions(SAID, word_rules(), seed=3)


def test_a_wording_has_one_id_for_all_images_that_share_it(captions: Captions) -> None:
    assert captions.texts == ("red", "red shoe", "a shoe", "hat", "blue hat")
    assert [captions.all_of(row).tolist() for row in range(3)] == [[0, 1, 2], [3], [0, 4]]
    assert captions.first(np.array([2, 0, 1])).tolist() == [0, 0, 3]
    assert len(captions) == 3


def test_tokens_are_those_of_the_tokenizer_filled_up_to_a_multiple_of_eight() -> None:
    rules = word_rules(context_length=12)
    captions = Captions(SAID, rules, seed=0)
    tokens = captions.tokens(np.array([1, 3]))
    assert tokens.dtype == np.int64
    assert tokens.shape == (2, 8)
    for row, text in zip(tokens, ("red shoe", "hat"), strict=True):
        [ids] = rules.encode([text])
        assert row.tolist() == ids + [rules.pad_id] * (8 - len(ids))
    assert captions.tokens(np.array([], np.int64)).shape == (0, 8)


def test_a_tower_that_sees_its_padding_gets_all_of_it() -> None:
    captions = Captions(SAID, word_rules(context_length=12, padding="context"), seed=0)
    assert captions.tokens(np.array([0])).shape == (1, 12)


def test_a_batch_is_never_wider_than_the_context() -> None:
    captions = Captions([("red " * 40,), ("hat",)], word_rules(context_length=12), seed=0)
    assert captions.tokens(np.array([0, 1])).shape == (2, 12)
    assert captions.tokens(np.array([0]))[0, -1] == word_rules().encode(["hat"])[0][-1], "the end token stays"
    assert captions.cut == 1
    assert captions.remarks() == [
        "1 of 2 captions fill the text tower's 12 tokens; what is longer is cut.",
    ]


def test_many_captions_have_the_tokens_that_few_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are tokenized some thousand at a time."""
    texts = [(f"red {'shoe ' * (number % 5)}hat",) for number in range(30)]
    whole = Captions(texts, word_rules(), seed=0)
    monkeypatch.setattr("training.captions.drawing.AT_ONCE", 4)
    ids = np.arange(len(whole.texts))
    assert (Captions(texts, word_rules(), seed=0).tokens(ids) == whole.tokens(ids)).all()


def test_a_draw_depends_on_seed_and_step_alone(captions: Captions) -> None:
    rows = np.tile(np.arange(3), 40)
    again = Captions(SAID, word_rules(), seed=3)
    assert (captions.drawn(rows, 7) == again.drawn(rows, 7)).all()
    assert (captions.drawn(rows, 7) != captions.drawn(rows, 8)).any()
    assert (captions.drawn(rows, 7) != Captions(SAID, word_rules(), seed=4).drawn(rows, 7)).any()


def test_an_image_gets_each_of_its_own_captions_equally_often(captions: Captions) -> None:
    drawn = np.concatenate([captions.drawn(np.array([0, 1, 2]), step)[None] for step in range(3000)])
    for row, own in ((0, 3), (1, 1), (2, 2)):
        counts = Counter(drawn[:, row].tolist())
        assert set(counts) == set(captions.all_of(row).tolist())
        expected = 3000 / own
        # χ² of less than 3 degrees of freedom is above 13.8 in one of a thousand draws.
        assert sum((count - expected) ** 2 / expected for count in counts.values()) < 13.8
    joint = Counter(zip(drawn[:, 0].tolist(), drawn[:, 2].tolist(), strict=True))
    assert min(joint.values()) > 400, "images of a batch are drawn independently of each other"


def _texts_of(folder: str) -> list[list[list[int]]]:
    """The ids of the captions that this rank sees in two steps."""
    source = open_source(folder, captions=CaptionRules(by="name"))
    source = source.select(np.arange(8))
    pixels = open_pixels(source, 8, device=torch.device("cpu"), workers=1)
    captions = Captions([(f"red {n}", f"hat {n}", f"shoe {n}") for n in range(8)], word_rules(), seed=0)
    batches = Batches(
        pixels,
        np.arange(8),
        (Augmentation().view(8),),
        batch_size=8,
        parts=1,
        seed=0,
        groups=False,
        captions=captions,
    )
    parts = list(batches.from_step(0, 2))
    return [[part.texts.ids.tolist(), part.ids.tolist()] for part in parts if part.texts is not None]


def test_two_ranks_see_the_captions_that_one_would(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("ranks")
    monkeypatch.setenv("EMBEDSERVE_CACHE", str(folder / "cache"))
    folder_of(folder / "images", [f"{'abcdefgh'[number]}.png" for number in range(8)])
    alone = _texts_of(str(folder / "images"))
    first, second = on_ranks(_texts_of, str(folder / "images"))
    joined = [[a + b for a, b in zip(*step, strict=True)] for step in zip(first, second, strict=True)]
    assert joined == alone
    assert alone[0][0] != alone[1][0]


def test_a_tokenizer_with_more_words_than_the_tower_is_refused() -> None:
    with pytest.raises(InvalidField, match=r"tokenizer of 'words' gives the id \d+, but the tower knows 5"):
        Captions(SAID, word_rules(vocabulary=5), seed=0)


def test_words_that_the_tower_does_not_know_are_remarked_on() -> None:
    foreign = Captions([("красный ботинок",), ("赤い 靴",)], word_rules(), seed=0)
    assert foreign.unknown == pytest.approx(4 / 8)  # beside the first and the end token
    assert any("may not know their language or script" in one for one in foreign.remarks())
    repeated = Captions([("red hat",), ("red hat",), ("shoe",)], word_rules(), seed=0)
    assert repeated.remarks() == [
        "1 of 3 captions have the words of another image's; such pairs count as right."
    ]
