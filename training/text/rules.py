"""How a text tower's texts become ids: what serving does, from the same tokenizer.json."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from embedserve.bundle import TextTower as Described
from embedserve.cleaning import Cleaning
from embedserve.errors import InvalidField
from embedserve.tokenizer import Tokenizer

__all__ = ["TextRules"]

STEP = 8
"""Batches are padded to a multiple of so many tokens: fewer shapes for a GPU to choose kernels for."""


@dataclass(frozen=True, kw_only=True)
class TextRules:
    """A tokenizer, and how its ids are cut and padded. Plain values: a checkpoint carries them."""

    name: str
    """Of the text tower, for messages."""
    tokenizer: str
    """The text of tokenizer.json."""
    context_length: int
    """The most tokens, special ones included."""
    pad_id: int
    vocabulary: int
    """Ids that the text tower has an embedding for: 0 to this − 1."""
    padding: Literal["longest", "context"] = "longest"
    cleaning: Cleaning = "none"

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> TextRules:
        return cls(**saved)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, cut, with special tokens, not padded."""
        return self._tokenizer.encode(texts)

    def padded(self, longest: int) -> int:
        """Columns of a batch whose longest text has so many tokens."""
        if self.padding == "context":
            return self.context_length
        return min(-(-max(longest, 1) // STEP) * STEP, self.context_length)

    def check(self, largest: int) -> None:
        """Raises InvalidField when the tokenizer gave an id that the tower has no embedding for."""
        if largest >= self.vocabulary:
            raise InvalidField(
                f"The tokenizer of '{self.name}' gives the id {largest:,}, but the tower knows "
                f"{self.vocabulary:,} tokens: they do not belong together. Give the tokenizer that it was "
                "trained with.",
                param="text",
            )

    @cached_property
    def unknown_id(self) -> int:
        """The id of what the vocabulary does not have; -1 where everything can be spelled out."""
        model = json.loads(self.tokenizer)["model"]
        name, vocabulary = model.get("unk_token"), model.get("vocab", {})
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        return int(vocabulary[name]) if isinstance(vocabulary, dict) and name in vocabulary else -1

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tower = Described(
            context_length=self.context_length,
            pad_id=self.pad_id,
            padding=self.padding,
            cleaning=self.cleaning,
        )
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            file.write(self.tokenizer)
            file.flush()
            return Tokenizer(tower, Path(file.name))
