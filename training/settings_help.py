"""What can be set, as `--list` shows it: every key with its default and a line of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import docstring_parser

from training.config import TrainConfig
from training.method import Recipe
from training.methods import find
from training.settings import DataFacts, resolve
from training.views import Augmentation

__all__ = ["KeyHelp", "help_for", "help_for_class"]

EXAMPLES = (
    DataFacts(images=500, heldout=50, native_size=64, on_gpu=False),
    DataFacts(images=10_000, heldout=1_000, native_size=500, on_gpu=False),
    DataFacts(images=10_000, heldout=1_000, native_size=500, on_gpu=True),
    DataFacts(images=1_000_000, heldout=50_000, native_size=500, on_gpu=True),
    DataFacts(images=1_000_000, heldout=50_000, native_size=32, on_gpu=True),
)
"""Data and machines whose settings say which defaults follow from these, and how far they go."""


@dataclass(frozen=True, slots=True)
class KeyHelp:
    """A setting as help shows it."""

    key: str
    default: str
    """Its value when nothing is set; "5 to 50" where it follows the data or the machine."""
    text: str

    def lines(self, column: int = 36) -> Iterable[str]:
        """The setting for a terminal; the text starts at `column`, on a line of its own if need be."""
        assigned = f"  {self.key} = {self.default}"
        if len(assigned) < column:
            yield f"{assigned:{column}}{self.text}"
        else:
            yield assigned
            yield " " * column + self.text


def help_for(name: str) -> dict[str, list[KeyHelp]]:
    """Everything that can be set for a method, by heading, with the values that a run would take.

    Raises NotFound for an unknown method.
    """
    method = find(name)
    examples = [resolve(name, "", {}, known).values() for known in EXAMPLES]

    def suited(owner: type[Any]) -> list[KeyHelp]:
        return [
            dataclasses.replace(one, default=_spread([values[one.key] for values in examples]))
            for one in help_for_class(owner)
            if one.key not in {"method", "data"}
        ]

    return {
        method.__name__: suited(method.Options),
        "Optimiser and schedules": suited(Recipe),
        "Augmentation": suited(Augmentation),
        "Run": suited(TrainConfig),
    }


def help_for_class(owner: type[Any]) -> list[KeyHelp]:
    """The fields of a settings dataclass with the line that stands under each."""
    texts = {
        one.arg_name: one.description or ""
        for kind in reversed(owner.__mro__[:-1])  # a subclass documents its own fields alone
        for one in docstring_parser.parse_from_object(kind).params
    }
    return [
        KeyHelp(
            one.name,
            "" if one.default is dataclasses.MISSING else _shown(one.default),
            " ".join(texts.get(one.name, "").split()),
        )
        for one in dataclasses.fields(owner)
    ]


def _spread(values: list[Any]) -> str:
    different = list(dict.fromkeys(values))
    if len(different) == 1:
        return _shown(different[0])
    if all(isinstance(one, int | float) and not isinstance(one, bool) for one in different):
        return f"{_shown(min(different))} to {_shown(max(different))}"
    return " or ".join(map(_shown, different))


def _shown(value: Any) -> str:
    return "''" if value == "" else f"{value:.4g}" if isinstance(value, float) else str(value)
