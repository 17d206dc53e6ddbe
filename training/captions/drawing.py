"""Captions as token ids, and which of an image's captions a step sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.text.rules import TextRules

__all__ = ["Captions"]

Rows = NDArray[np.int64]

TAG = 4
"""Keeps these draws apart from those of training/data under the same seed."""
AT_ONCE = 8192
"""Captions that are tokenized together."""
MUCH_UNKNOWN = 0.05
"""Share of unknown tokens above which a person is told."""


class Captions:
    """The captions of N images as token ids, made once.

    A caption of an image is drawn anew at each step, from (seed, step) alone.

    Args:
        captions: One or more for each image.
        rules: How the text tower's texts become ids.
        seed: The run's.

    Attributes:
        texts: The different captions, in the order of their ids.
        cut: How many of these fill the context, and are cut where they are longer.
        unknown: Share of their tokens that the vocabulary does not have.

    Raises:
        InvalidField: The tokenizer gives ids that the text tower has no embedding for.
    """

    def __init__(self, captions: Sequence[tuple[str, ...]], rules: TextRules, seed: int) -> None:
        number: dict[str, int] = {}
        for text in itertools.chain.from_iterable(captions):
            number.setdefault(text, len(number))
        self.texts = tuple(number)
        self.seed, self.rules = seed, rules
        self.ids = np.fromiter((number[text] for text in itertools.chain.from_iterable(captions)), np.int64)
        """The id of every caption, image after image."""
        self._count = np.fromiter(map(len, captions), np.int64, len(captions))
        self._start = np.cumsum(self._count) - self._count
        lengths, tokens = [], []
        for at in range(0, len(self.texts), AT_ONCE):
            encoded = rules.encode(self.texts[at : at + AT_ONCE])
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            tokens.append(np.fromiter(itertools.chain.from_iterable(encoded), np.int32))
        self._length, self._tokens = np.concatenate(lengths), np.concatenate(tokens)
        self._begin = np.cumsum(self._length) - self._length
        rules.check(int(self._tokens.max(initial=0)))
        self.cut = int((self._length >= rules.context_length).sum()) if rules.context_length else 0
        known = len(self._tokens) or 1
        self.unknown = (
            float((self._tokens == rules.unknown_id).sum() / known) if rules.unknown_id >= 0 else 0.0
        )

    def __len__(self) -> int:
        """Images."""
        return len(self._count)

    def drawn(self, rows: Rows, step: int) -> Rows:
        """The id of a caption for each of these images, int64 [B], drawn uniformly among an image's own.

        Args:
            rows: int64 [B]: the joined batch of all ranks, so that several ranks see what one would.
        """
        words = np.random.Philox(np.random.SeedSequence((TAG, self.seed, step))).random_raw(len(rows))
        place = (words % self._count[rows].astype(np.uint64)).astype(np.int64)
        drawn: Rows = self.ids[self._start[rows] + place]
        return drawn

    def first(self, rows: Rows) -> Rows:
        """The id of each image's first caption, int64 [B]."""
        found: Rows = self.ids[self._start[rows]]
        return found

    def all_of(self, row: int) -> Rows:
        """The ids of all captions of an image."""
        found: Rows = self.ids[self._start[row] : self._start[row] + self._count[row]]
        return found

    def tokens(self, ids: Rows) -> Rows:
        """Token ids of captions, int64 [B, length], filled up with the pad id as the text tower wants it."""
        length = self._length[ids]
        padded = np.full(
            (len(ids), self.rules.padded(int(length.max(initial=1)))), self.rules.pad_id, np.int64
        )
        place = np.arange(padded.shape[1])
        real = place < length[:, None]
        padded[real] = self._tokens[(self._begin[ids][:, None] + place)[real]]
        return padded

    def remarks(self) -> list[str]:
        """Sentences that people may want to read before they train on this."""
        said = []
        if self.cut:
            said.append(
                f"{self.cut:,} of {len(self.texts):,} captions fill the text tower's "
                f"{self.rules.context_length} tokens; what is longer is cut."
            )
        if self.unknown > MUCH_UNKNOWN:
            said.append(
                f"{self.unknown:.0%} of the captions' tokens are not in the text tower's vocabulary; it may "
                "not know their language or script. Choose a text tower that does (text=hf:FOLDER)."
            )
        shared = len(self.ids) - len(self.texts)
        if shared:
            said.append(
                f"{shared:,} of {len(self.ids):,} captions have the words of another image's; "
                "such pairs count as right."
            )
        return said
