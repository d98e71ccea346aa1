"""The types that check requests accept exactly what the published schema accepts."""

from __future__ import annotations

import copy
import json
import uuid
from typing import Any, NamedTuple

import jsonschema_rs
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_orch.api.documents import document_bytes
from llama_orch.contract.models import (
    Artifact,
    CatalogModelRequest,
    DrainRequest,
    ModelStateRequest,
    OpenAiChatRequest,
    OpenAiCompletionRequest,
    OpenAiEmbeddingRequest,
    ReloadRequest,
    TaskRequest,
)

RANGES = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}
UUID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
SCHEMAS = {
    name: schema
    for document in ("data.json", "control.json", "openai.json")
    for name, schema in json.loads(document_bytes(document))["components"]["schemas"].items()
}
FIELDS = sorted({name for schema in SCHEMAS.values() for name in schema.get("properties", {})})


def as_json_schema(node: Any) -> Any:
    """OpenAPI 3.0's own words in JSON Schema's: nullable, int32, int64."""
    if isinstance(node, list):
        return [as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    out: dict[str, Any] = {
        key: {name: as_json_schema(sub) for name, sub in value.items()}
        if key == "properties"
        else as_json_schema(value)
        for key, value in node.items()
        if key != "example"
    }
    if out.get("format") in RANGES:
        low, high = RANGES[out.pop("format")]
        out["minimum"], out["maximum"] = max(out.get("minimum", low), low), min(out.get("maximum", high), high)
    if out.pop("nullable", False):
        out["type"] = [out["type"], "null"]
    return out


def is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text.lower()
    except ValueError:
        return False


def validator(name: str) -> jsonschema_rs.Draft4Validator:
    return jsonschema_rs.Draft4Validator(
        {"$ref": f"#/components/schemas/{name}", "components": {"schemas": as_json_schema(SCHEMAS)}},
        validate_formats=True,
        formats={"uuid": is_uuid},  # draft 4 does not know it
    )


class Body(NamedTuple):
    """A type of bodies: one with every field, the fields that it cannot do without, and how often it is mutated."""

    type: Any
    full: dict[str, Any]
    required: tuple[str, ...]
    examples: int

    def is_accepted(self, body: Any) -> bool:
        try:
            msgspec.json.decode(json.dumps(body).encode(), type=self.type)
        except msgspec.ValidationError:
            return False
        return True


TASK = {
    "task_id": UUID,
    "session_id": None,
    "workload": "completion",
    "model_ref": "builtin:tiny",
    "engine": "llamacpp",
    "ctx": 512,
    "priority": "batch",
    "seed": 7,
    "determinism": "strict",
    "sampler_profile_version": "v1",
    "sampling": {"temperature": 0.5, "top_k": 4, "stop": ["\n"], "json_schema": {"type": "object"}, "grammar": "root"},
    "prompt": "Once",
    "inputs": ["a", "b"],
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 5,
    "deadline_ms": 1000,
    "expected_tokens": 3,
    "kv_hint": "reuse",
    "keep_transcript": False,
}
DIGEST = "sha256:" + "0a" * 32
MODEL = {
    "id": "story",
    "source_url": "builtin:tiny",
    "digest": DIGEST,
    "tags": ["small"],
    "manifests": [{"digest": DIGEST, "size_bytes": 7, "media_type": "a/b", "url": "https://example.org/m"}],
    "signatures": [{"signer": "somebody", "digest": DIGEST, "signature": "c2ln"}],
    "sbom": {"format": "SPDX", "url": "https://example.org/s", "digest": DIGEST, "model_digest": None},
}
CHAT = {
    "model": "default",
    "messages": [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "hi", "name": None},
        {"role": "assistant", "content": "", "refusal": None, "tool_calls": [], "annotations": [{}], "audio": {}},
    ],
    "max_completion_tokens": 5,
    "max_tokens": None,
    "response_format": {
        "type": "json_schema",
        "json_schema": {"name": "x", "description": "y", "schema": {"type": "object"}, "strict": True},
    },
    "temperature": 0.5,
    "top_p": 1,
    "seed": 7,
    "stop": ["\n"],
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "user": "me",
    "n": 1,
    "store": False,
    "metadata": {"a": "b"},
    "logprobs": False,
    "logit_bias": {"1": 0.5},
    "frequency_penalty": 0,
    "tools": [{"type": "function"}],
    "tool_choice": "none",
    "function_call": {"name": "x"},
    "modalities": ["text"],
    "prediction": {},
    "service_tier": "auto",
}
COMPLETION = {
    "model": "default",
    "prompt": ["Once"],
    "max_tokens": 5,
    "stop": "x",
    "best_of": 1,
    "echo": False,
    "suffix": "",
    "logprobs": 0,
    "stream_options": None,
}
EMBEDDING = {"model": "default", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8, "user": None}
ARTIFACT = {"kind": "plan", "content": {"a": [1]}, "tags": ["t"], "parent": "x", "metadata": {"m": None}}
BODIES = [
    Body(TaskRequest, TASK, ("model_ref",), examples=1000),
    Body(Artifact, ARTIFACT, ("kind", "content"), examples=500),
    Body(DrainRequest, {"deadline_ms": 30000}, ("deadline_ms",), examples=200),
    Body(CatalogModelRequest, MODEL, ("id", "source_url"), examples=500),
    Body(ModelStateRequest, {"state": "Retired", "deadline_ms": 30000}, ("state",), examples=200),
    Body(ReloadRequest, {"new_model_ref": "builtin:tiny"}, ("new_model_ref",), examples=200),
    Body(OpenAiChatRequest, CHAT, ("model", "messages"), examples=600),
    Body(OpenAiCompletionRequest, COMPLETION, ("model", "prompt"), examples=200),
    Body(OpenAiEmbeddingRequest, EMBEDDING, ("model", "input"), examples=200),
]
WRONG = {
    Artifact: [{"kind": "x"}, {"content": []}, {"tags": None}, {"tags": [""]}, {"tags": ["t"] * 65}, {"metadata": 1}],
    TaskRequest: [{"seed": 2**63}, {"task_id": "x"}, {"x": 1}, {"sampling": None}, {"kv_hint": "x"}],
    DrainRequest: [{"deadline_ms": -1}, {"deadline_ms": 604800001}, {"deadline_ms": None}, {"deadline": 1}],
    CatalogModelRequest: [{"id": "a/b"}, {"id": "a\n"}, {"digest": "sha256:"}, {"tags": None}, {"sbom": {}}],
    ModelStateRequest: [{"state": "retired"}, {"state": None}, {"deadline_ms": -1}, {"x": 1}],
    OpenAiChatRequest: [{"messages": []}, {"seed": -1}, {"stop": [""]}, {"stream": 1}, {"x": 1}, {"user": 1}],
    OpenAiCompletionRequest: [{"prompt": [1, 2]}, {"prompt": ["a", "b"]}, {"prompt": ""}, {"temperature": 2.5}],
    OpenAiEmbeddingRequest: [{"input": []}, {"input": [[1]]}, {"encoding_format": "int8"}],
    ReloadRequest: [{"new_model_ref": ""}, {"new_model_ref": "x" * 1025}, {"new_model_ref": 1}, {"model_ref": "x"}],
}

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**64), 2**64),
    st.sampled_from(
        [0, 1, -1, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 604800000, 604800001, 31536000000, 31536000001]
    ),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.text(max_size=5),
    st.sampled_from([UUID, UUID.upper(), UUID + "\n", UUID.replace("-", ""), "interactive", "reuse"]),
    st.sampled_from([0, 65, 257, 1024, 1025]).map("x".__mul__),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(FIELDS), st.text(max_size=3)), inner, max_size=3),
        st.fixed_dictionaries({"role": inner, "content": inner}),
    ),
    max_leaves=5,
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every path in a JSON value, its own included."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path] + [deeper for key, value in children for deeper in places(value, (*path, key))]


