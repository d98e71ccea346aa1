"""JSON Schema as a GBNF grammar: what the grammar lets through is valid under the schema, always.

So nothing of a schema is passed over: a keyword that cannot be kept is refused by name. The other way round some of
what is valid is left out, because an answer needs only one form: objects have their properties in the schema's order
and no others, and there is no white space but one blank after `:` and `,`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama_orch.core.gbnf import GrammarError
from llama_orch.core.gbnf_parts import count, list_of, literal, whole_numbers
from llama_orch.core.patterns import pattern_to_gbnf
from llama_orch.core.schema_words import DIGITS_MAX, INTEGER_BOUNDS, Schema, bounds, integer_bounds, is_of, tags_of

SCHEMA_BYTES_MAX = 1 << 16
DEPTH_MAX = 32
NODES_MAX = 1024  # schemas within the schema
VALUES_MAX = 512  # of an `enum`
PROPERTIES_MAX = 256

# They say something to people, or name things.
_ANNOTATIONS_NAMES = """
    title description default examples example $schema $id $comment $defs definitions deprecated readOnly writeOnly
    format discriminator contentMediaType contentEncoding
"""
_ANNOTATIONS = frozenset(_ANNOTATIONS_NAMES.split())
_KEYWORDS = {
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "integer": INTEGER_BOUNDS,
    "number": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "object": frozenset({"properties", "required", "additionalProperties"}),
}
_OWNERS = {keyword: kind for kind, keywords in _KEYWORDS.items() for keyword in keywords}
_WHOLE = ("enum", "const", "$ref", "anyOf", "oneOf", "allOf")  # say all that there is to say

_COMMON = {
    "value": 'object | array | string | number | "true" | "false" | "null"',
    "object": '"{" (string colon value (comma string colon value)*)? "}"',
    "array": '"[" (value (comma value)*)? "]"',
    "string": r'"\"" char* "\""',
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" ([0-9A-CE-Fa-ce-f] hex hex hex | [Dd] [0-7] hex hex))',
    "hex": "[0-9A-Fa-f]",
    "number": '"-"? ("0" | [1-9] [0-9]{0,17}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "integer": f'"0" | "-"? [1-9] [0-9]{{0,{DIGITS_MAX - 1}}}',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "colon": '":" " "?',
    "comma": '"," " "?',
}
_NEEDS = {
    "value": ("object", "array", "string", "number"),
    "object": ("string", "colon", "comma", "value"),
    "array": ("value", "comma"),
    "string": ("char",),
    "char": ("hex",),
}


def json_schema_to_gbnf(schema: Schema) -> str:
    """The grammar. Raises GrammarError, with the place and what to do, for a schema that cannot be kept."""
    return grammar_of_rules(schema_rules(schema))


def schema_rules(schema: Schema, prefix: str = "") -> dict[str, str]:
    """The same as rules by name, for a grammar of several schemas: `<prefix>root` is where this one begins, and rules
    without the prefix are the same for all. Raises GrammarError."""
    try:
        size = len(json.dumps(schema))
    except RecursionError as error:
        raise GrammarError(f"it is nested more than {DEPTH_MAX} deep") from error
    if size > SCHEMA_BYTES_MAX:
        raise GrammarError(f"it has more than {SCHEMA_BYTES_MAX} bytes; shorten it")
    return _Writer(schema, prefix).rules()


def grammar_of_rules(rules: Mapping[str, str]) -> str:
    """GBNF, with its first rule first."""
    return "\n".join(f"{name} ::= {text}" for name, text in rules.items())


class _Writer:
    def __init__(self, schema: Schema, prefix: str) -> None:
        self._schema = schema
        self._prefix = prefix
        self._rules: dict[str, str] = {}
        self._targets: dict[str, str] = {"#": f"{prefix}root"}  # of references -> names of rules
        self._nodes = 0

    def rules(self) -> dict[str, str]:
        root = self._targets["#"]
        self._rules[root] = ""  # the first one, whatever is found in it
        self._rules[root] = self._expression(self._schema, "#", 0)
        return self._rules

    def _new(self) -> str:
        return f"{self._prefix}s{len(self._rules)}"

    # -- schemas -------------------------------------------------------------------------------------------------------

    def _rule(self, schema: object, place: str, depth: int) -> str:
        """The name of a rule for this schema."""
        name = self._new()
        self._rules[name] = ""
        self._rules[name] = self._expression(schema, place, depth)
        return name

    def _expression(self, schema: object, place: str, depth: int) -> str:
        self._nodes += 1
        if depth > DEPTH_MAX:
            raise GrammarError(f"it is nested more than {DEPTH_MAX} deep")
        if self._nodes > NODES_MAX:
            raise GrammarError(f"it has more than {NODES_MAX} schemas in it")
        if schema is True or schema == {}:
            return self._common("value")
        if not isinstance(schema, Mapping):
            raise GrammarError(f"at {place} there is {'`false`' if schema is False else 'no schema'}; nothing matches")
        said = {name: value for name, value in schema.items() if name not in _ANNOTATIONS}
        for keyword in _WHOLE:
            if keyword in said:
                return self._whole(keyword, said, place, depth)
        if not said:
            return self._common("value")
        kinds = self._kinds(said, place)
        self._check_keywords(said, kinds, place)
        return " | ".join(self._of_kind(kind, said, place, depth) for kind in kinds)

    def _kinds(self, said: Schema, place: str) -> list[str]:
        """The types that it allows."""
        given = said.get("type")
        if given is None:
            owners = sorted({_OWNERS[keyword] for keyword in said if keyword in _OWNERS})
            if len(owners) == 1:  # as everybody means it who leaves `type` out
                return owners
            if not owners:
                raise _unknown(next(iter(said)), place)
            raise GrammarError(f"at {place} `type` is missing; give it")
        kinds = [given] if isinstance(given, str) else given
        if (
            not isinstance(kinds, Sequence)
            or not kinds
            or not all(isinstance(one, str) and one in _KEYWORDS for one in kinds)
        ):
            raise GrammarError(f"at {place} `type` is none that JSON Schema has")
        return list(dict.fromkeys(kinds))

    def _check_keywords(self, said: Schema, kinds: Sequence[str], place: str) -> None:
        known = {"type"}.union(*(_KEYWORDS[kind] for kind in kinds))
        for keyword, value in said.items():
            if keyword not in known and not (keyword == "uniqueItems" and value is False):
                raise _unknown(keyword, place)
            if keyword in _KEYWORDS["integer"] and "number" in kinds:
                raise GrammarError(f"at {place} `{keyword}` is taken of whole numbers only; use type integer")

    def _of_kind(self, kind: str, said: Schema, place: str, depth: int) -> str:
        match kind:
            case "string":
                return self._string(said, place)
            case "integer":
                return self._integer(said, place)
            case "array":
                return self._array(said, place, depth)
            case "object":
                return self._object(said, place, depth)
        return self._common(kind)

    # -- what says all -------------------------------------------------------------------------------------------------

    def _whole(self, keyword: str, said: Schema, place: str, depth: int) -> str:
        value = said[keyword]
        beside = [name for name in said if name not in (keyword, "type")]
        if beside:
            raise GrammarError(f"at {place} `{keyword}` and `{beside[0]}` stand side by side; put them into one")
        if keyword in ("enum", "const"):
            return self._values(value if keyword == "enum" else [value], said, place)
        if "type" in said:
            raise GrammarError(f"at {place} `{keyword}` and `type` stand side by side; put `type` into each part")
        if keyword == "$ref":
            return self._reference(value, place, depth)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise GrammarError(f"at {place} `{keyword}` is not a list of schemas")
        if keyword == "allOf" and len(value) > 1:
            raise GrammarError(f"at {place} `allOf` has several parts; put them into one schema")
        if keyword == "oneOf":
            self._check_apart(value, place)
        return " | ".join(self._rule(one, f"{place}/{keyword}/{i}", depth + 1) for i, one in enumerate(value))

    def _values(self, values: object, said: Schema, place: str) -> str:
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            raise GrammarError(f"at {place} `enum` has no values; nothing matches")
        if len(values) > VALUES_MAX:
            raise GrammarError(f"at {place} `enum` has more than {VALUES_MAX} values")
        kinds = self._kinds(said, place) if "type" in said else None
        fitting = [one for one in values if kinds is None or any(is_of(one, kind) for kind in kinds)]
        if not fitting:
            raise GrammarError(f"at {place} no value of `enum` is of the `type`; nothing matches")
        return " | ".join(dict.fromkeys(literal(json.dumps(one, ensure_ascii=False)) for one in fitting))

    def _reference(self, reference: object, place: str, depth: int) -> str:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise GrammarError(f"at {place} `$ref` leads out of the schema; only `#/…` is followed")
        if reference not in self._targets:
            target: Any = self._schema
            for step in reference.split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                if isinstance(target, list) and step.isdecimal() and int(step) < len(target):
                    target = target[int(step)]
                elif isinstance(target, Mapping) and step in target:
                    target = target[step]
                else:
                    raise GrammarError(f"at {place} `$ref` {reference[:80]!r} leads nowhere")
            name = self._targets[reference] = self._new()
            self._rules[name] = ""
            self._rules[name] = self._expression(target, reference, depth + 1)
        return self._targets[reference]

    def _check_apart(self, parts: Sequence[object], place: str) -> None:
        """`oneOf` means exactly one: a value that two parts allow would be wrong, and a grammar cannot leave it out."""
        kinds: list[set[str]] = []
        tags: list[Mapping[str, Sequence[object]]] = []
        for part in parts:
            resolved = self._resolved(part)
            given = resolved.get("type")
            several = given if isinstance(given, list) and given else _KEYWORDS
            names = {str(kind) for kind in ([given] if isinstance(given, str) else several)}
            kinds.append({"number" if name == "integer" else name for name in names})
            tags.append(tags_of(resolved))
        for i in range(len(parts)):
            for j in range(i):
                meet = kinds[i] & kinds[j]
                common = tags[i].keys() & tags[j].keys()
                apart = any(not any(value in tags[j][name] for value in tags[i][name]) for name in common)
                if meet and not (meet == {"object"} and apart):
                    raise GrammarError(f"at {place} parts {j} and {i} of `oneOf` may both match; use `anyOf`")

    def _resolved(self, part: object) -> Schema:
        for _ in range(DEPTH_MAX):
            if not isinstance(part, Mapping):
                return {}
            reference = part.get("$ref")
            if not isinstance(reference, str) or not reference.startswith("#/"):
                return part
            target: Any = self._schema
            for step in reference.split("/")[1:]:
                target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
            part = target
        return {}

    # -- types ---------------------------------------------------------------------------------------------------------

    def _string(self, said: Schema, place: str) -> str:
        least, most = bounds(said, "minLength", "maxLength", place)
        if "pattern" in said:
            if least or most is not None:
                raise GrammarError(f"at {place} `pattern` and a length stand side by side; put the length into it")
            if not isinstance(said["pattern"], str):
                raise GrammarError(f"at {place} `pattern` is not a text")
            return rf'"\"" {pattern_to_gbnf(said["pattern"])} "\""'
        if not least and most is None:
            return self._common("string")
        self._common("char")
        return rf'"\"" char{count(least, most)} "\""'

    def _integer(self, said: Schema, place: str) -> str:
        low, high = integer_bounds(said, place)
        if low is None and high is None:
            return self._common("integer")
        furthest = 10**DIGITS_MAX - 1
        low, high = max(-furthest, -furthest if low is None else low), min(furthest, furthest if high is None else high)
        if low > high:
            raise GrammarError(f"at {place} no whole number of up to {DIGITS_MAX} digits is within the bounds")
        parts = [f'"-" ({text})' for text in whole_numbers(max(1, -high), -low)] if low < 0 else []
        parts += whole_numbers(max(0, low), high) if high >= 0 else []
        return f"({' | '.join(parts)})"

    def _array(self, said: Schema, place: str, depth: int) -> str:
        least, most = bounds(said, "minItems", "maxItems", place)
        first = said.get("prefixItems", [])
        if not isinstance(first, Sequence) or isinstance(first, str) or len(first) > PROPERTIES_MAX:
            raise GrammarError(f"at {place} `prefixItems` is not a list of at most {PROPERTIES_MAX} schemas")
        self._common("comma")
        names = [self._rule(one, f"{place}/prefixItems/{i}", depth + 1) for i, one in enumerate(first)]
        rest = None if said.get("items") is False else self._rule(said.get("items", True), f"{place}/items", depth + 1)
        if names:
            # No more than are named, unless more have to be: an answer needs only one form.
            if (most is not None and most < len(names)) or (rest is None and least > len(names)):
                raise GrammarError(f"at {place} the number of items and `prefixItems` contradict each other")
            names += [rest or ""] * (least - len(names))
            return f'"[" {" comma ".join(names)} "]"'
        if rest is None or most == 0:
            if least:
                raise GrammarError(f"at {place} the array may have no items but needs {least}")
            return '"[" "]"'
        return f'"[" {list_of(rest, least, most)} "]"'

    def _object(self, said: Schema, place: str, depth: int) -> str:
        properties, required = said.get("properties", {}), said.get("required", [])
        more = said.get("additionalProperties", True)
        if not isinstance(properties, Mapping) or not isinstance(required, Sequence) or isinstance(required, str):
            raise GrammarError(f"at {place} `properties` is no object, or `required` no list")
        if not all(isinstance(name, str) for name in required):
            raise GrammarError(f"at {place} `required` has something that is no name")
        undeclared = [name for name in dict.fromkeys(required) if name not in properties]
        if undeclared and more is False:
            raise GrammarError(f"at {place} {undeclared[0]!r} is required but not allowed; nothing matches")
        if len(properties) + len(undeclared) > PROPERTIES_MAX:
            raise GrammarError(f"at {place} there are more than {PROPERTIES_MAX} properties")
        if not properties and not undeclared:
            return self._map(more, place, depth)
        self._common("colon")
        self._common("comma")
        pairs: list[tuple[str, bool]] = []
        for name, schema in (*properties.items(), *((name, more) for name in undeclared)):
            if schema is False and name not in required:  # one that must not be there
                continue
            value = self._rule(schema, f"{place}/properties/{name}", depth + 1)
            pairs.append((f"{literal(json.dumps(name, ensure_ascii=False))} colon {value}", name in required))
        return f'"{{" {self._members(pairs)} "}}"'

    def _members(self, pairs: Sequence[tuple[str, bool]]) -> str:
        """All that are required and any of the others, in their order, with a comma between two."""
        later = first = ""  # what may follow when something, or nothing, stands before
        for pair, is_required in reversed(pairs):
            alone = f"{pair} {later}".strip()
            if is_required:
                first, later = alone, self._named(f"comma {alone}")
            else:
                first = self._named(f"{alone} | {first}" if first else f'{alone} | ""')
                later = self._named(f"comma {alone} | {later}" if later else f'comma {alone} | ""')
        return first

    def _named(self, text: str) -> str:
        name = self._new()
        self._rules[name] = text
        return name

    def _map(self, more: object, place: str, depth: int) -> str:
        if more is False:
            return '"{" "}"'
        if more is True or more == {}:
            return self._common("object")
        value = self._rule(more, f"{place}/additionalProperties", depth + 1)
        self._common("comma")
        pair = self._named(f"{self._common('string')} {self._common('colon')} {value}")
        return f'"{{" {list_of(pair, 0, None)} "}}"'

    def _common(self, name: str) -> str:
        """The rule of this name, with all that it needs."""
        if name not in self._rules:
            self._rules[name] = _COMMON[name]
            for needed in _NEEDS.get(name, ()):
                self._common(needed)
        return name


def _unknown(keyword: str, place: str) -> GrammarError:
    return GrammarError(f"at {place} there is {keyword[:80]!r}, which cannot be kept, or not there; leave it out")
