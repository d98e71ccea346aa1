"""What changed in the contract since its last release, and whether `info.version` says so.

    python tools/contract_diff.py            compare with openapi/released/; exit 1 when the version does not follow
    python tools/contract_diff.py --release  make the present documents the released ones

A breaking change asks for a new major version, an addition for a new minor one. Directions differ: a request that the
server took must still be taken, an answer that a client could read must still be readable.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CURRENT = ROOT / "src" / "llama_orch" / "contract" / "documents"
RELEASED = ROOT / "openapi" / "released"
DOCUMENTS = ("data", "control", "openai")
METHODS = ("get", "put", "post", "delete", "patch")

Kind = Literal["breaking", "additive"]
Side = Literal["request", "response"]
Node = dict[str, Any]

# Keyword -> whether the new value allows more than the old one. None stands for an absent keyword.
LOOSER: dict[str, Callable[[Any, Any], bool]] = {
    "minimum": lambda old, new: new is None or (old is not None and new < old),
    "maximum": lambda old, new: new is None or (old is not None and new > old),
    "minLength": lambda old, new: new is None or (old is not None and new < old),
    "maxLength": lambda old, new: new is None or (old is not None and new > old),
    "minItems": lambda old, new: new is None or (old is not None and new < old),
    "maxItems": lambda old, new: new is None or (old is not None and new > old),
    "nullable": lambda old, new: bool(new),
    "additionalProperties": lambda old, new: new is None or bool(new),
}


class Change(NamedTuple):
    kind: Kind
    where: str
    what: str


class Pair(NamedTuple):
    """The two documents, for references."""

    old: Node
    new: Node


def follow(document: Node, node: Node) -> Node:
    """The node behind local references and single `allOf`s."""
    while "$ref" in node or len(node.get("allOf", ())) == 1:
        if "$ref" not in node:
            node = node["allOf"][0]
            continue
        target: Any = document
        for part in node["$ref"][2:].split("/"):
            target = target[part]
        node = target
    return node


def schema_changes(pair: Pair, old: Node, new: Node, where: str, side: Side, seen: set[str]) -> Iterator[Change]:
    key = f"{old.get('$ref')}|{new.get('$ref')}|{side}"
    if "$ref" in old and key in seen:
        return
    seen = seen | {key}
    old, new = follow(pair.old, old), follow(pair.new, new)
    for keyword in ("type", "format", "pattern"):
        if old.get(keyword) != new.get(keyword):
            yield Change("breaking", where, f"{keyword} was {old.get(keyword)!r} and is {new.get(keyword)!r}")
    for keyword, is_looser in LOOSER.items():
        before, after = old.get(keyword), new.get(keyword)
        if before != after and not (keyword == "nullable" and bool(before) == bool(after)):
            yield _bound(where, keyword, before, after, looser=is_looser(before, after), side=side)
    yield from _enum_changes(old, new, where, side)
    yield from _property_changes(pair, old, new, where, side, seen)
    if "items" in old and "items" in new:
        yield from schema_changes(pair, old["items"], new["items"], f"{where}[]", side, seen)


def _bound(where: str, keyword: str, before: Any, after: Any, *, looser: bool, side: Side) -> Change:
    # A request may be asked less, an answer may say less; the other way round somebody is surprised.
    kind: Kind = "additive" if looser == (side == "request") else "breaking"
    return Change(kind, where, f"{keyword} was {before!r} and is {after!r}")


def _enum_changes(old: Node, new: Node, where: str, side: Side) -> Iterator[Change]:
    before, after = old.get("enum"), new.get("enum")
    if before is None or after is None:
        if before != after:
            yield _bound(where, "enum", before, after, looser=after is None, side=side)
        return
    for value in before:
        if value not in after:
            yield Change("breaking" if side == "request" else "additive", where, f"value {value!r} is gone")
    for value in after:
        if value not in before:  # clients are told to expect new codes and states
            yield Change("additive", where, f"value {value!r} is new")


def _property_changes(pair: Pair, old: Node, new: Node, where: str, side: Side, seen: set[str]) -> Iterator[Change]:
    before, after = old.get("properties", {}), new.get("properties", {})
    was_required, is_required = set(old.get("required", ())), set(new.get("required", ()))
    for name in before:
        if name not in after:
            yield Change("breaking", f"{where}.{name}", "is gone")
            continue
        yield from schema_changes(pair, before[name], after[name], f"{where}.{name}", side, seen)
        if (name in was_required) != (name in is_required):
            breaks = (name in is_required) == (side == "request")
            word = "required" if name in is_required else "optional"
            yield Change("breaking" if breaks else "additive", f"{where}.{name}", f"is {word} now")
    for name in after:
        if name not in before:
            breaks = side == "request" and name in is_required
            yield Change("breaking" if breaks else "additive", f"{where}.{name}", "is new")


def operation_changes(pair: Pair, old: Node, new: Node, where: str) -> Iterator[Change]:
    yield from _parameter_changes(pair, old, new, where)
    if "requestBody" in old and "requestBody" in new:
        yield from _content_changes(pair, old["requestBody"], new["requestBody"], f"{where} body", "request")
    elif "requestBody" in old or "requestBody" in new:
        yield Change("breaking", where, "gained or lost its body")
    for status, response in old["responses"].items():
        if status not in new["responses"]:
            yield Change("breaking", f"{where} {status}", "is gone")
            continue
        before, after = follow(pair.old, response), follow(pair.new, new["responses"][status])
        yield from _content_changes(pair, before, after, f"{where} {status}", "response")
        for header in before.get("headers", {}):
            if header not in after.get("headers", {}):
                yield Change("breaking", f"{where} {status}", f"header {header} is gone")
    for status in new["responses"]:
        if status not in old["responses"]:
            yield Change("additive", f"{where} {status}", "is new")
    yield from _frame_changes(pair, old, new, where)
    was_open, is_open = old.get("security") == [], new.get("security") == []
    if was_open != is_open:
        yield Change("breaking" if was_open else "additive", where, "needs a token" if was_open else "needs no token")


def _parameter_changes(pair: Pair, old: Node, new: Node, where: str) -> Iterator[Change]:
    before, after = _parameters(pair.old, old), _parameters(pair.new, new)
    for key, parameter in before.items():
        if key not in after:
            yield Change("breaking", f"{where} {key}", "is gone")
            continue
        yield from schema_changes(pair, parameter["schema"], after[key]["schema"], f"{where} {key}", "request", set())
    for key, parameter in after.items():
        was_required = bool(before.get(key, {}).get("required"))
        if parameter.get("required") and not was_required:
            yield Change("breaking", f"{where} {key}", "is required now")
        elif key not in before:
            yield Change("additive", f"{where} {key}", "is new")


def _parameters(document: Node, operation: Node) -> dict[str, Node]:
    found = [follow(document, parameter) for parameter in operation.get("parameters", ())]
    return {f"{parameter['in']} {parameter['name']}": parameter for parameter in found}


def _content_changes(pair: Pair, old: Node, new: Node, where: str, side: Side) -> Iterator[Change]:
    for media, content in old.get("content", {}).items():
        if media not in new.get("content", {}):
            yield Change("breaking", where, f"media type {media} is gone")
        else:
            yield from schema_changes(pair, content["schema"], new["content"][media]["schema"], where, side, set())


def _frame_changes(pair: Pair, old: Node, new: Node, where: str) -> Iterator[Change]:
    before = {event["name"]: event["schema"] for event in old.get("x-sse-events", ())}
    after = {event["name"]: event["schema"] for event in new.get("x-sse-events", ())}
    for name, schema in before.items():
        if name not in after:
            yield Change("breaking", f"{where} frame {name}", "is gone")
        else:
            yield from schema_changes(pair, schema, after[name], f"{where} frame {name}", "response", set())
    yield from (Change("additive", f"{where} frame {name}", "is new") for name in after if name not in before)


def changes(old: Node, new: Node) -> list[Change]:
    """Everything that a client could notice."""
    pair, found = Pair(old, new), []
    for path in sorted({*old["paths"], *new["paths"]}):
        for method in METHODS:
            before, after = (side["paths"].get(path, {}).get(method) for side in (old, new))
            where = f"{method.upper()} {path}"
            if before and after:
                found += operation_changes(pair, before, after, where)
            elif before or after:
                found.append(Change("breaking" if before else "additive", where, "is gone" if before else "is new"))
    return list(dict.fromkeys(found))


def verdict(old: Node, new: Node) -> str | None:
    """What is wrong with the new version number; None when it follows from the changes."""
    kinds = {change.kind for change in changes(old, new)}
    before, after = ([int(part) for part in doc["info"]["version"].split(".")] for doc in (old, new))
    if "breaking" in kinds and after[0] <= before[0]:
        return f"breaking changes ask for version {before[0] + 1}.0.0 or later, not {new['info']['version']}"
    if "additive" in kinds and after[:2] <= before[:2]:
        return f"additions ask for version {before[0]}.{before[1] + 1}.0 or later, not {new['info']['version']}"
    return None if after >= before else f"the version went back from {old['info']['version']}"


def released(name: str) -> Node:
    """The document at the last release; an empty one where it is new since then."""
    path = RELEASED / f"{name}.json"
    document: Node = json.loads((path if path.exists() else RELEASED / f"{DOCUMENTS[0]}.json").read_text())
    return document if path.exists() else {"info": document["info"], "paths": {}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="store_true", help="make the present documents the released ones")
    release = parser.parse_args().release
    wrong = False
    for name in DOCUMENTS:
        source = CURRENT / f"{name}.json"
        old, new = released(name), json.loads(source.read_text())
        for change in changes(old, new):
            print(f"{name}: {change.kind}: {change.where}: {change.what}")
        problem = verdict(old, new)
        if problem:
            print(f"{name}: {problem}", file=sys.stderr)
            wrong = True
        elif release:
            (RELEASED / source.name).write_text(source.read_text())
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
