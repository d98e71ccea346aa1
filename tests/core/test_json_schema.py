"""Schemas as grammars: what the grammar lets through is valid, and what cannot be kept is refused by name."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_orch.core.gbnf import GrammarError, check_grammar
from llama_orch.core.json_schema import json_schema_to_gbnf
from llama_orch.core.patterns import pattern_to_gbnf
from tests.core.gbnf_regex import as_regex, matches
from tests.hostile import SCHEMAS

pytestmark = pytest.mark.spec("HP-ADM-4", "HP-ADM-7")


def lets_through(schema: dict[str, Any], text: str) -> bool:
    grammar = json_schema_to_gbnf(schema)
    check_grammar(grammar)
    return matches(grammar, text)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_hostile_one_is_refused(name: str) -> None:
    """By the conversion or by the look at what came of it; one is left for a trial."""
    if name == "a pattern that is hard to follow":
        check_grammar(json_schema_to_gbnf(SCHEMAS[name]))
        return
    with pytest.raises(GrammarError):
        check_grammar(json_schema_to_gbnf(SCHEMAS[name]))


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a": {"type": "string", "format": "x", "contains": {}}}}, "at #/properties/a .*'contains'"),
        ({"type": "string", "minimum": 3}, "at # there is 'minimum'"),
        ({"type": "number", "minimum": 3}, "there is 'minimum'"),
        ({"type": ["integer", "number"], "minimum": 3}, "taken of whole numbers only"),
        ({"minLength": 1, "minItems": 1}, "`type` is missing"),
        ({"anyOf": [{"type": "string"}], "minLength": 3}, "`anyOf` and `minLength` stand side by side"),
        ({"$ref": "#/x", "type": "string"}, "`\\$ref` and `type`"),
        ({"type": "string", "enum": [1]}, "no value of `enum` is of the `type`"),
        ({"type": "string", "minLength": 4, "maxLength": 3}, "`minLength` is above `maxLength`"),
        ({"type": "string", "minLength": -1}, "is not a count"),
        ({"type": "string", "maxLength": 2001}, "`maxLength` is 2001; at most 2000"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "`pattern` and a length"),
        ({"type": "object", "required": ["a"], "additionalProperties": False}, "'a' is required but not allowed"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "nothing matches"),
        ({"type": "array", "items": False, "minItems": 1}, "may have no items but needs 1"),
        ({"type": "array", "prefixItems": [{}], "items": False, "minItems": 2}, "contradict each other"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "no whole number"),
        ({"type": [["string"]]}, "`type` is none that JSON Schema has"),
        ({"type": "array", "items": [{"type": "string"}]}, "there is no schema"),
    ],
)
def test_the_reason_names_the_place(schema: dict[str, Any], says: str) -> None:
    """And what stands there."""
    with pytest.raises(GrammarError, match=says):
        json_schema_to_gbnf(schema)


@pytest.mark.parametrize(("low", "high"), [(0, 0), (1, 5), (7, 123), (99, 1001), (-20, 135), (-105, -9), (0, 999)])
def test_whole_numbers_are_those_within_the_bounds(low: int, high: int) -> None:
    """Every one of them and no other, in one way of writing each."""
    for schema in (
        {"type": "integer", "minimum": low, "maximum": high},
        {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 0.5},
    ):
        regex = re.compile(as_regex(json_schema_to_gbnf(schema)))
        found = {number for number in range(-2000, 12_000) if regex.fullmatch(str(number))}
        assert found == set(range(low, high + 1))
        assert not regex.fullmatch("007")
        assert not regex.fullmatch("-0")


@given(st.integers(-(10**18) + 1, 10**18 - 1), st.integers(0, 10**6), st.integers(-5, 10**6 + 5))
def test_whole_numbers_of_any_size(low: int, more: int, step: int) -> None:
    """Around the bounds, wherever they are."""
    high = min(low + more, 10**18 - 1)
    regex = re.compile(as_regex(json_schema_to_gbnf({"type": "integer", "minimum": low, "maximum": high})))
    for number in (low - 1, low, high, high + 1, low + step):
        if abs(number) < 10**18:
            assert bool(regex.fullmatch(str(number))) == (low <= number <= high)


def test_an_object_has_what_is_required_and_any_of_the_rest() -> None:
    """All eight sets of the optional properties, in the schema's order, with commas where they belong."""
    names = ("a", "b", "c", "d", "e")
    schema = {"type": "object", "properties": {name: {"const": 1} for name in names}, "required": ["b", "d"]}
    regex = re.compile(as_regex(json_schema_to_gbnf(schema)))
    for chosen in itertools.product((False, True), repeat=5):
        text = json.dumps({name: 1 for name, is_there in zip(names, chosen, strict=True) if is_there})
        assert bool(regex.fullmatch(text)) == (chosen[1] and chosen[3])
    assert not regex.fullmatch('{"d": 1, "b": 1}')
    assert not regex.fullmatch('{"b": 1, "d": 1,}')
    assert regex.fullmatch('{"b":1,"d":1}')


