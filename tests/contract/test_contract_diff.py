"""The breaking-change check: every kind of change gets the right name, and the version must follow."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from tools.contract_diff import CURRENT, DOCUMENTS, changes, released, verdict

Edit = Callable[[dict[str, Any]], None]


def document() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((CURRENT / "data.json").read_text())
    return loaded


def schema(doc: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = doc["components"]["schemas"][name]
    return found


def task_post(doc: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = doc["paths"]["/v1/tasks"]["post"]
    return found


BREAKING: dict[str, Edit] = {
    "an operation is gone": lambda d: d["paths"].pop("/v1/tasks/{id}/cancel"),
    "a request field is gone": lambda d: schema(d, "TaskRequest")["properties"].pop("ctx"),
    "a request field is required": lambda d: schema(d, "TaskRequest")["required"].append("seed"),
    "a request enum is narrower": lambda d: schema(d, "Priority")["enum"].remove("batch"),
    "a request bound is tighter": lambda d: schema(d, "TaskRequest")["properties"]["max_tokens"].update(maximum=10),
    "a request field takes no null": lambda d: schema(d, "TaskRequest")["properties"]["ctx"].pop("nullable"),
    "a response field is gone": lambda d: schema(d, "AdmissionResponse")["properties"].pop("seed"),
    "a response field is optional": lambda d: schema(d, "AdmissionResponse")["required"].remove("seed"),
    "a response field may be null": lambda d: schema(d, "AdmissionResponse")["properties"]["seed"].update(
        nullable=True
    ),
    "a response type differs": lambda d: schema(d, "AdmissionResponse")["properties"]["seed"].update(type="string"),
    "a frame is gone": lambda d: d["paths"]["/v1/tasks/{id}/stream"]["get"]["x-sse-events"].pop(),
    "a frame's field is gone": lambda d: schema(d, "TokenFrame")["properties"].pop("i"),
    "a status is gone": lambda d: task_post(d)["responses"].pop("429"),
    "a header is gone": lambda d: task_post(d)["responses"]["202"]["headers"].clear(),
    "a parameter is gone": lambda d: d["paths"]["/v1/tasks"]["get"]["parameters"].pop(1),
}
ADDITIVE: dict[str, Edit] = {
    "an operation is new": lambda d: d["paths"].update({"/v1/new": copy.deepcopy(d["paths"]["/v1/tasks"])}),
    "an optional request field is new": lambda d: schema(d, "TaskRequest")["properties"].update(x={"type": "string"}),
    "a response field is new": lambda d: schema(d, "TaskStatus")["properties"].update(x={"type": "string"}),
    "a request bound is looser": lambda d: schema(d, "TaskRequest")["properties"]["model_ref"].update(maxLength=9999),
    "an error code is new": lambda d: schema(d, "ErrorCode")["enum"].append("NEW_CODE"),
    "a status is new": lambda d: task_post(d)["responses"].update({"418": task_post(d)["responses"]["400"]}),
    "a token is no longer needed": lambda d: task_post(d).update(security=[]),
}


@pytest.mark.spec("HP-DIS-2")
@pytest.mark.parametrize("name", BREAKING)
def test_breaking_changes_ask_for_a_major_version(name: str) -> None:
    """A client that worked would fail: only a new major version may do that."""
    old, new = document(), document()
    BREAKING[name](new)
    assert "breaking" in {change.kind for change in changes(old, new)}
    assert "breaking changes ask for version 3.0.0" in (
        verdict({**old, "info": {"version": "2.1.0"}}, _as(new, "2.2.0")) or ""
    )
    assert verdict({**old, "info": {"version": "2.1.0"}}, _as(new, "3.0.0")) is None


@pytest.mark.spec("HP-DIS-2")
@pytest.mark.parametrize("name", ADDITIVE)
def test_additions_ask_for_a_minor_version(name: str) -> None:
    """Nothing that worked fails, but there is more: a new minor version."""
    old, new = _as(document(), "2.1.0"), document()
    ADDITIVE[name](new)
    assert {change.kind for change in changes(old, new)} == {"additive"}
    assert "additions ask for version 2.2.0" in (verdict(old, _as(new, "2.1.1")) or "")
    assert verdict(old, _as(new, "2.2.0")) is None


def test_prose_asks_for_nothing() -> None:
    """Descriptions and examples are no change that a client could notice."""
    old, new = document(), document()
    schema(new, "TaskRequest")["description"] = "other words"
    task_post(new)["summary"] = "other words"
    assert changes(old, new) == []
    assert verdict(old, new) is None
    assert "went back" in (verdict(_as(old, "2.1.0"), _as(new, "2.0.9")) or "")


@pytest.mark.spec("HP-DIS-2")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_version_follows_from_what_changed_since_the_release(name: str) -> None:
    """The present documents against the released ones."""
    new = json.loads((CURRENT / f"{name}.json").read_text())
    old = released(name)
    assert verdict(old, new) is None, "\n".join(map(str, changes(old, new)))


def _as(doc: dict[str, Any], version: str) -> dict[str, Any]:
    return {**doc, "info": {**doc["info"], "version": version}}
