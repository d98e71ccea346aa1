"""The house rules of openapi/: what every operation, answer and schema has, and that every example is right.

python tools/lint_contract.py    prints what is wrong; exit 1 when something is
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "codegen"))

from documents import METHODS, Node, bundle, read_yaml, resolve

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("data", "control", "openai")
CLAUSE = re.compile(r"^\*\*(HP-[A-Z]{3}-\d+)\*\* \(", re.MULTILINE)
INTEGERS = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}

Problems = Iterator[str]


def lint() -> list[str]:
    """Everything that is wrong with the contract as it is in this repository."""
    known = spec_ids()
    documents = {name: bundle(ROOT / "openapi" / f"{name}.yaml") for name in DOCUMENTS}
    tables = {
        path.name: read_yaml(path) for path in sorted((ROOT / "openapi").glob("*.yaml")) if path.stem not in DOCUMENTS
    }
    found = [f"{name}: {problem}" for name, node in documents.items() for problem in document_problems(node)]
    found += [
        f"{name}: {problem}" for name, node in (documents | tables).items() for problem in unknown_ids(node, known)
    ]
    return list(dict.fromkeys(found))


def spec_ids() -> set[str]:
    return set(CLAUSE.findall((ROOT / "SPEC.md").read_text()))


def document_problems(document: Node) -> Problems:
    for path, item in document["paths"].items():
        for method in METHODS:
            if method in item:
                where = f"{method.upper()} {path}"
                yield from (f"{where}: {text}" for text in operation_problems(document, path, item[method]))
    for kind in ("schemas", "parameters", "headers", "responses"):
        for name, node in document["components"].get(kind, {}).items():
            if not resolve(document, node).get("description"):
                yield f"components/{kind}/{name}: no description"


def operation_problems(document: Node, path: str, operation: Node) -> Problems:
    for key in ("operationId", "summary", "x-spec"):
        if not operation.get(key):
            yield f"no {key}"
    yield from (f"no {status}, {why}" for status, why in missing_statuses(document, path, operation))
    if not any(status.startswith("2") for status in operation["responses"]):
        yield "no success"
    for status, node in operation["responses"].items():
        yield from (f"{status}: {text}" for text in response_problems(document, status, resolve(document, node)))
    if body := operation.get("requestBody"):
        for media_type, media in resolve(document, body)["content"].items():
            yield from (f"request: {text}" for text in example_problems(document, media_type, media))


def missing_statuses(document: Node, path: str, operation: Node) -> Iterator[tuple[str, str]]:
    parameters = [resolve(document, node) for node in operation.get("parameters", [])]
    asked = {
        "401": ("it needs the token", operation.get("security", document.get("security")) != []),
        "400": ("it has parameters or a body", bool(parameters) or "requestBody" in operation),
        "404": ("it has an id", "{" in path and not operation.get("x-absent-is-success")),
        "413": ("it has a body", "requestBody" in operation),
        "415": ("it has a body", "requestBody" in operation),
    }
    for status, (why, is_asked) in asked.items():
        if is_asked and status not in operation["responses"]:
            yield status, f"though {why}"


def response_problems(document: Node, status: str, response: Node) -> Problems:
    needed = {"X-Correlation-Id"}
    needed |= {"401": {"WWW-Authenticate"}, "405": {"Allow"}}.get(status, set())
    needed |= {"Retry-After", "X-Backoff-Ms"} if status in ("429", "503") else set()
    for header in sorted(needed - set(response.get("headers", {}))):
        yield f"no header {header}"
    content = response.get("content", {})
    if not status.startswith(("2", "3")):
        schemas = {media_type: media.get("schema") for media_type, media in content.items()}
        envelope = "OpenAiError" if "OpenAiError" in document["components"]["schemas"] else "Error"
        if schemas != {"application/json": {"$ref": f"#/components/schemas/{envelope}"}}:
            yield "not the error envelope"
    for media_type, media in content.items():
        yield from example_problems(document, media_type, media)


def example_problems(document: Node, media_type: str, media: Node) -> Problems:
    """JSON must have an example; whatever has one must have a right one."""
    examples = [each["value"] for each in media.get("examples", {}).values()]
    examples += [media["example"]] if "example" in media else []
    if not examples and media_type == "application/json":
        yield "no example"
    for example in examples:
        error = next(iter(validator(document, media["schema"]).iter_errors(example)), None)
        if error is not None:
            yield f"a wrong example: {error}"


def validator(document: Node, schema: Node) -> jsonschema_rs.Draft4Validator:
    schemas = {name: as_json_schema(node) for name, node in document["components"]["schemas"].items()}
    whole = {**as_json_schema(schema), "components": {"schemas": schemas}}
    if "$ref" in whole:  # draft 4 reads nothing beside it
        whole = {"allOf": [{"$ref": whole.pop("$ref")}], **whole}
    return jsonschema_rs.Draft4Validator(whole, validate_formats=True)


def as_json_schema(node: Any) -> Any:
    """OpenAPI 3.0's own words in those of JSON Schema, draft 4: nullable, int32 and int64."""
    if isinstance(node, list):
        return [as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    schema = {
        key: {name: as_json_schema(value) for name, value in below.items()}
        if key == "properties"
        else as_json_schema(below)
        for key, below in node.items()
        if key not in ("example", "default")
    }
    if schema.get("format") in INTEGERS:
        low, high = INTEGERS[schema.pop("format")]
        schema["minimum"] = max(schema.get("minimum", low), low)
        schema["maximum"] = min(schema.get("maximum", high), high)
    if schema.pop("nullable", False) is True:
        schema["type"] = [schema["type"], "null"]
    return schema


def unknown_ids(node: Any, known: set[str], where: str = "") -> Problems:
    """Every `x-spec`, wherever it is, is a list of clauses that SPEC.md has."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from unknown_ids(item, known, f"{where}/{index}")
    elif isinstance(node, dict):
        if "x-spec" in node:
            ids = node["x-spec"]
            if not isinstance(ids, list) or not ids:
                yield f"{where}: x-spec must be a list of clauses"
            else:
                yield from (f"{where}: SPEC.md has no {one}" for one in ids if one not in known)
        for key, value in node.items():
            yield from unknown_ids(value, known, f"{where}/{key}")


def main() -> int:
    found = lint()
    print("\n".join(found) or "openapi/: nothing wrong")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