def test_an_object_of_optional_properties_may_be_empty() -> None:
    """No comma stands before the first, whichever that is."""
    schema = {"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 1}}}
    allowed = ["{}", '{"a": 1}', '{"b": 1}', '{"a": 1, "b": 1}']
    assert all(lets_through(schema, text) for text in allowed)
    assert not any(lets_through(schema, text) for text in ('{, "b": 1}', '{"a": 1,}', '{"a": 1 "b": 1}'))


def test_lists_have_so_many_items() -> None:
    """For each pair of bounds, counted."""
    for least, most in ((0, None), (0, 0), (0, 1), (1, 1), (1, None), (2, 3), (0, 3)):
        schema = {"type": "array", "items": {"const": 1}, "minItems": least}
        schema |= {} if most is None else {"maxItems": most}
        regex = re.compile(as_regex(json_schema_to_gbnf(schema)))
        fitting = {n for n in range(7) if regex.fullmatch(json.dumps([1] * n))}
        assert fitting == {n for n in range(7) if n >= least and (most is None or n <= most)}


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("^[A-Z]{2}-\\d+$", ["AB-1", "XY-123"], ["A-1", "AB-", "ab-1"]),
        ("a|bc", ["a", "bc"], ["ab", "c"]),
        ("^(?:x(y|z)?)*$", ["", "x", "xyxz"], ["y"]),
        ("\\.\\*\\(\\$", [".*($"], ["a"]),
        ("[^a-c]{3}", ["xyz", "d d"], ["abc", "xy"]),
        ("[\\w.-]+@[\\w-]+", ["a.b@c-d"], ["@", "a b@c"]),
        ("\\u0041\\x42", ["AB"], ["ab"]),
        ("^a{2}?b*?$", ["aa", "aabb"], ["ab"]),
        ("[]]?", None, None),
        ("\\S\\s\\S", ["a b"], ["   ", "ab"]),
        ("^\\$$", ["$"], [""]),
        ("^.$", ["x", "\u00e9", "\U0001f98a"], ["", "xx"]),
    ],
)
def test_patterns_mean_what_they_mean_elsewhere(pattern: str, yes: list[str] | None, no: list[str] | None) -> None:
    """What is let through matches the expression as Python knows it."""
    if yes is None or no is None:
        with pytest.raises(GrammarError):
            pattern_to_gbnf(pattern)
        return
    schema = {"type": "string", "pattern": pattern}
    for text in yes:
        assert lets_through(schema, json.dumps(text, ensure_ascii=False)), text
        jsonschema.validate(text, schema)
    assert not any(lets_through(schema, json.dumps(text, ensure_ascii=False)) for text in no)


@pytest.mark.parametrize("text", ['"', "\\", "\n", "\x7f"])
def test_what_json_escapes_is_never_let_through_bare(text: str) -> None:
    """A set or a dot that would have it leaves it out, so that an answer is always JSON."""
    for pattern in (".", "[^a]", "\\W", "\\S"):
        assert not lets_through({"type": "string", "pattern": pattern}, f'"{text}"')


def test_quotes_and_backslashes_of_a_pattern_are_escaped() -> None:
    """As JSON writes them."""
    schema = {"type": "string", "pattern": 'a"b\\\\c'}
    assert lets_through(schema, json.dumps('a"b\\c'))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda one: st.lists(one, max_size=3), max_leaves=8
    )
)
def test_a_constant_is_let_through_and_nothing_else(value: Any) -> None:
    """Any value of JSON, also null."""
    text = json.dumps(value, ensure_ascii=False)
    assert lets_through({"const": value}, text)
    assert not lets_through({"const": value}, text + " ")


_NAMES = st.sampled_from(["a", "b", "c"])
_LEAVES = st.sampled_from(
    [
        {"type": "string", "maxLength": 3},
        {"type": "integer", "minimum": -3, "maximum": 12},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["x", 1, None]},
        {"type": "string", "pattern": "^[ab]{1,2}$"},
        {"type": ["integer", "null"]},
    ]
)
_SCHEMAS = st.recursive(
    _LEAVES,
    lambda one: st.one_of(
        st.builds(lambda items, most: {"type": "array", "items": items, "maxItems": most}, one, st.integers(0, 3)),
        st.builds(
            lambda properties, required: {
                "type": "object",
                "properties": properties,
                "required": [name for name in required if name in properties],
                "additionalProperties": False,
            },
            st.dictionaries(_NAMES, one, min_size=1, max_size=3),
            st.lists(_NAMES, unique=True),
        ),
        st.builds(lambda parts: {"anyOf": parts}, st.lists(one, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@given(_SCHEMAS, st.data())
def test_what_is_let_through_is_valid(schema: dict[str, Any], data: st.DataObject) -> None:
    """Random texts of the grammar, as another library judges them."""
    grammar = json_schema_to_gbnf(schema)
    check_grammar(grammar)
    text = data.draw(st.from_regex(as_regex(grammar), fullmatch=True))
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
