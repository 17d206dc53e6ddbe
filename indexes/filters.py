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
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from indexes.base import InvalidFilter, Metadata

__all__ = ["MAX_CONDITIONS", "MAX_DEPTH", "MAX_VALUES", "OPERATORS", "Condition", "Sql", "parse_filter"]

OPERATORS = ("$eq", "$ne", "$gt", "$gte", "$lt", "$lte", "$in", "$nin", "$exists", "$not")
LOGIC = ("$and", "$or", "$not")

# SQLite's parser has a stack of 100 entries and its expressions a depth of 1000; these stay well inside.
MAX_DEPTH = 12
MAX_CONDITIONS = 200
MAX_VALUES = 10_000
MAX_FIELD_DEPTH = 16


class Sql:
    """Collects the parameters of one SQL expression. Values never become part of the text."""

    def __init__(self) -> None:
        self.parameters: dict[str, object] = {}
        self._aliases = count()

    def bind(self, value: object) -> str:
        name = f"p{len(self.parameters)}"
        self.parameters[name] = value
        return f":{name}"

    def alias(self) -> str:
        return f"j{next(self._aliases)}"


class Condition(Protocol):
    """A parsed filter: a pure function of an item's metadata."""

    def matches(self, metadata: Metadata) -> bool:
        """Whether an item with this metadata passes."""
        ...

    def sql(self, into: Sql, column: str) -> str:
        """A boolean SQLite expression, never NULL, over `column`, which holds a valid JSON object."""
        ...


def parse_filter(filter: object) -> Condition:
    """The checked filter, or InvalidFilter with what is wrong, what is allowed and where."""
    parser = _Parser()
    return parser.filter(filter, 1)


# ---------------------------------------------------------------------------------------- conditions


@dataclass(frozen=True, slots=True)
class And:
    parts: Sequence[Condition]

    def matches(self, metadata: Metadata) -> bool:
        return all(part.matches(metadata) for part in self.parts)

    def sql(self, into: Sql, column: str) -> str:
        return "(" + " AND ".join(part.sql(into, column) for part in self.parts) + ")" if self.parts else "1"


@dataclass(frozen=True, slots=True)
class Or:
    parts: Sequence[Condition]

    def matches(self, metadata: Metadata) -> bool:
        return any(part.matches(metadata) for part in self.parts)

    def sql(self, into: Sql, column: str) -> str:
        return "(" + " OR ".join(part.sql(into, column) for part in self.parts) + ")"


@dataclass(frozen=True, slots=True)
class Not:
    part: Condition

    def matches(self, metadata: Metadata) -> bool:
        return not self.part.matches(metadata)

    def sql(self, into: Sql, column: str) -> str:
        return f"(NOT {self.part.sql(into, column)})"


@dataclass(frozen=True, slots=True)
class Exists:
    path: tuple[str, ...]

    def matches(self, metadata: Metadata) -> bool:
        return bool(_lookup(metadata, self.path))

    def sql(self, into: Sql, column: str) -> str:
        if (path := _json_path(self.path)) is not None:
            return f"json_type({column}, {into.bind(path)}) IS NOT NULL"
        walk = _Walk(into, column, self.path)
        return f"EXISTS (SELECT 1 FROM {walk.tables} WHERE {walk.where})"


@dataclass(frozen=True, slots=True)
class OneOf:
    """The field, or an element of its list, is one of these values; `null` also stands for a missing field."""

    path: tuple[str, ...]
    texts: frozenset[str] = frozenset()
    numbers: frozenset[float] = frozenset()
    constants: frozenset[bool | None] = frozenset()

    def matches(self, metadata: Metadata) -> bool:
        found = _lookup(metadata, self.path)
        return any(map(self._is, _candidates(found[0]))) if found else None in self.constants

    def _is(self, value: object) -> bool:
        if value is None or isinstance(value, bool):
            return value in self.constants
        if isinstance(value, str):
            return value in self.texts
        return isinstance(value, int | float) and value in self.numbers

    def sql(self, into: Sql, column: str) -> str:
        tests = {
            "true": _boolean(True in self.constants),
            "false": _boolean(False in self.constants),
            "null": _boolean(None in self.constants),
        }
        if self.texts:
            tests["text"] = _membership(into, sorted(self.texts))
        if self.numbers:
            tests["integer"] = tests["real"] = _membership(into, sorted(self.numbers))
        return _field_sql(into, column, self.path, tests, missing=None in self.constants)


@dataclass(frozen=True, slots=True)
class Compare:
    """The field, or an element of its list, is of the operand's type and stands in this order to it."""

    path: tuple[str, ...]
    operator: str
    operand: str | float

    def matches(self, metadata: Metadata) -> bool:
        found = _lookup(metadata, self.path)
        return bool(found) and any(map(self._holds, _candidates(found[0])))

    def _holds(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return False
        if isinstance(value, str) != isinstance(self.operand, str):
            return False
        match self.operator:
            case "$gt":
                return bool(value > self.operand)
            case "$gte":
                return bool(value >= self.operand)
            case "$lt":
                return bool(value < self.operand)
            case _:
                return bool(value <= self.operand)

    def sql(self, into: Sql, column: str) -> str:
        sign = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}[self.operator]
        test = f"{{value}} {sign} {into.bind(self.operand)}"
        kinds = ("text",) if isinstance(self.operand, str) else ("integer", "real")
        return _field_sql(into, column, self.path, dict.fromkeys(kinds, test), missing=False)