def mutate(body: Any, place: tuple[Any, ...], action: str, key: str, value: Any) -> Any:
    """Replace or remove what is at `place`, or add a key to it."""
    if not place:
        return {**body, key: value} if action == "add" and isinstance(body, dict) else value
    parent = body
    for step in place[:-1]:
        parent = parent[step]
    if action == "remove":
        del parent[place[-1]]
    elif action == "add" and isinstance(parent[place[-1]], dict):
        parent[place[-1]][key] = value
    else:
        parent[place[-1]] = value
    return body


@st.composite
def bodies(draw: st.DrawFn, kind: Body) -> Any:
    chosen = draw(st.sets(st.sampled_from(sorted(kind.full))))
    body: Any = copy.deepcopy({name: kind.full[name] for name in (*chosen, *kind.required)})
    for _ in range(draw(st.integers(0, 2))):
        place, action = draw(st.sampled_from(places(body))), draw(st.sampled_from(["replace", "remove", "add"]))
        key = draw(st.one_of(st.sampled_from(FIELDS), st.text(max_size=3)))
        body = mutate(body, place, action, key, draw(VALUES))
    return body


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.type.__name__)
def test_the_type_accepts_what_the_schema_accepts(kind: Body) -> None:
    """For hundreds of mutated bodies the generated type and the published schema agree."""
    judge = validator(kind.type.__name__)

    @settings(max_examples=kind.examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(bodies(kind))
    def they_agree(body: Any) -> None:
        assert kind.is_accepted(body) == judge.is_valid(body)

    they_agree()


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.type.__name__)
def test_the_comparison_can_fail(kind: Body) -> None:
    """The body that all mutations start from is valid for both, and one wrong value is not."""
    judge = validator(kind.type.__name__)
    assert kind.is_accepted(kind.full)
    assert judge.is_valid(kind.full)
    for wrong in WRONG[kind.type]:
        assert not kind.is_accepted({**kind.full, **wrong})
        assert not judge.is_valid({**kind.full, **wrong})
