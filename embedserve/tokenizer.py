"""Text to token ids: a bundle's `tokenizer.json`, cut and padded as its text tower was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray

from embedserve.bundle import TextTower
from embedserve.cleaning import clean
from embedserve.errors import BundleError, InvalidField

__all__ = ["Tokenizer"]


class Tokenizer:
    """Token ids for one text tower. Safe to use from several threads at once: nothing changes after loading.

    Args:
        tower: Context length, pad id and padding rule.
        path: `tokenizer.json`, in the Hugging Face `tokenizers` format.

    Raises:
        BundleError: The file cannot be read, or does not fit the tower.
    """

    def __init__(self, tower: TextTower, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 -- the Rust binding raises bare Exception for every failure
            raise BundleError(
                f"'{path}' is not a tokenizer in the Hugging Face tokenizers format ({error}). "
                "Copy or export the bundle again."
            ) from None
        specials = self._tokenizer.num_special_tokens_to_add(is_pair=False)
        if specials >= tower.context_length:
            raise BundleError(
                f"'{path}' adds {specials} special tokens, which leaves no room for text in a context_length "
                f"of {tower.context_length}. Correct context_length and export the bundle again."
            )
        # The file may carry cutting and padding rules of its own (MiniLM's says 128 and pads); the bundle's
        # description decides. Cutting happens before the special tokens are added, so they always survive.
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(tower.context_length)
        self.vocabulary = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """Number of ids; they run from 0 to `vocabulary` − 1."""
        self.context = tower.context_length
        self._tower = tower

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, special tokens included, cut to the context length, not padded.

        Any string is accepted: NUL and control characters are the tokenizer's to judge, surrogate pairs
        are joined and lone surrogates (not encodable as UTF-8) become U+FFFD.
        """
        # Of the library's verbs only this one gives Python's lock back: 100 kB take 35 ms.
        cleaned = [clean(_valid(text), self._tower.cleaning) for text in texts]
        return [found.ids for found in self._tokenizer.encode_batch_fast(cleaned)]

    def accept(self, ids: Sequence[int]) -> list[int]:
        """Checks token ids that a caller brings along, special tokens included.

        Raises:
            InvalidField: No ids, more than the context length, or one outside the vocabulary.
        """
        if not ids:
            raise InvalidField("The token array is empty; send at least one token id, or a text.")
        if len(ids) > self.context:
            raise InvalidField(
                f"The token array has {len(ids)} ids; this encoder takes at most {self.context}. "
                "Cut it, or send the text itself."
            )
        for index, token in enumerate(ids):
            if not 0 <= token < self.vocabulary:
                raise InvalidField(
                    f"Token id {token} at position {index} is not in this encoder's vocabulary "
                    f"(0 to {self.vocabulary - 1}). Was it made with another tokenizer? Send the text itself."
                )
        return list(ids)

    def padded_length(self, tokens: int) -> int:
        """Columns that a text of so many tokens takes in a batch of its own; at least 1."""
        return self.context if self._tower.padding == "context" else max(tokens, 1)

    def pad(self, batch: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        """A batch of ids as int64 [batch, length], filled up at the end with the pad id.

        `length` is the context length, or for `padding="longest"` that of the longest text, at least 1.
        It is not rounded up to a few values: that saves no memory (`benchmarks/memory.py`) and costs time.
        """
        length = self.padded_length(max(map(len, batch), default=0))
        padded = np.full((len(batch), length), self._tower.pad_id, np.int64)
        for row, ids in zip(padded, batch, strict=True):
            row[: len(ids)] = ids
        return padded


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
