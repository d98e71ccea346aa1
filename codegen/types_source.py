"""JSON Schema (the subset that our documents use) to Python source: msgspec Structs, enums and annotated types.

Raises on any keyword that it cannot express exactly, so that a contract never says more than the code checks.
"""

from __future__ import annotations

import keyword
from typing import Any

from documents import ContractError, Node

UUID_PATTERN = r"^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$(?!\n)"
INT_RANGES = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
PROSE = {"description", "title", "example", "examples", "default", "$schema", "$id"}
STRING_META = {"minLength": "min_length", "maxLength": "max_length", "pattern": "pattern"}
NUMBER_META = {"minimum": "ge", "maximum": "le"}
ARRAY_META = {"minItems": "min_length", "maxItems": "max_length"}


def class_name(text: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in text.replace("-", "_").split("_"))


def annotated(base: str, meta: dict[str, Any]) -> str:
    return f"Annotated[{base}, Meta({', '.join(f'{k}={v!r}' for k, v in meta.items())})]" if meta else base


class Emitter:
    """Collects the source of the types that a document needs, each before its first use.

    `closed` names the objects that refuse unknown fields where their schema says so; None means all. What clients
    decode is left open: an older client must read a newer service's answers.
    """

    def __init__(self, schemas: Node, closed: set[str] | None = None) -> None:
        self.schemas = schemas
        self.closed = closed
        self.done: dict[str, str] = {}
        self.sources: list[str] = []

    def named(self, name: str) -> str:
        """The Python type expression for the named component; emits it on first sight."""
        if name not in self.done:
            self.done[name] = name
            self.done[name] = self.expression(self.schemas[name], name, top=True)
        return self.done[name]

    def expression(self, schema: Node, name: str, *, top: bool = False) -> str:
        if "$ref" in schema:
            return self.named(schema["$ref"].rsplit("/", 1)[1])
        if "allOf" in schema:
            return self._all_of(schema, name)
        kinds = schema.get("type")
        nullable = bool(schema.get("nullable"))
        if isinstance(kinds, list):
            nullable, (kind,) = "null" in kinds, tuple(k for k in kinds if k != "null")
            schema = {**schema, "type": kind}
        used = {"type", "nullable"} | PROSE
        base = self._base(schema, name, used, top=top)
        if left := {key for key in schema if not key.startswith("x-")} - used:
            raise ContractError(f"{name}: no exact Python type for {sorted(left)}")
        return f"{base} | None" if nullable else base

    def _all_of(self, schema: Node, name: str) -> str:
        """`allOf` with one reference: the way to give a reference a default or a description in 3.0."""
        if len(schema["allOf"]) != 1 or set(schema) - PROSE - {"allOf"}:
            raise ContractError(f"{name}: allOf takes one reference and prose only")
        return self.expression(schema["allOf"][0], name)

    def _base(self, schema: Node, name: str, used: set[str], *, top: bool) -> str:
        if "oneOf" in schema:
            used.add("oneOf")
            return " | ".join(self.expression(option, name) for option in schema["oneOf"])
        if "enum" in schema:
            used.add("enum")
            return self._enum(schema, name, top=top)
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, name, used)
        if kind == "array":
            used |= {"items", *ARRAY_META}
            item = self.expression(schema["items"], f"{name}Item")
            return annotated(f"list[{item}]", {v: schema[k] for k, v in ARRAY_META.items() if k in schema})
        if kind == "string":
            return self._string(schema, name, used)
        if kind in ("integer", "number"):
            return self._number(schema, used)
        if kind == "boolean":
            return "bool"
        raise ContractError(f"{name}: no Python type for {schema}")

    def _string(self, schema: Node, name: str, used: set[str]) -> str:
        used |= {"format", *STRING_META}
        if schema.get("format") == "uuid":
            return "Uuid"
        if schema.get("format") not in (None, "date-time", "path"):  # `path`: with slashes, a matter of the router's
            raise ContractError(f"{name}: string format {schema['format']}")
        meta = {v: schema[k] for k, v in STRING_META.items() if k in schema}
        if meta.get("pattern", "").endswith("$"):  # in Python, but not in JSON Schema, `$` lets a last newline pass
            meta["pattern"] += r"(?!\n)"
        return annotated("str", meta)

    def _number(self, schema: Node, used: set[str]) -> str:
        used |= {"format", *NUMBER_META}
        meta = {v: schema[k] for k, v in NUMBER_META.items() if k in schema}
        if schema["type"] == "number":
            return annotated("float", meta)
        low, high = INT_RANGES[schema.get("format", "int64")]
        return annotated("int", {"ge": max(low, meta.get("ge", low)), "le": min(high, meta.get("le", high))})

    def _enum(self, schema: Node, name: str, *, top: bool) -> str:
        values = [value for value in schema["enum"] if value is not None]
        if not top:
            return f"Literal[{', '.join(map(repr, values))}]"
        lines = [f"class {name}(StrEnum):", f'    """{schema.get("description", name).strip()}"""', ""]
        lines += [f"    {value.upper().replace('-', '_')} = {value!r}" for value in values]
        self.sources.append("\n".join(lines))
        return name

    def _object(self, schema: Node, name: str, used: set[str]) -> str:
        used |= {"properties", "required", "additionalProperties", "minProperties"}
        extra = schema.get("additionalProperties", True)
        if "properties" not in schema:
            value = self.expression(extra, f"{name}Value") if isinstance(extra, dict) else "Any"
            meta = {"min_length": schema["minProperties"]} if "minProperties" in schema else {}
            return annotated(f"dict[str, {value}]", meta)
        if isinstance(extra, dict):
            raise ContractError(f"{name}: properties together with a schema for additional ones")
        name = schema.get("title", name)
        required = schema.get("required", [])
        fields = [self._field(key, sub, name, is_required=key in required) for key, sub in schema["properties"].items()]
        is_closed = extra is False and (self.closed is None or name in self.closed)
        forbid = ", forbid_unknown_fields=True" if is_closed else ""
        head = [f"class {name}(Struct, kw_only=True, frozen=True{forbid}):"]
        head.append(f'    """{schema.get("description", name).strip()}"""\n')
        self.sources.append("\n".join([*head, *fields]) if fields else "\n".join(head).rstrip())
        return name

    def _field(self, key: str, schema: Node, owner: str, *, is_required: bool) -> str:
        if keyword.iskeyword(key) or not key.isidentifier():
            raise ContractError(f"{owner}.{key} is no Python name")
        kind = self.expression(schema, owner + class_name(key))
        note = schema.get("description", "").strip()
        comment = f"  # {note}" if note else ""
        if is_required:
            return f"    {key}: {kind}{comment}"
        if "default" in schema:
            return f"    {key}: {kind} = {self.default(schema['default'], schema, kind)}{comment}"
        if schema.get("type") == "object" and "title" in schema:  # a section of the configuration
            return f"    {key}: {kind} = field(default_factory={kind}){comment}"
        if kind.endswith("| None"):
            return f"    {key}: {kind} = None{comment}"
        return f"    {key}: {kind} | UnsetType = UNSET{comment}"

    def default(self, value: Any, schema: Node, kind: str) -> str:
        """Source of a field's default. Mutable ones are made anew for each instance."""
        if isinstance(value, dict | list):
            return f"field(default_factory=lambda: {self.literal(value, schema)})"
        if "allOf" in schema and isinstance(value, str):
            return f"{kind}.{value.upper().replace('-', '_')}"
        return repr(value)

    def literal(self, value: Any, schema: Node) -> str:
        if isinstance(value, list):
            return f"[{', '.join(self.literal(item, schema['items']) for item in value)}]"
        if isinstance(value, dict) and "title" in schema and "properties" in schema:
            return f"{schema['title']}({', '.join(f'{k}={v!r}' for k, v in value.items())})"
        if isinstance(value, dict):
            inner = schema["additionalProperties"]
            return f"{{{', '.join(f'{k!r}: {self.literal(v, inner)}' for k, v in value.items())}}}"
        return repr(value)
