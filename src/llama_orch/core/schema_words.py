"""What keywords of a JSON Schema say, apart from grammars: bounds, types, tags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llama_orch.core.gbnf import REPEATS_MAX, GrammarError

DIGITS_MAX = 18  # of a whole number
INTEGER_BOUNDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"})

Schema = Mapping[str, Any]


def bounds(said: Schema, lower: str, upper: str, place: str) -> tuple[int, int | None]:
    least, most = said.get(lower, 0), said.get(upper)
    for name, value in ((lower, least), (upper, most)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise GrammarError(f"at {place} `{name}` is not a count")
        if value is not None and value > REPEATS_MAX:
            raise GrammarError(f"at {place} `{name}` is {value}; at most {REPEATS_MAX} can be counted")
    if most is not None and least > most:
        raise GrammarError(f"at {place} `{lower}` is above `{upper}`; nothing matches")
    return least, most


def is_of(value: object, kind: str) -> bool:
    match kind:
        case "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
    types = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict}
    return isinstance(value, types[kind])


def tags_of(schema: Schema) -> Mapping[str, Sequence[object]]:
    """The required properties that have one of a few values."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping) or not isinstance(required, Sequence):
        return {}
    found: dict[str, Sequence[object]] = {}
    for name, one in properties.items():
        if name in required and isinstance(one, Mapping):
            values = [one["const"]] if "const" in one else one.get("enum")
            if isinstance(values, list):
                found[name] = values
    return found


def integer_bounds(said: Schema, place: str) -> tuple[int | None, int | None]:
    """Both included."""
    for name in INTEGER_BOUNDS & said.keys():
        if isinstance(said[name], bool) or not isinstance(said[name], int | float) or abs(said[name]) > 10**DIGITS_MAX:
            raise GrammarError(f"at {place} `{name}` is not a number of up to {DIGITS_MAX} digits")
    lows = [-int(-said["minimum"] // 1)] if "minimum" in said else []
    lows += [int(said["exclusiveMinimum"] // 1) + 1] if "exclusiveMinimum" in said else []
    highs = [int(said["maximum"] // 1)] if "maximum" in said else []
    highs += [-int(-said["exclusiveMaximum"] // 1) - 1] if "exclusiveMaximum" in said else []
    return max(lows, default=None), min(highs, default=None)
