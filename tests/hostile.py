"""Grammars and schemas that nobody must be able to hurt an engine with, and some that are harmless."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

# Seen on llama.cpp b11549 itself: what it did is in the comments.
GRAMMARS: dict[str, str] = {
    "empty": "",
    "without a root": 'start ::= "a"',
    "broken": "root ::= ((",
    "an unknown rule": "root ::= x",
    "a rule twice": 'root ::= "a"\nroot ::= "b"',
    "of another kind": "%llguidance {}\nstart: /a+/",
    "a NUL": 'root ::= "\0"',
    "left recursion": 'root ::= root "a" | "b"',
    "hidden left recursion": 'root ::= x root "a" | "b"\nx ::= "c"?',  # 2.6 GB in 10 s, then bad_alloc
    "indirect left recursion": 'root ::= a\na ::= b\nb ::= c\nc ::= ("x"?) root | "y"',
    "no end": 'root ::= "a" root',
    "no characters": "root ::= []",
    "all characters left out": r"root ::= [^\x00-\U0010FFFF]",  # four replacement characters, then an end
    "a million times": 'root ::= "a"{1000000}',
    "counts of counts": 'root ::= ((("a"{0,100}){0,100}){0,100})',
    "hollow counts of counts": 'root ::= ((("a"?){0,50}){0,50}){0,50}',
    "5,000 deep": f'root ::= {"(" * 5000}"a"{")" * 5000}',
    "30,000 deep": f'root ::= {"(" * 30000}"a"{")" * 30000}',  # SIGSEGV
    "doubling": "\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}? r{i + 1}?" for i in range(18)), 'r18 ::= "a"']),
    "1,500 optional parts": f"root ::= {' '.join(['[a-z]?'] * 1500)}",  # did not come back
    "6,000 alternatives": f"root ::= {' | '.join(chr(34) + f'w{i}' + chr(34) for i in range(6000))}",
    "300 stars": f"root ::= {' '.join(['[a-z]*'] * 300)}",  # did not come back
    "100 stars": f"root ::= {' '.join(['[a-z]*'] * 100)}",  # 66 ms a token with a vocabulary of 1,280
    "ambiguous": "root ::= s\ns ::= t s s | t s | t\nt ::= [a-z ]+",  # each token takes longer than the one before
    "too long": 'root ::= "' + "a" * 65000 + '" "' + "\u20ac" * 400 + '"',
}

DEEP: Schema = {"type": "integer"}
for _ in range(100):
    DEEP = {"type": "array", "items": DEEP}

SCHEMAS: dict[str, Schema] = {
    "an unknown type": {"type": "banana"},
    "a condition": {"if": {"type": "string"}, "then": {"minLength": 3}},
    "a negation": {"not": {"type": "string"}},
    "a contradiction": {"allOf": [{"type": "string"}, {"type": "integer"}]},
    "no values": {"enum": []},
    "a file": {"$ref": "file:///etc/passwd"},
    "another host": {"$ref": "https://example.com/schema.json"},
    "nowhere": {"$ref": "#/$defs/nothing"},
    "itself": {"$ref": "#"},
    "a circle": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "no end": {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    "a billion characters": {"type": "string", "maxLength": 10**9},
    "at least a million characters": {"type": "string", "minLength": 10**6},
    "100,000 items": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000},
    "100 deep": DEEP,
    "2,000 properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}},
    "20,000 values": {"enum": [f"v{i}" for i in range(20_000)]},
    "1,000 alternatives": {"anyOf": [{"type": "object", "properties": {f"p{i}": {}}} for i in range(1000)]},
    "doubling": {
        "$ref": "#/$defs/d0",
        "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(24)} | {"d24": {}},
    },
    "alternatives that meet": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "400 digits": {"type": "integer", "minimum": 10**400},
    "a property that is not kept": {"type": "object", "patternProperties": {"^(a|b)*a(a|b){12}$": {}}},
    "different items": {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
    "look-ahead": {"type": "string", "pattern": "^(?=a)b$"},
    "a reference back": {"type": "string", "pattern": r"^(a)\1$"},
    "an open group": {"type": "string", "pattern": "((("},
    "nested counts": {"type": "string", "pattern": "^(a{0,1000}){0,1000}$"},
    "a pattern that is hard to follow": {"type": "string", "pattern": "^(" + "[a-z]*" * 100 + ")$"},
}

# They are kept: an answer that comes to its end is valid.
KEPT: dict[str, Schema] = {
    "a person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 20},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["red", "old", "small"]}, "minItems": 1, "maxItems": 3},
            "is_kind": {"type": "boolean"},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "optional parts": {
        "type": "object",
        "properties": {
            "a": {"type": "string", "maxLength": 8},
            "b": {"type": "integer"},
            "c": {"type": ["null", "boolean"]},
        },
        "required": ["b"],
    },
    "a choice": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "fox"}, "tail": {"type": "boolean"}},
                "required": ["kind"],
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "dog"}, "n": {"type": "integer"}},
                "required": ["kind", "n"],
            },
        ]
    },
    "a code": {"type": "string", "pattern": r"^[A-Z]{2}-\d{3,5}(x|y\.z)?$"},
    "quotes": {"enum": ['say "no"', "back\\slash", "line\nfeed", "\u00fc\u20ac\U0001f98a", None, 3.5, [1, {"a": 2}]]},
    "a tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer", "minimum": -20, "maximum": 20},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "a map": {"type": "object", "additionalProperties": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9}},
    "a pair": {
        "type": "array",
        "prefixItems": [{"type": "string", "maxLength": 5}, {"type": "number"}],
        "items": False,
        "minItems": 2,
    },
    "anything": {"type": "object", "title": "an object", "required": ["x"]},
}
