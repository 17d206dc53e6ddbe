"""An exported tokenizer.json gives the ids that the library's own tokenizer gives, whatever the text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from embedserve.bundle import TextTower
from embedserve.cleaning import clean
from embedserve.errors import InvalidField
from embedserve.tokenizer import Tokenizer
from tests.training.export.texts import (
    ANY_TEXT,
    NASTY,
    SEEDED,
    byte_pairs,
    sentencepiece,
    sentencepiece_like,
    wordpiece,
)
from training import torchvision_ops
from training.export.tokenizers import Tokens, from_hugging_face, from_open_clip

torchvision_ops.register()

from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn  # noqa: E402

Padded = Callable[[list[str]], list[list[int]]]


def serving(tokens: Tokens, folder: Path) -> Tokenizer:
    """As serving loads it from a bundle."""
    file = folder / "tokenizer.json"
    file.write_text(tokens.tokenizer, encoding="utf-8")
    tower = TextTower(
        context_length=tokens.context_length,
        pad_id=tokens.pad_id,
        padding="context",
        cleaning=tokens.cleaning,
    )
    return Tokenizer(tower, file)


class Case:
    """A library's tokenizer, what is exported of it, and what serving makes of that."""

    def __init__(self, name: str, folder: Path) -> None:
        made = _MAKERS[name](folder)
        self.own: Padded = made[0]
        self.tokens: Tokens = made[1]
        self.served = serving(self.tokens, folder)


def _open_clips(tokenizer: Any) -> tuple[Padded, Tokens]:
    return lambda texts: tokenizer(texts).tolist(), from_open_clip(tokenizer)


def _hugging_faces(folder: Path, length: int) -> tuple[Padded, Tokens]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def own(texts: list[str]) -> list[list[int]]:
        rows: list[list[int]] = tokenizer(
            texts, padding="max_length", max_length=length, truncation=True
        ).input_ids
        return rows

    return own, from_hugging_face(tokenizer, length)


_MAKERS: dict[str, Callable[[Path], tuple[Padded, Tokens]]] = {
    "CLIP": lambda _: _open_clips(SimpleTokenizer()),
    "CLIP, case kept": lambda _: _open_clips(SimpleTokenizer(context_length=20, clean="whitespace")),
    "SigLIP": lambda at: _open_clips(HFTokenizer(sentencepiece_like(at), 64, clean="canonicalize")),
    "CLIPA": lambda at: _open_clips(HFTokenizer(wordpiece(at), 32, strip_sep_token=True)),
    "text tower": lambda at: _open_clips(HFTokenizer(wordpiece(at), 77)),
    "Hugging Face CLIP": lambda at: _hugging_faces(byte_pairs(at), 77),
    "Hugging Face SigLIP": lambda at: _hugging_faces(sentencepiece_like(at), 64),
}


@pytest.fixture(scope="module", params=_MAKERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("tokenizer"))


def test_nasty_texts_give_the_same_ids(case: Case) -> None:
    for text in NASTY:
        assert case.served.pad(case.served.encode([text])).tolist() == case.own([text]), text


def test_the_reference_is_the_librarys_row_without_its_padding(case: Case) -> None:
    assert case.tokens.reference(NASTY) == case.served.encode(NASTY)


def test_any_text_gives_the_same_ids(case: Case) -> None:
    @SEEDED
    @given(text=ANY_TEXT)
    def check(text: str) -> None:
        assert case.served.pad(case.served.encode([text])).tolist() == case.own([text])

    check()


def test_no_id_is_outside_of_the_librarys_vocabulary(tmp_path: Path) -> None:
    """The merges that spell out special tokens borrow ids; they must not add any."""
    assert serving(from_open_clip(SimpleTokenizer()), tmp_path).vocabulary == 49408


def test_every_character_gives_the_same_ids(tmp_path: Path) -> None:
    """Between letters, since the classes of the pattern are written out; every eighth of the rarer planes."""
    simple = SimpleTokenizer()
    served = serving(from_open_clip(simple), tmp_path)
    rows = [
        "".join(f"a{chr(code)}b " for code in range(first, first + 8)) for first in range(0x20, 0xD800, 8)
    ]
    assert served.encode(rows) == from_open_clip(simple).reference(rows)


@SEEDED
@given(text=ANY_TEXT)
def test_the_named_rules_are_open_clips(text: str) -> None:
    assert clean(text, "whitespace") == get_clean_fn("whitespace")(text)
    assert clean(text, "lower") == get_clean_fn("lower")(text)
    assert clean(text, "canonicalize") == get_clean_fn("canonicalize")(text)


def test_siglips_tokenizer_in_python_gives_the_same_ids(tmp_path: Path) -> None:
    """But for typed special tokens, which it takes for real."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sentencepiece(tmp_path))
    assert getattr(tokenizer, "backend_tokenizer", None) is None
    tokens = from_hugging_face(tokenizer, 64)
    served = serving(tokens, tmp_path)
    texts = [text for text in NASTY if "</s>" not in text]
    assert served.encode(texts) == tokens.reference(texts)
    whole = tokenizer(texts, padding="max_length", max_length=64, truncation=True).input_ids
    assert served.pad(served.encode(texts)).tolist() == whole


def test_a_tokenizer_that_leaves_out_tokens_at_random_is_refused() -> None:
    with pytest.raises(InvalidField, match="leaves tokens out at random"):
        from_open_clip(SimpleTokenizer(reduction_mask="random"))


def test_a_tokenizer_with_a_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidField, match="HFTokenizer in mode 'clips' cannot be written"):
        from_open_clip(HFTokenizer(wordpiece(tmp_path), 77, tokenizer_mode="clips"))


def test_a_tokenizer_that_works_from_the_left_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(wordpiece(tmp_path), padding_side="left")
    with pytest.raises(InvalidField, match="fills up texts on the left"):
        from_hugging_face(tokenizer, 77)


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(wordpiece(tmp_path), pad_token=None)
    with pytest.raises(InvalidField, match="names no padding token"):
        from_hugging_face(tokenizer, 77)