# --------------------------------------------------------------------------------------- evaluation


def _lookup(metadata: object, path: tuple[str, ...]) -> tuple[Any] | tuple[()]:
    """The value at `path` in a tuple, or an empty tuple: null and missing are different things."""
    value = metadata
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return ()
        value = value[name]
    return (value,)


def _candidates(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _boolean(value: bool) -> str:
    return "1" if value else "0"


def _membership(into: Sql, values: Sequence[str | float]) -> str:
    if len(values) == 1:
        return f"{{value}} = {into.bind(values[0])}"
    text = json.dumps(values, ensure_ascii=False)
    return f"{{value}} IN (SELECT value FROM json_each({into.bind(text)}))"


def _cases(type_of: str, value: str, tests: Mapping[str, str], otherwise: str = "0") -> str:
    arms = " ".join(f"WHEN '{kind}' THEN {test.replace('{value}', value)}" for kind, test in tests.items())
    return f"CASE {type_of} {arms} ELSE {otherwise} END"


def _field_sql(
    into: Sql, column: str, path: tuple[str, ...], tests: Mapping[str, str], *, missing: bool
) -> str:
    """`tests` maps JSON types to SQL over `{value}`; they are tried on the field or its list's elements."""
    element = into.alias()
    of_element = _cases(f"{element}.type", f"{element}.atom", tests)
    if (text := _json_path(path)) is not None:
        bound = into.bind(text)
        listed = f"EXISTS (SELECT 1 FROM json_each({column}, {bound}) AS {element} WHERE {of_element})"
        scalar = dict(tests) | {"array": listed, "object": "0"}
        return _cases(
            f"json_type({column}, {bound})", f"json_extract({column}, {bound})", scalar, _boolean(missing)
        )
    # A name that SQLite's paths cannot express: walk the keys.
    walk = _Walk(into, column, path)
    source = f"CASE {walk.last}.type WHEN 'array' THEN {walk.last}.value ELSE '[]' END"
    listed = f"EXISTS (SELECT 1 FROM json_each({source}) AS {element} WHERE {of_element})"
    test = _cases(f"{walk.last}.type", f"{walk.last}.atom", dict(tests) | {"array": listed})
    found = f"EXISTS (SELECT 1 FROM {walk.tables} WHERE {walk.where} AND {test})"
    return f"({found} OR NOT {Exists(path).sql(into, column)})" if missing else found


def _json_path(path: tuple[str, ...]) -> str | None:
    """SQLite's JSON path, or None where a name needs escaping, on which SQLite's versions disagree."""
    if any(not name or re.search(r'["\\\x00-\x1f]', name) for name in path):
        return None
    return "$" + "".join(f'."{name}"' for name in path)


class _Walk:
    """A join of `json_each` calls that goes down `path` by comparing unescaped keys."""

    def __init__(self, into: Sql, column: str, path: tuple[str, ...]) -> None:
        tables, where, source = [], [], column
        for name in path:
            self.last = into.alias()
            tables.append(f"json_each({source}) AS {self.last}")
            where.append(f"{self.last}.key = {into.bind(name)}")
            source = f"CASE {self.last}.type WHEN 'object' THEN {self.last}.value ELSE '{{}}' END"
        self.tables, self.where = ", ".join(tables), " AND ".join(where)


# ------------------------------------------------------------------------------------------ parsing


@dataclass(slots=True)
class _Parser:
    """Checks limits across the whole filter while it is taken apart."""

    conditions: int = 0
    values: int = 0
    constants: tuple[type, ...] = field(default=(bool, type(None)))

    def filter(self, filter: object, depth: int) -> Condition:
        if not isinstance(filter, Mapping):
            raise InvalidFilter(
                f"a filter is a JSON object such as {{\"colour\": \"red\"}}, not {_show(filter)}."
            )
        if depth > MAX_DEPTH:
            raise InvalidFilter(f"the filter is nested deeper than {MAX_DEPTH} levels; flatten it.")
        return _all([part for key, value in filter.items() for part in self._key(key, value, depth)])

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
            parts = [self.filter(each, depth + 1) for each in value]
            yield And(parts) if key == "$and" else Or(parts)
        elif key in OPERATORS:
            raise InvalidFilter(
                f"{key} stands without a field; write {{\"field\": {{\"{key}\": {_show(value)}}}}}."
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
                    f"'{name}' is compared with an object; name the nested field with a dot: '{name}.{operator}'."
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
                    raise InvalidFilter(f"{operator} on '{name}' takes a list of values, not {_show(operand)}.")
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
                return Not(_all(list(self._field(path, name, operand, depth + 1))))
            case _:
                raise InvalidFilter(f"unknown operator '{operator}' on '{name}'; {_closest(operator, OPERATORS)}")

    def _one_of(self, path: tuple[str, ...], name: str, operator: str, operands: Sequence[object]) -> OneOf:
        self._count()
        values = [self._value(name, operator, operand) for operand in operands]
        return OneOf(
            path,
            texts=frozenset(each for each in values if isinstance(each, str)),
            numbers=frozenset(
                each for each in values if isinstance(each, int | float) and not isinstance(each, bool)
            ),
            constants=frozenset(each for each in values if isinstance(each, self.constants)),
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


def _all(parts: Sequence[Condition]) -> Condition:
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
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}."
