"""What a layout finds in a repository: which files are the towers, and how their makers feed them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embedserve.cleaning import Cleaning
from embedserve.errors import BundleError
from embedserve.hub.pixels import PixelRules

__all__ = ["Foreign", "ForeignImages", "ForeignTexts", "Output"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Which output of a graph is the vector."""

    names: tuple[str, ...]
    """The first of these that the graph has."""
    or_first: bool = False
    """Without any of them, the graph's first output."""
    class_token: bool = False
    """Of an output [batch, tokens, dim], the first token. Without this such an output is refused."""

    def choose(self, there: Sequence[str], label: str) -> str:
        """The name of the output with the vectors. Raises BundleError: it is not `there`."""
        for name in self.names:
            if name in there:
                return name
        if self.or_first:
            return there[0]
        raise BundleError(
            f"'{label}' has the outputs {', '.join(there)}; looked for was {' or '.join(self.names)}. It was "
            "exported for another task."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignImages:
    """The image side of a repository."""

    graph: Path
    label: str
    """The graph's name inside the repository."""
    output: Output
    rules: PixelRules


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignTexts:
    """The text side of a repository."""

    graph: Path
    label: str
    output: Output
    tokenizer: str
    """The text of tokenizer.json."""
    their_tokens: Callable[[str], list[int]]
    """A text as their code tokenizes it: special tokens included, cut to the context, not padded."""
    context_length: int
    pad_id: int
    padding: Literal["longest", "context"]
    """A graph of fixed length is padded to that length, whatever is said here."""
    cleaning: Cleaning = "none"
    """What their code does to a text before its tokenizer."""
    masked: bool = True
    """Their tokenizer masks padding, where the graph takes a mask at all (SigLIP's does not)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """An encoder as a repository has it."""

    images: ForeignImages | None = None
    texts: ForeignTexts | None = None
    activation: Literal["softmax", "sigmoid"] = "softmax"
