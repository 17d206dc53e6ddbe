"""The filter language: what it means, in Python and in SQLite alike, and what it refuses."""

from __future__ import annotations

import json
import sqlite3
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from indexes.base import InvalidFilter, InvalidMetadata, check_metadata
from indexes.conditions import Sql
from indexes.filters import MAX_CONDITIONS, MAX_DEPTH, MAX_VALUES, parse_filter

ITEMS: list[dict[str, Any]] = [
    {},
    {"a": None},
    {"a": True},
    {"a": False},
    {"a": 0},
    {"a": 1},
    {"a": 1.0},
    {"a": 1.5},
    {"a": "1"},
    {"a": "true"},
    {"a": ""},
    {"a": "b"},
    {"a": []},
    {"a": [1, 2]},
    {"a": ["b", None]},
    {"a": [[1]]},
    {"a": {}},
    {"a": {"b": 1}},
    {"a": {"b": [1, "x"]}},
    {"a": [{"b": 1}]},
    {"a.b": 1},
]


@pytest.fixture(scope="module")
def connection() -> sqlite3.Connection:
    return sqlite3.connect(":memory:")


def in_sql(connection: sqlite3.Connection, filter: object, items: list[dict[str, Any]]) -> list[bool]:
    sql = Sql()
    expression = parse_filter(filter).sql(sql, "metadata")
    connection.execute("CREATE TEMP TABLE t (i INTEGER, metadata TEXT)")
    try:
        texts = check_metadata(items, len(items))
        connection.executemany("INSERT INTO t VALUES (?, ?)", enumerate(texts))
        found = connection.execute(f"SELECT {expression} FROM t ORDER BY i", sql.parameters).fetchall()
    finally:
        connection.execute("DROP TABLE t")
    assert {value for (value,) in found} <= {0, 1}, "a filter is never NULL, or $not would lose rows"
    return [bool(value) for (value,) in found]


def in_python(filter: object, items: list[dict[str, Any]]) -> list[bool]:
    condition = parse_filter(filter)
    return [condition.matches(json.loads(text)) for text in check_metadata(items, len(items))]


@pytest.mark.parametrize(
    ("filter", "matching"),
    [
        ({}, ITEMS),
        ({"a": 1}, [{"a": 1}, {"a": 1.0}, {"a": [1, 2]}]),
        ({"a": True}, [{"a": True}]),
        ({"a": "1"}, [{"a": "1"}]),
        ({"a": "true"}, [{"a": "true"}]),
        ({"a": ""}, [{"a": ""}]),
        ({"a": None}, [{}, {"a": None}, {"a": ["b", None]}, {"a.b": 1}]),
        (
            {"a": {"$ne": None}},
            [i for i in ITEMS if i not in ({}, {"a": None}, {"a": ["b", None]}, {"a.b": 1})],
        ),
        (
            {"a": {"$ne": 1}},
            [i for i in ITEMS if "a" not in i or i["a"] not in (1, [1, 2]) or i["a"] is True],
        ),
        ({"a": {"$in": [True, "b", 1.5]}}, [{"a": True}, {"a": 1.5}, {"a": "b"}, {"a": ["b", None]}]),
        ({"a": {"$in": []}}, []),
        ({"a": {"$nin": []}}, ITEMS),
        ({"a": {"$gt": 0}}, [{"a": 1}, {"a": 1.0}, {"a": 1.5}, {"a": [1, 2]}]),
        ({"a": {"$gte": 1.5}}, [{"a": 1.5}, {"a": [1, 2]}]),
        ({"a": {"$gt": 1, "$lt": 2}}, [{"a": 1.5}, {"a": [1, 2]}]),
        ({"a": {"$lt": "b"}}, [{"a": "1"}, {"a": ""}]),
        ({"a": {"$gte": "b"}}, [{"a": "true"}, {"a": "b"}, {"a": ["b", None]}]),
        ({"a": {"$exists": False}}, [{}, {"a.b": 1}]),
        ({"a": {"$exists": True}}, [i for i in ITEMS if "a" in i]),
        ({"a.b": 1}, [{"a": {"b": 1}}, {"a": {"b": [1, "x"]}}]),
        ({"a\\.b": 1}, [{"a.b": 1}]),
        ({"a": {"$not": {"$exists": True}}}, [{}, {"a.b": 1}]),
        ({"$not": {"a": {"$exists": True}}}, [{}, {"a.b": 1}]),
        ({"$or": [{"a": 1.5}, {"a": "b"}]}, [{"a": 1.5}, {"a": "b"}, {"a": ["b", None]}]),
        ({"$and": [{"a": {"$gte": 1}}, {"a": {"$lte": 1}}]}, [{"a": 1}, {"a": 1.0}, {"a": [1, 2]}]),
        ({"a": 1, "$not": {"a": 2}}, [{"a": 1}, {"a": 1.0}]),
    ],
)
def test_a_filter_means_what_its_documentation_says(
    connection: sqlite3.Connection, filter: dict[str, Any], matching: list[dict[str, Any]]
) -> None:
    wanted = [json.dumps(item) in {json.dumps(each) for each in matching} for item in ITEMS]
    assert in_python(filter, ITEMS) == wanted
    assert in_sql(connection, filter, ITEMS) == wanted


