"""Says what is wrong with a request in words that its author can act on: the place, the rule, and the nearest known
name."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from typing import Any

from msgspec import ValidationError, inspect

REASON_MAX_CHARS = 300
NAME_MAX_CHARS = 64  # difflib is quadratic, and names come from outside

_parts = re.compile(r"(.*?)(?: - at `(?:key` in `)?(\$.*)`)?", re.DOTALL).fullmatch
_unknown_field = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL).fullmatch
_pattern = re.compile(r"Expected `str` matching regex '(.*?)(?:\(\?!\\\\n\))?'", re.DOTALL).fullmatch
_steps = re.compile(r"\.(\w+)|\[").finditer


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name."""
    names = sorted(known)
    if close := difflib.get_close_matches(name[:NAME_MAX_CHARS], names, n=1):
        return f"did you mean `{close[0]}`?"
    return f"known: {', '.join(names) or 'none'}"


# The contract's patterns, by what only they have.
PATTERNS = {"[0-9a-fA-F]{8}": "must be a UUID", "[A-Za-z0-9_-]*": "may have letters, digits, `_` and `-` only"}


def body_problem(exc: ValidationError, body_type: Any) -> str:
    return f"body: {_problem(exc, body_type)}"


def body_place(exc: ValidationError) -> str | None:
    """The field that is wrong, such as `messages[1].role`; None where it is the whole body."""
    match = _parts(str(exc))
    path = (match[2] or "$").removeprefix("$").removeprefix(".") if match else ""
    unknown = _unknown_field(match[1]) if match else None
    names = [path, unknown[1][:NAME_MAX_CHARS]] if unknown else [path]
    return ".".join(name for name in names if name) or None


def parameter_problem(exc: ValidationError, place: str, name: str, value_type: Any) -> str:
    return f"{place} parameter `{name}`: {_problem(exc, value_type)}"


def _problem(exc: ValidationError, root: Any) -> str:
    match = _parts(str(exc))
    reason, path = (match[1], match[2]) if match else (str(exc), None)
    nodes = _at(root, path or "$")
    if found := _pattern(reason):
        reason = next((words for pattern, words in PATTERNS.items() if pattern in found[1]), f"must match {found[1]}")
    elif found := _unknown_field(reason):
        names = [field.encode_name for node in nodes if isinstance(node, inspect.StructType) for field in node.fields]
        reason = f"unknown field `{found[1][:NAME_MAX_CHARS]}`; {nearest(found[1], names)}"
    elif reason.startswith("Invalid enum value"):
        reason = f"must be one of {', '.join(_choices(nodes))}"
    return reason[:REASON_MAX_CHARS] + (f" - at `{path}`" if path else "")


def _choices(nodes: list[inspect.Type]) -> list[str]:
    enums = [node.cls for node in nodes if isinstance(node, inspect.EnumType)]
    literals = [str(value) for node in nodes if isinstance(node, inspect.LiteralType) for value in node.values]
    return [str(member.value) for enum in enums for member in enum] + literals


@functools.cache
def _root(type_: Any) -> list[inspect.Type]:
    return _alternatives(inspect.type_info(type_))


def _at(root: Any, path: str) -> list[inspect.Type]:
    """The types that the contract has at a path such as `$.messages[0].role`."""
    nodes = _root(root)
    for step in _steps(path):
        nodes = [below for node in nodes for below in _below(node, step[1])]
    return nodes


def _below(node: inspect.Type, field_name: str | None) -> list[inspect.Type]:
    if isinstance(node, inspect.StructType) and field_name:
        return [n for field in node.fields if field.encode_name == field_name for n in _alternatives(field.type)]
    if isinstance(node, inspect.ListType) and not field_name:
        return _alternatives(node.item_type)
    return []


def _alternatives(node: inspect.Type) -> list[inspect.Type]:
    """The plain types behind annotations and unions."""
    if isinstance(node, inspect.Metadata):
        return _alternatives(node.type)
    if isinstance(node, inspect.UnionType):
        return [plain for option in node.types for plain in _alternatives(option)]
    return [node]
