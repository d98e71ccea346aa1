"""Every path with every method: who may call it, what it takes, and what reaches the service."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import MutableMapping
from typing import Any

import pytest

from llama_orch.api.app import build_app
from llama_orch.contract.models import TaskState
from llama_orch.contract.operations import ALLOW, OPERATIONS, Operation
from llama_orch.testing.loop import run

from .catalog_fake import CLOSED_SOURCE, FULL_DISK_MODEL, KNOWN_MODEL, SERVED_MODEL
from .harness import OPEN_METRICS, SETTINGS, Answer, Server, serving
from .service_fake import ENDING_TASK, SLOW_MODEL, SPARE_POOL, UNWANTED_MODEL, FakeService
from .test_bad_input import assert_envelope, body_for

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
OPEN_PATHS = {operation.path for operation in OPERATIONS.values() if operation.is_open}


def a_target(path: str) -> str:
    known = {"/v1/pools": SPARE_POOL, "/v1/models": SPARE_POOL, "/v1/catalog": KNOWN_MODEL}
    return path.replace("{id}", next((name for start, name in known.items() if path.startswith(start)), ENDING_TASK))


@pytest.mark.spec("HP-SEC-3")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ALLOW)
def test_every_route_without_a_token(server: Server, path: str, method: str) -> None:
    """Only /healthz answers without the token; a method that a path does not take is 405 with all those that it
    takes."""
    answer = server.call(method, a_target(path), [("Authorization", b"")])
    assert answer.correlation_id
    if method not in ALLOW[path].split(", "):
        assert answer.http_status == 405
        assert answer.headers["Allow"] == ALLOW[path]
    elif path in OPEN_PATHS:
        assert answer.http_status == 200
    else:
        assert answer.http_status == 401
    if method == "HEAD":
        assert answer.body == b""


def test_only_the_health_check_is_open() -> None:
    """The contract opens exactly one operation."""
    assert list(OPEN_PATHS) == ["/healthz"]


@pytest.mark.spec("HP-SEC-3")
def test_metrics_can_be_opened_and_nothing_else_with_them() -> None:
    """`metrics.require_token: false` lets scrapers in without a token, to /metrics alone."""
    no_token = [("Authorization", b"")]
    with serving(OPEN_METRICS) as server:
        statuses = {path: server.call("GET", a_target(path), no_token).http_status for path in ALLOW}
    assert {path for path, status in statuses.items() if status == 200} == {"/metrics", "/healthz"}


@pytest.mark.spec("HP-OBS-1")
def test_metrics_are_prometheus_text(checking_server: Server) -> None:
    """The service's bytes, with the content type of the format."""
    answer = checking_server.call("GET", "/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.body == checking_server.service.metrics_text()


@pytest.mark.parametrize("op", OPERATIONS.values(), ids=OPERATIONS)
def test_every_operation_succeeds_as_the_contract_says(checking_server: Server, op: Operation) -> None:
    """Each operation reaches its handler and answers with its success status and a valid body."""
    checking_server.service.catalog.restore()
    answer = checking_server.call(op.method, a_target(op.path), body=body_for(op))
    assert answer.http_status in [status for status in op.statuses if status < 300]
    assert answer.correlation_id


@pytest.mark.parametrize("path", [path for path, allow in ALLOW.items() if "HEAD" in allow])
def test_head_is_get_without_a_body(server: Server, path: str) -> None:
    """HEAD gives the status and the content type of GET, and not one byte more."""
    get, head = server.call("GET", a_target(path)), server.call("HEAD", a_target(path))
    assert head.http_status == get.http_status == 200
    assert head.headers["Content-Type"] == get.headers["Content-Type"]
    assert head.body == b""


def test_head_has_no_body_behind_any_server() -> None:
    """The edge itself leaves the body out: not every ASGI server does."""
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    scope = {"type": "http", "http_version": "1.1", "method": "HEAD", "path": "/openapi/data.json", "query_string": b""}
    app = build_app(FakeService(), token="x", settings=SETTINGS)
    run(call(app, {**scope, "headers": [(b"host", b"localhost")]}, receive, send))
    start, body = sent
    assert start["status"] == 200
    assert body["body"] == b""


async def call(app: Any, *arguments: Any) -> None:
    await app(*arguments)


def test_defaults_and_conversions_of_a_list(server: Server) -> None:
    """Query parameters arrive as the contract's types, with its defaults; UUIDs in lower case."""
    session = str(uuid.uuid4())
    server.call("GET", "/v1/tasks")
    server.call("GET", f"/v1/tasks?state=queued&session_id={session.upper()}&limit=3&cursor=a%20b")
    default, given = server.service.listed[-2:]
    assert default == {"state": None, "session_id": None, "limit": 50, "cursor": None}
    assert given == {"state": TaskState.QUEUED, "session_id": session, "limit": 3, "cursor": "a b"}


def test_uuids_in_paths_are_looked_up_in_lower_case(server: Server) -> None:
    """A UUID is the same in either case."""
    task_id = str(uuid.uuid4())
    assert server.call("POST", f"/v1/tasks/{task_id.upper()}/cancel").http_status == 204
    assert server.service.canceled[-1] == task_id
    assert server.call("GET", f"/v1/tasks/{ENDING_TASK.upper()}").json["task_id"] == ENDING_TASK


@pytest.mark.spec("HP-ERR-1")
def test_a_refusal_of_the_service_is_passed_on(server: Server) -> None:
    """What the service raises becomes the answer as it is."""
    answer = server.call("GET", f"/v1/tasks/{uuid.uuid4()}")
    assert answer.http_status == 404
    assert assert_envelope(answer, "NOT_FOUND").message == "no such task"


MODEL = {"id": "story", "source_url": "builtin:tiny"}


def enter(server: Server, **changes: Any) -> Answer:
    return server.call("POST", "/v1/catalog/models", body=json.dumps(MODEL | changes).encode())


@pytest.mark.spec("HP-CTL-1")
def test_a_model_is_entered_once() -> None:
    """201, the same again 200, another one under its id 409; with all that was declared, and null where nothing was."""
    signature = {"signer": "a", "digest": f"sha256:{'b' * 64}", "signature": "c2ln"}
    with serving(validate_responses=True) as server:
        answers = [enter(server, signatures=[signature]), enter(server, signatures=[signature]), enter(server)]
        read = server.call("GET", "/v1/catalog/models/story")
    assert [answer.http_status for answer in answers] == [201, 200, 409]
    assert answers[0].json == answers[1].json == read.json
    assert (read.json["signatures"], read.json["sbom"], read.json["digest"]) == ([signature], None, None)


@pytest.mark.spec("HP-CTL-1", "HP-CTL-3")
def test_what_a_model_is_told_reaches_the_catalog() -> None:
    """State with and without a deadline, verification, deletion; each refuses a model that is not there."""
    with serving(validate_responses=True) as server:
        enter(server)
        path = "/v1/catalog/models/story"
        retired = server.call("POST", f"{path}/state", body=b'{"state": "Retired", "deadline_ms": 5}')
        active = server.call("POST", f"{path}/state", body=b'{"state": "Active"}')
        begun = server.call("POST", f"{path}/verify")
        assert [retired.json["state"], active.json["state"], begun.json["state"]] == ["Retired", "Active", "queued"]
        assert server.service.catalog.deadlines_ms == [5, None]
        assert server.call("DELETE", path).http_status == 204
        gone = [server.call("DELETE", path), server.call("GET", path), server.call("POST", f"{path}/verify")]
        gone.append(server.call("POST", f"{path}/state", body=b'{"state": "Active"}'))
        assert [answer.http_status for answer in gone] == [404] * 4


@pytest.mark.spec("HP-CTL-1")
def test_refusals_of_the_catalog_are_passed_on() -> None:
    """What is not open 403, a full disk 507, what is served 409."""
    with serving(validate_responses=True) as server:
        assert_envelope(closed := enter(server, source_url=CLOSED_SOURCE), "POLICY_DENIED")
        assert_envelope(full := enter(server, id=FULL_DISK_MODEL), "STORAGE_UNAVAILABLE")
        enter(server, id=SERVED_MODEL)
        assert_envelope(served := server.call("DELETE", f"/v1/catalog/models/{SERVED_MODEL}"), "CONFLICT")
    assert [answer.http_status for answer in (closed, full, served)] == [403, 507, 409]


def change(server: Server, act: str, pool: str = SPARE_POOL, **body: Any) -> Answer:
    return server.call("POST", f"/v1/pools/{pool}/{act}", body=json.dumps(body).encode())


@pytest.mark.spec("HP-CTL-2")
def test_a_drain_is_accepted_with_the_pools_health() -> None:
    """202, every time: a second drain only brings another deadline. Zero is one too."""
    with serving(validate_responses=True) as server:
        for deadline_ms, state in ((30_000, "ready"), (0, "unloaded")):
            answer = change(server, "drain", deadline_ms=deadline_ms)
            assert answer.http_status == 202
            assert (answer.json["draining"], answer.json["replicas"][0]["state"]) == (True, state)
            assert answer.json == server.call("GET", f"/v1/pools/{SPARE_POOL}/health").json
        assert server.service.pools[SPARE_POOL].deadlines_ms == [30_000, 0]
        assert server.service.pools["default"].deadlines_ms == []


@pytest.mark.spec("HP-CTL-2")
def test_a_reload_is_accepted_while_it_runs_alone() -> None:
    """202 with the health, also after a drain; 409 until the reload that runs has ended."""
    with serving(validate_responses=True) as server:
        change(server, "drain", deadline_ms=0)
        begun = change(server, "reload", new_model_ref=SLOW_MODEL)
        assert (begun.http_status, begun.json["last_reload"]) == (202, "loading builtin:slow beside builtin:tiny")
        refused = change(server, "reload", new_model_ref="builtin:next")
        assert refused.http_status == 409
        assert SLOW_MODEL in assert_envelope(refused, "CONFLICT").message
        server.service.pools[SPARE_POOL].loaded()
        ended = change(server, "reload", new_model_ref="builtin:next")
        assert (ended.http_status, ended.json["last_reload"]) == (202, "done: builtin:next instead of builtin:slow")
        assert (ended.json["ready"], ended.json["draining"]) == (True, False)


@pytest.mark.spec("HP-CTL-2", "HP-ERR-2")
def test_a_reload_that_can_come_later_says_when(checking_server: Server) -> None:
    """503 names the wait, as everywhere."""
    answer = change(checking_server, "reload", new_model_ref=UNWANTED_MODEL)
    assert answer.http_status == 503
    assert_envelope(answer, "POOL_UNAVAILABLE")
    assert (answer.headers["Retry-After"], answer.headers["X-Backoff-Ms"]) == ("2", "1200")


@pytest.mark.spec("HP-SEC-8")
@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:1",
        "127.0.0.1:8080",
        "127.1.2.3",
        "[::1]",
        "[::1]:9",
        "workstation.lan:80",
        "WORKSTATION.LAN",
    ],
)
def test_hosts_that_are_ours(server: Server, host: str) -> None:
    """Loopback's names and the configured ones are served, on any port."""
    assert server.call("GET", "/v1/pools", [("Host", host.encode())]).http_status == 200