def test_strings_compare_by_code_point(connection: sqlite3.Connection) -> None:
    items = [{"a": text} for text in ("Z", "a", "z", "ä", "\uffff", "😀")]
    for text in ("Z", "ä", "\uffff"):
        above = {"a": {"$gt": text}}
        assert in_sql(connection, above, items) == in_python(above, items)
        assert in_python(above, items) == [str(item["a"]) > text for item in items]


def test_large_integers_and_their_neighbouring_floats_stay_distinct(connection: sqlite3.Connection) -> None:
    items: list[dict[str, Any]] = [{"a": 2**53 + 1}, {"a": float(2**53)}, {"a": 2**63 - 1}, {"a": -(2**63)}]
    for operator in ("$eq", "$gt", "$lte"):
        for value in (2**53, 2**53 + 1, float(2**53), 2**63 - 1, 9.3e18, -(2**63)):
            wanted = {"a": {operator: value}}
            assert in_sql(connection, wanted, items) == in_python(wanted, items)


NAMES = st.sampled_from(
    ["a", "b", "ü😀", 'qu"ote', "back\\slash", "new\nline", "", "'", "$x"[1:], "[0]", "0", "a b"]
)
NUMBERS = (
    st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
)
TEXTS = st.sampled_from(["", "a", "b", "1", "true", "null", "ü", "😀", 'a"b', "it's", "{", "[1]"]) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5
)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=5,
)
METADATA = st.dictionaries(NAMES, VALUES, max_size=5)
FIELDS = st.lists(NAMES, min_size=1, max_size=2).map(".".join)


def operators(depth: int) -> st.SearchStrategy[dict[str, Any]]:
    ordered = st.sampled_from(["$gt", "$gte", "$lt", "$lte"])
    one: st.SearchStrategy[tuple[str, Any]] = (
        st.tuples(st.sampled_from(["$eq", "$ne"]), SCALARS)
        | st.tuples(ordered, NUMBERS | TEXTS)
        | st.tuples(st.sampled_from(["$in", "$nin"]), st.lists(SCALARS, max_size=4))
        | st.tuples(st.just("$exists"), st.booleans())
    )
    if depth:
        one |= st.tuples(st.just("$not"), operators(depth - 1))
    return st.lists(one, min_size=1, max_size=2).map(dict)


FILTERS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.dictionaries(FIELDS, SCALARS | operators(1), max_size=2),
    lambda inner: (
        st.dictionaries(st.sampled_from(["$and", "$or"]), st.lists(inner, min_size=1, max_size=3), min_size=1)
        | inner.map(lambda each: {"$not": each})
    ),
    max_leaves=4,
)
BOUNDED = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@BOUNDED
@given(filter=FILTERS, items=st.lists(METADATA, min_size=1, max_size=6))
@example(filter={'qu"ote': None}, items=[{}, {'qu"ote': None}, {'qu"ote': 1}, {'qu"ote': [None]}])
@example(
    filter={'a.qu"ote': {"$in": ["x", 1]}}, items=[{"a": {'qu"ote': ["x"]}}, {"a": ["x"]}, {"a": "x"}, {}]
)
def test_sqlite_and_python_agree(
    connection: sqlite3.Connection, filter: dict[str, Any], items: list[dict[str, Any]]
) -> None:
    assert in_sql(connection, filter, items) == in_python(filter, items)


@BOUNDED
@given(metadata=METADATA, field=FIELDS)
def test_each_value_is_found_by_its_own_field(
    connection: sqlite3.Connection, metadata: dict[str, Any], field: str
) -> None:
    """Random filters seldom match; these always should."""
    for name, value in metadata.items():
        if isinstance(value, str | int | float) or value is None:
            wanted = {name.replace(".", "\\."): value}
            assert in_sql(connection, wanted, [metadata]) == [True] == in_python(wanted, [metadata])


@BOUNDED
@given(filter=FILTERS)
def test_equal_filters_are_one_key(filter: dict[str, Any]) -> None:
    assert parse_filter(filter) == parse_filter(json.loads(json.dumps(filter)))
    assert hash(parse_filter(filter)) == hash(parse_filter(json.loads(json.dumps(filter))))


