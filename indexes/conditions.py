"""What a parsed filter is: conditions that are evaluated in SQLite, or in Python on one item's metadata.

Both ways give the same answer (`tests/indexes/test_filters.py` compares them). In SQL, values and field names
are parameters, never part of the text. Metadata is JSON text written by `indexes.base.check_metadata`.
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from indexes.base import Metadata

__all__ = ["And", "Compare", "Condition", "Exists", "Not", "OneOf", "Or", "Sql"]

_SIGNS = {"$gt": ">", "$gte": ">=", "$lt": "<", "$lte": "<="}
_ORDER = {"$gt": operator.gt, "$gte": operator.ge, "$lt": operator.lt, "$lte": operator.le}


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
    """A parsed filter: a pure function of an item's metadata. Hashable; equal ones match the same."""

    def __hash__(self) -> int: ...

    def matches(self, metadata: Metadata) -> bool:
        """Whether an item with this metadata passes."""
        ...

    def sql(self, into: Sql, column: str) -> str:
        """A boolean SQLite expression, never NULL, over `column`, which holds a valid JSON object."""
        ...


@dataclass(frozen=True, slots=True)
class And:
    parts: tuple[Condition, ...]

    def matches(self, metadata: Metadata) -> bool:
        return all(part.matches(metadata) for part in self.parts)

    def sql(self, into: Sql, column: str) -> str:
        return "(" + " AND ".join(part.sql(into, column) for part in self.parts) + ")" if self.parts else "1"


@dataclass(frozen=True, slots=True)
class Or:
    parts: tuple[Condition, ...]

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
    """The field, or an element of its list, is one of these values; null also stands for a missing field."""

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
        operand: Any = self.operand
        return bool(_ORDER[self.operator](value, operand))

    def sql(self, into: Sql, column: str) -> str:
        test = f"{{value}} {_SIGNS[self.operator]} {into.bind(self.operand)}"
        kinds = ("text",) if isinstance(self.operand, str) else ("integer", "real")
        return _field_sql(into, column, self.path, dict.fromkeys(kinds, test), missing=False)


# -------------------------------------------------------------------------------- SQL and lookup


def _lookup(metadata: object, path: tuple[str, ...]) -> tuple[Any, ...]:
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
        # A CASE over every type, for its ELSE to mean that the field is missing.
        scalar = {"text": "0", "integer": "0", "real": "0", "object": "0"} | dict(tests) | {"array": listed}
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
