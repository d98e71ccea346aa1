"""JSON in the one form that equal values share, so that a hash of it names the value.

As RFC 8785 has it: UTF-8, no blanks, keys in the order of their UTF-16 code units, no escape that is not needed. In
numbers it differs, so as to lose no digits: a whole number of at most 64 bits, with or without a fraction in the
source, is written with all its digits; any other number is the shortest text that reads back as the same double.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llama_orch.errors import InvalidParams

DEPTH_MAX = 100
_INT_MIN, _INT_END = -(2**63), 2**63
_text = json.JSONEncoder(ensure_ascii=False).encode  # escapes exactly what RFC 8785 escapes


def canonical_json(value: Any) -> bytes:
    """Raises InvalidParams for what has no such form."""
    return "".join(_parts(value, 0)).encode()


def _parts(value: Any, depth: int) -> Iterator[str]:
    if depth > DEPTH_MAX:
        raise InvalidParams(f"the JSON is nested more than {DEPTH_MAX} deep; flatten it")
    if isinstance(value, dict):
        yield "{"
        for index, key in enumerate(sorted(value, key=_in_utf_16)):
            yield f"{',' if index else ''}{_text(key)}:"
            yield from _parts(value[key], depth + 1)
        yield "}"
    elif isinstance(value, list):
        yield "["
        for index, item in enumerate(value):
            if index:
                yield ","
            yield from _parts(item, depth + 1)
        yield "]"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield _number(value)
    else:
        yield _text(value)


def _in_utf_16(key: str) -> bytes:
    return key.encode("utf-16-be")


def _number(value: int | float) -> str:
    if isinstance(value, float) and value.is_integer() and _INT_MIN <= value < _INT_END:
        value = int(value)
    if isinstance(value, int) and not _INT_MIN <= value < _INT_END:
        raise InvalidParams("a whole number has more than 64 bits; send it as text")
    return repr(value)
