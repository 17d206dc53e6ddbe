"""Texts become the ids that the text tower was trained on, whatever the text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from embedserve.bundle import TextTower
from embedserve.errors import BundleError, InvalidField
from embedserve.tokenizer import Tokenizer

PAD, UNKNOWN, START, END, A, B = range(6)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tokenizer of the words a and b between start and end, with cutting and padding rules of its own."""
    vocabulary = {"[pad]": PAD, "[unk]": UNKNOWN, "[start]": START, "[end]": END, "a": A, "b": B}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[start] $A [end]", special_tokens=[("[start]", START), ("[end]", END)]
    )
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=7, pad_id=PAD, pad_token="[pad]")
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return file


@pytest.fixture
def tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(TextTower(context_length=6, pad_id=PAD), path)


def test_the_bundle_decides_on_length_and_padding_not_the_file(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(["a b a"]) == [[START, A, B, A, END]]


def test_a_long_text_is_cut_and_keeps_its_special_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(["a b a b a b a b"]) == [[START, A, B, A, B, END]]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("", []),
        ("   \n", []),
        ("a\0b", [UNKNOWN]),  # the normalizer drops NUL, "ab" is no word
        ("\0", []),
        ("a \ud800 b", [A, B]),  # a lone surrogate becomes U+FFFD, which the normalizer drops
        ("a \ud83d\ude00 b", [A, UNKNOWN, B]),  # a pair of them is an emoji
        ("a 👩‍👩‍👧‍👦", [A, UNKNOWN]),
        ("שלום a", [UNKNOWN, A]),
        ("\u202ea\u202c", [A]),  # right-to-left override
    ],
)
def test_any_string_becomes_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode([text]) == [[START, *ids, END]]


def test_a_surrogate_pair_is_the_character_it_stands_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(["\ud83d\ude00"]) == tokenizer.encode(["😀"])


@pytest.mark.parametrize("text", ["a b " * 25_000, "a" * 100_000, "😀" * 25_000])
def test_a_hundred_kilobytes_are_cut_like_any_text(tokenizer: Tokenizer, text: str) -> None:
    (encoded,) = tokenizer.encode([text])
    assert len(encoded) <= 6
    assert encoded[0] == START
    assert encoded[-1] == END


def test_no_texts_give_no_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode([]) == []


def test_threads_may_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    texts = ["a " * n + "b" for n in range(5)] * 200
    alone = [tokenizer.encode([text])[0] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: tokenizer.encode([text])[0], texts))
    assert together == alone


def test_padding_goes_to_the_longest(tokenizer: Tokenizer) -> None:
    padded = tokenizer.pad([[START, END], [START, A, END]])
    assert padded.dtype == "int64"
    assert padded.tolist() == [[START, END, PAD], [START, A, END]]


def test_padding_goes_to_the_context_where_the_tower_wants_it(path: Path) -> None:
    tokenizer = Tokenizer(TextTower(context_length=6, pad_id=1, padding="context"), path)
    assert tokenizer.pad([[START, A, END]]).tolist() == [[START, A, END, 1, 1, 1]]
    assert tokenizer.padded_length(2) == 6


def test_a_batch_is_never_without_columns(tokenizer: Tokenizer) -> None:
    assert tokenizer.pad([[]]).tolist() == [[PAD]]


def test_token_ids_within_the_vocabulary_are_taken(tokenizer: Tokenizer) -> None:
    assert tokenizer.accept([PAD, B]) == [PAD, B]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([A, 6], r"Token id 6 at position 1 .* \(0 to 5\)"),
        ([-1], r"Token id -1 at position 0"),
        ([10**30], r"Token id 1000"),
        ([A] * 7, r"has 7 ids; this encoder takes at most 6"),
        ([], r"is empty"),
    ],
)
def test_other_token_ids_are_named(tokenizer: Tokenizer, ids: list[int], message: str) -> None:
    with pytest.raises(InvalidField, match=message):
        tokenizer.accept(ids)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": 1}'])
def test_a_damaged_file_is_a_bundle_error(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json' is not a tokenizer"):
        Tokenizer(TextTower(context_length=6, pad_id=PAD), path)


def test_a_missing_file_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a tokenizer"):
        Tokenizer(TextTower(context_length=6, pad_id=PAD), tmp_path / "tokenizer.json")


def test_a_context_without_room_for_text_is_a_bundle_error(path: Path) -> None:
    with pytest.raises(BundleError, match="adds 2 special tokens"):
        Tokenizer(TextTower(context_length=2, pad_id=PAD), path)