@pytest.mark.spec("HP-SEC-8")
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:8080",
        "127.0.0.1.evil.example",
        "workstation.lan.evil.example",
        "localhost:80@evil.example",
        "localhost, evil.example",
        "128.0.0.1",
        "[::2]",
        "2130706433",
        "127.1",
        "local\xffhost",
    ],
)
def test_hosts_that_are_not_ours(server: Server, host: str) -> None:
    """A rebound name is refused on every path, documents too, with what to configure."""
    for target in ("/v1/pools", "/openapi/data.json", "/ui/", "/healthz", "/nothing"):
        answer = server.call("GET", target, [("Host", host.encode("latin-1"))])
        assert answer.http_status == 403
        assert "server.allowed_hosts" in assert_envelope(answer, "FORBIDDEN").message


@pytest.mark.spec("HP-SEC-8")
def test_no_cors_and_no_cookies(server: Server) -> None:
    """A foreign origin gets nothing that would let its page read an answer, preflight included."""
    for method in ("GET", "OPTIONS"):
        origin = [("Origin", b"http://evil.example"), ("Access-Control-Request-Method", b"GET")]
        answer = server.call(method, "/v1/pools", origin)
        names = " ".join(answer.headers).lower()
        assert not re.search("access-control|set-cookie", names)
