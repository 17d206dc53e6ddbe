"""The filter language: one small JSON form, checked once, evaluated in SQL or in Python.

    {"colour": "red"}                           equal; the same as {"colour": {"$eq": "red"}}
    {"year": {"$gte": 1990, "$lt": 2000}}       several operators are and-ed, as are several fields
    {"$or": [{"a": 1}, {"$not": {"b": 2}}]}     $and and $or take a list, $not one filter
    {"size.width": {"$exists": true}}           a dot goes into a nested object

Operators: $eq $ne $gt $gte $lt $lte $in $nin $exists, and $not before any of them.

- Types are strict: `true` is not 1, "1" is not 1; 1 equals 1.0. Strings compare by code point. The order
  operators compare a number with numbers and a string with strings, and match nothing else.
- A field that holds a list matches when any of its elements does (one level deep), each operator by itself.
- A missing field equals null. $ne, $nin and $not are the exact opposite of $eq, $in and what they hold, so
  they match items without the field.
- `\\.` stands for a dot inside a name: `{"file\\.name": "a"}`. List positions are not addressable.

Follows MongoDB's query language where it says something (https://www.mongodb.com/docs/manual/reference/mql/).
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from indexes.base import InvalidFilter
from indexes.conditions import And, Compare, Condition, Exists, Not, OneOf, Or

__all__ = ["MAX_CONDITIONS", "MAX_DEPTH", "MAX_VALUES", "OPERATORS", "parse_filter"]

OPERATORS = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists", "$not")
LOGIC = ("$and", "$or", "$not")

# SQLite's parser has a stack of 100 entries and its expressions a depth of 1000; these stay well inside.
MAX_DEPTH = 12
MAX_CONDITIONS = 200
MAX_VALUES = 10_000
MAX_FIELD_DEPTH = 16


def parse_filter(filter: object) -> Condition:
    """The checked filter, or InvalidFilter with what is wrong, what is allowed and where."""
    parser = _Parser()
    return parser.filter(filter, 1)


@dataclass(slots=True)
class _Parser:
    """Checks limits across the whole filter while it is taken apart."""

    conditions: int = 0
    values: int = 0

    def filter(self, filter: object, depth: int) -> Condition:
        if not isinstance(filter, Mapping):
            raise InvalidFilter(
                f'a filter is a JSON object such as {{"colour": "red"}}, not {_show(filter)}.'
            )
        if depth > MAX_DEPTH:
            raise InvalidFilter(f"the filter is nested deeper than {MAX_DEPTH} levels; flatten it.")
        return _all(tuple(part for key, value in filter.items() for part in self._key(key, value, depth)))

    def _key(self, key: object, value: object, depth: int) -> Iterator[Condition]:
        if not isinstance(key, str):
            raise InvalidFilter(f"a filter's keys are field names, not {_show(key)}.")
        if not key.startswith("$"):
            yield from self._field(_path(key), key, value, depth)
        elif key == "$not":
            yield Not(self.filter(value, depth + 1))
        elif key in LOGIC:
            if not isinstance(value, list | tuple) or not value:
                raise InvalidFilter(f"{key} takes a list of one or more filters, not {_show(value)}.")
            parts = tuple(self.filter(each, depth + 1) for each in value)
            yield And(parts) if key == "$and" else Or(parts)
        elif key in OPERATORS:
            raise InvalidFilter(
                f'{key} stands without a field; write {{"field": {{"{key}": {_show(value)}}}}}.'
            )
        else:
            raise InvalidFilter(f"unknown operator '{key}'; {_closest(key, LOGIC)}")

    def _field(self, path: tuple[str, ...], name: str, value: object, depth: int) -> Iterator[Condition]:
        if not isinstance(value, Mapping):
            yield self._one_of(path, name, "$eq", [value])
            return
        if not value:
            raise InvalidFilter(f"the condition on '{name}' is empty; use an operator such as $eq.")
        if depth > MAX_DEPTH:
            raise InvalidFilter(f"the filter is nested deeper than {MAX_DEPTH} levels; flatten it.")
        for operator, operand in value.items():
            if not isinstance(operator, str) or not operator.startswith("$"):
                raise InvalidFilter(
                    f"'{name}' is compared with an object; for the field inside write '{name}.{operator}'."
                )
            yield self._operator(path, name, operator, operand, depth)

    def _operator(
        self, path: tuple[str, ...], name: str, operator: str, operand: object, depth: int
    ) -> Condition:
        match operator:
            case "$eq":
                return self._one_of(path, name, operator, [operand])
            case "$ne":
                return Not(self._one_of(path, name, operator, [operand]))
            case "$in" | "$nin":
                if not isinstance(operand, list | tuple):
                    raise InvalidFilter(
                        f"{operator} on '{name}' takes a list of values, not {_show(operand)}."
                    )
                found = self._one_of(path, name, operator, operand)
                return found if operator == "$in" else Not(found)
            case "$gt" | "$gte" | "$lt" | "$lte":
                if isinstance(operand, bool) or not isinstance(operand, str | int | float):
                    raise InvalidFilter(
                        f"{operator} on '{name}' takes a number or a string, not {_show(operand)}."
                    )
                self._count()
                return Compare(path, operator, self._value(name, operator, operand))
            case "$exists":
                if not isinstance(operand, bool):
                    raise InvalidFilter(f"$exists on '{name}' takes true or false, not {_show(operand)}.")
                self._count()
                return Exists(path) if operand else Not(Exists(path))
            case "$not":
                if not isinstance(operand, Mapping):
                    raise InvalidFilter(
                        f"$not on '{name}' takes operators such as {{\"$eq\": 1}}, not {_show(operand)}."
                    )
                return Not(_all(tuple(self._field(path, name, operand, depth + 1))))
            case _:
                raise InvalidFilter(
                    f"unknown operator '{operator}' on '{name}'; {_closest(operator, OPERATORS)}"
                )

    def _one_of(self, path: tuple[str, ...], name: str, operator: str, operands: Sequence[Any]) -> OneOf:
        self._count()
        values = [self._value(name, operator, operand) for operand in operands]
        return OneOf(
            path,
            texts=frozenset(each for each in values if isinstance(each, str)),
            numbers=frozenset(
                each for each in values if isinstance(each, int | float) and not isinstance(each, bool)
            ),
            constants=frozenset(each for each in values if each is None or isinstance(each, bool)),
        )

    def _count(self) -> None:
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            raise InvalidFilter(
                f"the filter has more than {MAX_CONDITIONS} conditions; put values of one field into $in."
            )

    def _value(self, name: str, operator: str, value: Any) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise InvalidFilter(f"the filter has more than {MAX_VALUES} values; send several requests.")
        if isinstance(value, str):
            _check_text(value, f"{operator} on '{name}'")
        elif isinstance(value, float) and not math.isfinite(value):
            raise InvalidFilter(f"{operator} on '{name}' compares with {value}; use a finite number.")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise InvalidFilter(f"{operator} on '{name}' compares with {value}; integers have 64 bits.")
        elif value is not None and not isinstance(value, bool | int | float):
            hint = " Use $in for one of several values." if isinstance(value, list | tuple) else ""
            raise InvalidFilter(
                f"{operator} on '{name}' takes a string, number, boolean or null, not {_show(value)}.{hint}"
            )
        return value


def _all(parts: tuple[Condition, ...]) -> Condition:
    return parts[0] if len(parts) == 1 else And(parts)


def _path(name: str) -> tuple[str, ...]:
    _check_text(name, "a field name")
    parts = re.split(r"(?<!\\)\.", name)
    if len(parts) > MAX_FIELD_DEPTH:
        raise InvalidFilter(
            f"field '{name[:40]}…' goes {len(parts)} levels deep; allowed are {MAX_FIELD_DEPTH}. "
            "For a dot inside a name write '\\.'."
        )
    return tuple(part.replace("\\.", ".") for part in parts)


def _check_text(text: str, what: str) -> None:
    if "\x00" in text or re.search("[\ud800-\udfff]", text):
        raise InvalidFilter(
            f"{what} holds a NUL character or a lone surrogate, which no item can hold; remove it."
        )


def _show(value: object) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:60] + "…"


def _closest(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean '{near[0]}'? " if near else "") + f"known: {', '.join(known)}."
