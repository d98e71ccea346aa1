"""The documents in openapi/: valid, complete by the house rules, and what the running service serves, no more and no
less."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from openapi_spec_validator import validate
from prometheus_client.parser import text_string_to_metric_families

from documents import METHODS, bundle, read_yaml
from lint_contract import document_problems, lint, spec_ids, unknown_ids
from llama_orch.contract.operations import ALLOW
from tests.live.client import until
from tests.live_service import LiveService, live_service

ROOT = Path(__file__).resolve().parents[2]
OPENAPI = ROOT / "openapi"
DATA = bundle(OPENAPI / "data.yaml")
CONTROL = bundle(OPENAPI / "control.yaml")
OPENAI = bundle(OPENAPI / "openai.yaml")
UUID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
TIMEOUT_S = 60.0  # a call that hangs fails; nothing waits for it

# The service is started once per worker process, so these stay in one.
live = pytest.mark.xdist_group("live-contract")


# -- the documents by themselves -------------------------------------------------------------------------------------


@pytest.mark.spec("HP-ALN-1", "HP-DIS-2")
@pytest.mark.parametrize("name", ["common", "data", "control", "openai"])
def test_a_document_is_valid(name: str) -> None:
    """Each is valid OpenAPI 3.0.3 with all its references, under one version."""
    path = OPENAPI / f"{name}.yaml"
    document = read_yaml(path)
    validate(document, base_uri=path.as_uri())
    assert document["openapi"] == "3.0.3"
    assert document["info"]["version"] == DATA["info"]["version"]


@pytest.mark.spec("HP-ALN-3")
def test_the_configuration_schema_is_valid() -> None:
    """It is valid JSON Schema, an empty file is valid by it, and no object takes unknown keys."""
    schema = read_yaml(OPENAPI / "config.schema.yaml")
    jsonschema_rs.meta.validate(schema)
    validator = jsonschema_rs.validator_for(schema)
    assert validator.is_valid({})
    assert not validator.is_valid({"servers": {}})
    assert [path for path, node in objects(schema) if "properties" in node and node["additionalProperties"]] == []


def objects(node: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if node.get("type") == "object":
            yield path, node
        for key, value in node.items():
            yield from objects(value, f"{path}/{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from objects(value, f"{path}/{index}")


@pytest.mark.spec("HP-ALN-1", "HP-ERR-1", "HP-SEC-2", "HP-ERR-2")
def test_the_house_rules_hold() -> None:
    """Envelope, correlation ID, waits, statuses, examples, descriptions and clauses: see tools/lint_contract.py."""
    assert lint() == []


def without(*path: str) -> Any:
    def change(document: dict[str, Any]) -> None:
        node = document
        for step in path[:-1]:
            node = node[step]
        del node[path[-1]]

    return change


def with_value(value: Any, *path: str) -> Any:
    def change(document: dict[str, Any]) -> None:
        node = document
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value

    return change


POST = ("paths", "/v1/tasks", "post")
SEEDED = {
    "no summary": without(*POST, "summary"),
    "no x-spec": without(*POST, "x-spec"),
    "no 401": without(*POST, "responses", "401"),
    "no 400": without(*POST, "responses", "400"),
    "no 415": without(*POST, "responses", "415"),
    "no 404": without("paths", "/v1/tasks/{id}", "get", "responses", "404"),
    "no example": without(*POST, "responses", "202", "content", "application/json", "example"),
    "request: no example": without(*POST, "requestBody", "content", "application/json", "examples"),
    "202: a wrong example": with_value(
        None, *POST, "responses", "202", "content", "application/json", "example", "seed"
    ),
    "request: a wrong example": with_value(
        {"value": {"model_ref": "x", "max_tokens": 2**31}},
        *(*POST, "requestBody", "content", "application/json", "examples", "story"),
    ),
    "no header X-Correlation-Id": without("components", "responses", "Error", "headers", "X-Correlation-Id"),
    "no header Retry-After": without("components", "responses", "Backpressure", "headers", "Retry-After"),
    "no header WWW-Authenticate": without("components", "responses", "Unauthorized", "headers", "WWW-Authenticate"),
    "not the error envelope": with_value(
        {"type": "object"}, "components", "responses", "Error", "content", "application/json", "schema"
    ),
    "no description": without("components", "schemas", "TaskRequest", "description"),
}


@pytest.mark.spec("HP-ALN-1")
@pytest.mark.parametrize("problem", SEEDED)
def test_the_lint_sees_a_seeded_defect(problem: str) -> None:
    """A document that breaks one rule is reported, in that rule's words."""
    document = copy.deepcopy(DATA)
    SEEDED[problem](document)
    assert any(problem in found for found in document_problems(document))