def test_true_and_one_are_different_filters() -> None:
    assert parse_filter({"a": True}) != parse_filter({"a": 1})


@pytest.mark.parametrize(
    "field", ["x' OR '1'='1", 'x") OR 1=1 --', "x'); DROP TABLE t; --", ":p0", "?", "a[0]"]
)
def test_a_field_name_is_never_sql(connection: sqlite3.Connection, field: str) -> None:
    assert in_sql(connection, {field: "y"}, [{}, {"x": "y"}, {"a": ["y"]}]) == [False, False, False]
    assert in_sql(connection, {field: field}, [{field: field}, {}]) == [True, False]


def test_the_largest_allowed_filter_runs(connection: sqlite3.Connection) -> None:
    deep: dict[str, Any] = {'hard"name.a.b': {"$nin": [None, "x", 1]}}
    for level in range(MAX_DEPTH - 1):
        deep = {"$not": deep} if level % 2 else {"$or": [{"z": 1}, deep]}
    assert in_sql(connection, deep, ITEMS) == in_python(deep, ITEMS)
    wide = {"$or": [{"a": {"$gte": n}} for n in range(MAX_CONDITIONS)]}
    assert in_sql(connection, wide, ITEMS) == in_python(wide, ITEMS)
    many = {"a": {"$in": [*range(MAX_VALUES - 1), "b"]}}
    assert in_sql(connection, many, ITEMS) == in_python(many, ITEMS)
    operators: dict[str, Any] = {"$exists": True}
    for _ in range(MAX_DEPTH - 1):
        operators = {"$not": operators}
    assert in_sql(connection, {"a": operators}, ITEMS) == in_python({"a": operators}, ITEMS)


def _nested(levels: int) -> dict[str, Any]:
    return {"$not": _nested(levels - 1)} if levels else {"a": 1}


@pytest.mark.parametrize(
    ("filter", "message"),
    [
        ([], "a filter is a JSON object"),
        ("a", "a filter is a JSON object"),
        (None, "a filter is a JSON object"),
        ({"$gte": 5}, "stands without a field"),
        ({"$adn": []}, r"unknown operator '\$adn'; did you mean '\$and'\?"),
        ({"a": {"$gte ": 5}}, r"unknown operator '\$gte ' on 'a'; did you mean '\$gte'\?"),
        ({"a": {"$regex": "x"}}, r"unknown operator '\$regex' on 'a'; .*known: \$eq, \$ne"),
        ({"a": {"b": 1}}, r"write 'a\.b'"),
        ({"a": {}}, "empty"),
        ({"a": [1]}, r"Use \$in"),
        ({"a": {"$eq": {"b": 1}}}, "takes a string, number, boolean or null"),
        ({"a": {"$in": 1}}, "takes a list"),
        ({"a": {"$in": "text"}}, "takes a list"),
        ({"a": {"$in": [[1]]}}, "takes a string"),
        ({"a": {"$gt": True}}, "takes a number or a string, not true"),
        ({"a": {"$gt": None}}, "not null"),
        ({"a": {"$exists": 1}}, "takes true or false, not 1"),
        ({"a": {"$not": 1}}, "takes operators"),
        ({"$and": []}, "one or more filters"),
        ({"$or": {"a": 1}}, "takes a list of one or more"),
        ({"$or": [1]}, "a filter is a JSON object"),
        ({"$not": [{"a": 1}]}, "a filter is a JSON object"),
        ({"a": float("nan")}, "finite"),
        ({"a": {"$lt": float("inf")}}, "finite"),
        ({"a": 2**63}, "64 bits"),
        ({"a": "\0"}, "NUL"),
        ({"a\0": 1}, "NUL"),
        ({"\ud800": 1}, "lone surrogate"),
        ({"a": {1, 2}}, "a set"),
        ({1: 2}, "field names"),
        ({"a": {1: 2}}, "compared with an object"),
        (_nested(MAX_DEPTH), "nested deeper"),
        ({".".join("a" * 17): 1}, "17 levels deep"),
        ({"$or": [{"a": 1}] * (MAX_CONDITIONS + 1)}, "more than 200 conditions"),
        ({"a": {"$in": list(range(MAX_VALUES + 1))}}, "more than 10000 values"),
    ],
)
def test_a_wrong_filter_is_refused_with_its_fix(filter: object, message: str) -> None:
    with pytest.raises(InvalidFilter, match=message):
        parse_filter(filter)


def test_what_no_filter_could_find_is_no_metadata() -> None:
    with pytest.raises(InvalidMetadata, match="field 'a' holds a NUL"):
        check_metadata([{"a": "x\0y"}], 1)
