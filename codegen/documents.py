"""Reads the OpenAPI documents: bundles each (external `$ref`s become local) and checks that they make one API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

METHODS = ("get", "put", "post", "delete", "patch")

Node = dict[str, Any]


class ContractError(Exception):
    """The documents contradict each other or use what the generator does not understand."""


def read_yaml(path: Path) -> Any:
    return yaml.load(path.read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


class _Bundle:
    """One document on its way to being whole. Names stay; a name that two files define is an error, because tools
    resolve such a clash silently and differently."""

    def __init__(self, path: Path) -> None:
        self.root_path = path.resolve()
        self.files: dict[Path, Node] = {}
        self.root: Node = self._file(self.root_path)
        self.components: Node = {kind: {} for kind in self.root.get("components", {})}
        self.owners: dict[tuple[str, str], Path] = {}

    def _file(self, path: Path) -> Node:
        if path not in self.files:
            self.files[path] = read_yaml(path)
        return self.files[path]

    def run(self) -> Node:
        bundled = {key: self.visit(value, self.root_path) for key, value in self.root.items() if key != "components"}
        for kind, items in self.root.get("components", {}).items():
            for name in items:
                self.take(kind, name, self.root_path)
        bundled["components"] = self.components
        return bundled

    def visit(self, node: Any, here: Path) -> Any:
        if isinstance(node, list):
            return [self.visit(item, here) for item in node]
        if not isinstance(node, dict):
            return node
        ref = node.get("$ref")
        if not isinstance(ref, str):
            return {str(key): self.visit(value, here) for key, value in node.items()}
        file, _, pointer = ref.partition("#")
        parts = pointer.strip("/").split("/")
        if len(parts) != 3 or parts[0] != "components":
            raise ContractError(f"{here.name}: a $ref must look like FILE#/components/KIND/NAME, not {ref}")
        self.take(parts[1], parts[2], (here.parent / file).resolve() if file else here)
        return {"$ref": f"#/components/{parts[1]}/{parts[2]}"}

    def take(self, kind: str, name: str, owner: Path) -> None:
        first = self.owners.setdefault((kind, name), owner)
        if name in self.components.setdefault(kind, {}):
            source = self._file(owner).get("components", {}).get(kind, {}).get(name)
            if first != owner and source != {"$ref": f"{first.name}#/components/{kind}/{name}"}:
                raise ContractError(f"components/{kind}/{name} is defined in {first.name} and in {owner.name}")
            return
        try:
            value = self._file(owner)["components"][kind][name]
        except KeyError:
            raise ContractError(f"{owner.name} has no components/{kind}/{name}") from None
        while set(value) == {"$ref"}:  # a component that only re-exports another file's, as security schemes must
            file, _, pointer = value["$ref"].partition("#")
            owner = (owner.parent / file).resolve()
            self.owners[kind, name] = owner
            value = self._file(owner)["components"][kind][pointer.rsplit("/", 1)[1]]
        self.components[kind][name] = None  # reserved: a recursive schema meets itself here
        self.components[kind][name] = self.visit(value, owner)


def bundle(path: Path) -> Node:
    """The document at `path` with every external reference copied in under its own name."""
    return _Bundle(path).run()


def resolve(document: Node, node: Node) -> Node:
    """Follow local `$ref`s until something else comes."""
    while "$ref" in node:
        target: Any = document
        for part in node["$ref"][2:].split("/"):
            target = target[part]
        node = target
    return node


def check_together(documents: dict[str, Node]) -> None:
    """One path and method, one operationId and one meaning per component name over all documents."""
    seen: dict[str, str] = {}
    components: dict[tuple[str, str], Any] = {}
    versions = {document["info"]["version"] for document in documents.values()}
    if len(versions) != 1:
        raise ContractError(f"info.version differs between the documents: {sorted(versions)}")
    for name, document in documents.items():
        for path, item in document["paths"].items():
            for method in METHODS:
                if method not in item:
                    continue
                for key in (f"{method} {path}", item[method]["operationId"]):
                    if key in seen:
                        raise ContractError(f"{key} is in {seen[key]} and in {name}")
                    seen[key] = name
        for kind, items in document.get("components", {}).items():
            for key, value in items.items():
                if components.setdefault((kind, key), value) != value:
                    raise ContractError(f"components/{kind}/{key} differs between the documents")