@pytest.mark.spec("HP-ALN-1")
def test_the_lint_sees_an_unknown_clause() -> None:
    """An `x-spec` that SPEC.md does not have is reported with its place."""
    (found,) = unknown_ids({"a": [{"x-spec": ["HP-SEC-2", "HP-SEC-99"]}]}, spec_ids())
    assert "/a/0" in found
    assert "HP-SEC-99" in found


@pytest.mark.spec("HP-ALN-1")
def test_allow_is_what_the_documents_say() -> None:
    """The router's table has every path of the documents with its methods, and no other."""
    documented: dict[str, set[str]] = {}
    for document in (DATA, CONTROL, OPENAI):
        for path, item in document["paths"].items():
            documented[path] = {method.upper() for method in METHODS if method in item}
            documented[path] |= {"HEAD"} if "get" in item else set()
    assert {path: set(allow.split(", ")) for path, allow in ALLOW.items()} == documented


# -- the documents and the running service ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    """One real pool, and a simulated one that has one slot and no queue, on a device that stands for a card."""
    file = tmp_path_factory.mktemp("model") / "simulated.gguf"
    file.touch()
    full = {"id": "full", "engine": "simulated", "model": f"file:{file}", "slots": 1, "queue": {"capacity": 0}}
    card = {"id": "card", "backend": "simulated", "vram_bytes": 24 << 30}
    with live_service({"devices": [card], "pools": [{"id": "default", "max_tokens": 4}, full]}) as running:
        yield running


@pytest.fixture
def client(service: LiveService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, headers=service.headers, timeout=TIMEOUT_S) as client:
        yield client


@live
@pytest.mark.spec("HP-DIS-1", "HP-SEC-2", "HP-ERR-4")
@pytest.mark.parametrize("path", ALLOW)
def test_a_documented_path_is_served(client: httpx.Client, path: str) -> None:
    """The running service knows the path, with exactly the documented methods."""
    answer = client.request("PATCH", path.replace("{id}", UUID))
    assert (answer.status_code, answer.headers["Allow"]) == (405, ALLOW[path])
    body = answer.json()
    assert (body["error"] if path in OPENAI["paths"] else body)["code"] == "METHOD_NOT_ALLOWED"


@live
@pytest.mark.spec("HP-DIS-1", "HP-SEC-2", "HP-ERR-4")
@pytest.mark.parametrize(
    "path",
    [
        *("/", "/v1", "/v1/", "/v1/tasks/", "/v1/replicasets", f"/v1/tasks/{UUID}/", f"/v1/tasks/{UUID}/frames"),
        *("/v1/task", "/v2/tasks", "/docs", "/openapi.json", "/openapi.yaml", "/swagger.json", "/metrics/", "/static"),
    ],
)
def test_nothing_else_is_served(client: httpx.Client, path: str) -> None:
    """A path that no document has is 404, the envelope and the correlation ID included."""
    answer = client.get(path, headers={"X-Correlation-Id": "nothing-there"})
    assert (answer.status_code, answer.json()["code"]) == (404, "NOT_FOUND")
    assert answer.headers["X-Correlation-Id"] == answer.json()["correlation_id"] == "nothing-there"


def submit(client: httpx.Client, **body: Any) -> str:
    answer = client.post("/v1/tasks", json={"model_ref": "builtin:tiny", **body})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def last_frame(client: httpx.Client, task_id: str) -> str:
    """The name of the stream's last frame, read to its end."""
    frames = client.get(f"/v1/tasks/{task_id}/stream").text
    return [line.removeprefix("event: ") for line in frames.splitlines() if line.startswith("event: ")][-1]


def run_one_of_each(client: httpx.Client, service: LiveService) -> None:
    """Every form of prompt, both priorities, a refusal, a wait, a cancel, a wait that was predicted, a reload, a
    decision about a request to elsewhere, a verification, and the loss of a worker."""
    until(lambda: all(pool["ready"] for pool in client.get("/v1/pools").json()["items"]))
    full = client.get("/v1/pools/full").json()["model"]
    for body in (
        {"prompt": "Once"},
        {"inputs": ["Once", "Twice"], "priority": "batch"},
        {"messages": [{"role": "user", "content": "Hello"}], "determinism": "best_effort"},
    ):
        assert last_frame(client, submit(client, **body)) == "end"
    assert client.post("/v1/tasks", json={"model_ref": "builtin:none", "prompt": "x"}).status_code == 404
    long_task = submit(client, model_ref=full, prompt="x", max_tokens=2000)
    assert client.post("/v1/tasks", json={"model_ref": full, "prompt": "x"}).status_code == 429
    with client.stream("GET", f"/v1/tasks/{long_task}/stream") as stream:
        next(line for line in stream.iter_lines() if line == "event: token")
    assert client.post(f"/v1/tasks/{long_task}/cancel").status_code == 204
    assert last_frame(client, long_task) == "error"
    running, waiting = (submit(client, prompt="Once upon a time", max_tokens=1000) for _ in range(2))
    assert [last_frame(client, task_id) for task_id in (running, waiting)] == ["end", "end"]
    assert client.post("/v1/pools/full/reload", json={"new_model_ref": full}).status_code == 202
    until(lambda: client.get("/v1/pools/full/health").json()["last_reload"].startswith("done: "))
    until(lambda: "replica_evictions_total{" in client.get("/metrics").text)
    assert client.post("/v1/catalog/models", json={"id": "m", "source_url": "builtin:tiny"}).status_code == 201
    assert client.post("/v1/catalog/models/m/verify").status_code == 202
    until(lambda: client.get("/v1/catalog/models/m").json()["verification"]["state"] == "done")
    assert client.post("/v1/policy/outbound/check", json={"url": "http://127.0.0.1/"}).json()["allowed"] is False
    workers = children(service.pid)
    several = [submit(client, prompt="Once upon a time", max_tokens=2000) for _ in range(6)]  # one of them runs
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    assert "error" in [last_frame(client, task_id) for task_id in several]


def children(pid: int) -> list[int]:
    """Processes whose parent it is."""
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    fields = [(int(text.split()[0]), int(text.rpartition(")")[2].split()[1])) for text in stats]
    return [child for child, parent in fields if parent == pid]


@live
@pytest.mark.spec("HP-OBS-1", "HP-OBS-2", "HP-OBS-3", "HP-OBS-6")
def test_a_scrape_is_what_the_table_says(client: httpx.Client, service: LiveService) -> None:
    """After one task of each kind every metric of metrics.yaml is there with its type and labels, and no other."""
    run_one_of_each(client, service)
    scraped = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {frozenset(sample.labels) - {"le"} for sample in family.samples}
        scraped[name] = (family.type, labels, family.documentation)
    table = read_yaml(OPENAPI / "metrics.yaml")["metrics"]
    assert scraped == {one["name"]: (one["type"], {frozenset(one["labels"])}, one["help"]) for one in table}
