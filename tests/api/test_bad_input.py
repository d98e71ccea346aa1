"""What a hostile or clumsy client can send, over a real socket: the status, the envelope and the correlation ID each
time."""

from __future__ import annotations

import json
import socket
import uuid
from contextlib import closing, suppress
from typing import Any, NamedTuple

import msgspec
import pytest
from msgspec import structs

from llama_orch.api import protocol
from llama_orch.api.auth import identity
from llama_orch.api.validation import read_body
from llama_orch.contract.codes import CODES
from llama_orch.contract.models import (
    Artifact,
    CatalogModelRequest,
    DrainRequest,
    Error,
    FetchRequest,
    ModelStateRequest,
    OpenAiChatRequest,
    OpenAiCompletionRequest,
    OpenAiEmbeddingRequest,
    OutboundCheck,
    ReloadRequest,
    TaskRequest,
)
from llama_orch.contract.operations import Operation
from llama_orch.errors import InvalidParams
from llama_orch.testing.loop import run

from .catalog_fake import KNOWN_MODEL
from .harness import BEARER, MAX_BODY_BYTES, SETTINGS, Answer, HeaderList, Server, serving
from .service_fake import ABSENT_MODEL, CRASHING_MODEL, ENDING_TASK, FULL_QUEUE, MISSHAPEN_POOL, SECRET, SPARE_POOL

TASK = {"model_ref": "builtin:tiny", "prompt": "Once"}
DRAIN = {"deadline_ms": 30_000}
RELOAD = {"new_model_ref": "builtin:tiny"}
MODEL = {"id": "bad-input", "source_url": "builtin:tiny"}
MODEL_STATE = {"state": "Active"}
ARTIFACT = {"kind": "plan", "content": {"a": 1}}
URL = {"url": "https://example.com/"}
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Once"}]}
GOOD_BODIES = {
    TaskRequest: TASK,
    Artifact: ARTIFACT,
    DrainRequest: DRAIN,
    ReloadRequest: RELOAD,
    CatalogModelRequest: MODEL,
    ModelStateRequest: MODEL_STATE,
    OutboundCheck: URL,
    FetchRequest: URL,
    OpenAiChatRequest: CHAT,
    OpenAiCompletionRequest: {"model": "default", "prompt": "Once"},
    OpenAiEmbeddingRequest: {"model": "default", "input": ["Once", "Twice"]},
}
CID = "test-of-bad-input"


def body_of(**changes: Any) -> bytes:
    return json.dumps({**TASK, **changes}).encode()


def model_of(**changes: Any) -> bytes:
    return json.dumps(MODEL | changes).encode()


def body_for(operation: Operation) -> bytes | None:
    """One that the operation takes."""
    return json.dumps(GOOD_BODIES[operation.body]).encode() if operation.body else None


def chunked(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (*parts, b""))


class Case(NamedTuple):
    """One request and the status and code that it must get; no code for success."""

    name: str
    http_status: int
    code: str | None
    method: str = "POST"
    target: str = "/v1/tasks"
    headers: tuple[tuple[str, bytes], ...] = ()
    body: bytes | None = None
    says: str = ""


CHUNKED = (("Content-Length", b""), ("Transfer-Encoding", b"chunked"))
BIG = b" " * MAX_BODY_BYTES
GET = ("GET", "/v1/capabilities")
DRAINING = ("POST", f"/v1/pools/{SPARE_POOL}/drain")
STATING = ("POST", f"/v1/catalog/models/{KNOWN_MODEL}/state")
ENTERING = ("POST", "/v1/catalog/models")
RELOADING = ("POST", f"/v1/pools/{SPARE_POOL}/reload")


def drain_of(deadline_ms: Any) -> bytes:
    return json.dumps({"deadline_ms": deadline_ms}).encode()


def reload_of(new_model_ref: Any) -> bytes:
    return json.dumps({"new_model_ref": new_model_ref}).encode()


CASES = [
    Case("no token", 401, "UNAUTHORIZED", headers=(("Authorization", b""),), body=body_of(), says="Bearer"),
    Case("bad token", 401, "UNAUTHORIZED", headers=(("Authorization", b"Bearer x"),), body=body_of(), says="wrong"),
    Case("basic auth", 401, "UNAUTHORIZED", headers=(("Authorization", b"Basic eDp5"),), body=body_of()),
    Case("garbled auth", 401, "UNAUTHORIZED", headers=(("Authorization", b"Bearer"),), body=body_of()),
    Case("byte 255 in token", 401, "UNAUTHORIZED", headers=(("Authorization", b"Bearer \xff\xfe"),), body=body_of()),
    Case("token in query", 401, "UNAUTHORIZED", "GET", "/v1/pools?access_token=x", (("Authorization", b""),)),
    Case("unknown path", 404, "NOT_FOUND", "GET", "/v1/replicasets", says="/ui/"),
    Case("root", 404, "NOT_FOUND", "GET", "/"),
    Case("slash at the end", 404, "NOT_FOUND", "GET", "/v1/tasks/"),
    Case("unknown method", 405, "METHOD_NOT_ALLOWED", "DELETE"),
    Case("options", 405, "METHOD_NOT_ALLOWED", "OPTIONS"),
    Case("text/plain", 415, "UNSUPPORTED_MEDIA_TYPE", headers=(("Content-Type", b"text/plain"),), body=body_of()),
    Case("type foo", 415, "UNSUPPORTED_MEDIA_TYPE", headers=(("Content-Type", b"foo"),), body=body_of()),
    Case("no content type", 202, None, headers=(("Content-Type", b""),), body=body_of()),
    Case("bogus charset", 202, None, headers=(("Content-Type", b"application/json; charset=bogus"),), body=body_of()),
    Case("malformed JSON", 400, "INVALID_PARAMS", body=b'{"model_ref":', says="body: "),
    Case("empty body", 400, "INVALID_PARAMS", body=b"", says="JSON object"),
    Case("null body", 400, "INVALID_PARAMS", body=b"null", says="Expected `object`"),
    Case("chunked body", 202, None, headers=CHUNKED, body=chunked(body_of()[:5], body_of()[5:])),
    Case("body too long", 413, "PAYLOAD_TOO_LARGE", body=body_of() + BIG, says="max_body_bytes"),
    Case("chunks too long", 413, "PAYLOAD_TOO_LARGE", headers=CHUNKED, body=chunked(body_of(), BIG)),
    Case("invalid UTF-8", 400, "INVALID_PARAMS", body=b'{"model_ref":"\xff"}', says="UTF-8"),
    Case("nested arrays", 400, "INVALID_PARAMS", body=b"[" * 30000),
    Case("nested in a schema", 400, "INVALID_PARAMS", body=b'{"sampling":{"json_schema":{"a":' + b"[" * 30000),
    Case("5000 digits", 400, "INVALID_PARAMS", body=b'{"model_ref":"m","seed":' + b"9" * 5000 + b"}"),
    Case("seed of 2^63", 400, "INVALID_PARAMS", body=body_of(seed=2**63), says="`$.seed`"),
    Case("lone surrogate", 400, "INVALID_PARAMS", body=b'{"model_ref":"\\ud800"}'),
    Case("NUL in a string", 202, None, body=body_of(prompt="a\0b")),
    Case("NaN", 400, "INVALID_PARAMS", body=b'{"model_ref":"m","sampling":{"temperature":NaN}}'),
    Case("float for an integer", 400, "INVALID_PARAMS", body=body_of(max_tokens=1.5), says="`$.max_tokens`"),
    Case("true for an integer", 400, "INVALID_PARAMS", body=body_of(max_tokens=True), says="`$.max_tokens`"),
    Case("string for an integer", 400, "INVALID_PARAMS", body=body_of(max_tokens="5"), says="`$.max_tokens`"),
    Case(
        "bad catalog id",
        400,
        "INVALID_PARAMS",
        "POST",
        "/v1/catalog/models",
        body=b'{"id": "../x", "source_url": "builtin:tiny"}',
        says="must match ^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$ - at `$.id`",
    ),
    Case("bad UUID in body", 400, "INVALID_PARAMS", body=body_of(task_id="x"), says="must be a UUID - at `$.task_id`"),
    Case("UUID with a newline", 400, "INVALID_PARAMS", body=body_of(task_id=ENDING_TASK + "\n"), says="UUID"),
    Case("bad UUID in path", 400, "INVALID_PARAMS", "GET", "/v1/tasks/x", says="path parameter `id`: must be a UUID"),
    Case("bad UUID in query", 400, "INVALID_PARAMS", "GET", "/v1/tasks?session_id=x", says="must be a UUID"),
    Case("unknown query", 400, "INVALID_PARAMS", "GET", "/v1/tasks?stat=queued", says="did you mean `state`?"),
    Case("query that none knows", 400, "INVALID_PARAMS", "GET", "/v1/capabilities?x=1", says="known: none"),
    Case("query twice", 400, "INVALID_PARAMS", "GET", "/v1/tasks?limit=1&limit=2", says="`limit`: give it once"),
    Case("query without value", 400, "INVALID_PARAMS", "GET", "/v1/tasks?limit=", says="`limit`"),
    Case("limit too high", 400, "INVALID_PARAMS", "GET", "/v1/tasks?limit=201", says="<= 200"),
    Case("bad state", 400, "INVALID_PARAMS", "GET", "/v1/tasks?state=done", says="one of queued, running, succeeded"),
    Case("unknown field", 400, "INVALID_PARAMS", body=body_of(promt="x"), says="did you mean `prompt`?"),
    Case("field far from any", 400, "INVALID_PARAMS", body=body_of(zzz=1), says="known: ctx, deadline_ms"),
    Case("unknown deep field", 400, "INVALID_PARAMS", body=body_of(sampling={"temprature": 1}), says="`temperature`?"),
    Case(
        "unknown field in a list",
        400,
        "INVALID_PARAMS",
        body=body_of(messages=[{"role": "user", "content": "", "contnt": ""}]),
        says="`content`? - at `$.messages[0]`",
    ),
    Case("bad enum value", 400, "INVALID_PARAMS", body=body_of(priority="high"), says="one of interactive, batch"),
    Case("missing field", 400, "INVALID_PARAMS", body=b"{}", says="`model_ref`"),
    Case("header of 200 kB", 431, "PAYLOAD_TOO_LARGE", *GET, headers=(("X-Big", b"x" * 200_000),)),
    Case("headers of 40 kB", 431, "PAYLOAD_TOO_LARGE", *GET, headers=tuple((f"X-{i}", b"x" * 4000) for i in range(10))),
    Case("handler raises", 500, "INTERNAL", body=body_of(model_ref=CRASHING_MODEL), says="correlation ID"),
    Case("service refuses", 429, "ADMISSION_REJECT", body=body_of(model_ref=FULL_QUEUE)),
    Case("multipart GET", 200, None, *GET, headers=(("Content-Type", b"multipart/form-data"),)),
    Case("body on GET", 200, None, *GET, body=b"{"),
    Case("no such pool", 404, "NOT_FOUND", "GET", "/v1/pools/%ff%00"),
    Case("two hosts", 400, "INVALID_PARAMS", *GET, headers=(("Host", b"localhost"), ("Host", b"evil.example"))),
    Case("no host", 400, "INVALID_PARAMS", *GET, headers=(("Host", b""),)),
    Case(
        "bad Last-Event-ID",
        400,
        "INVALID_PARAMS",
        "GET",
        f"/v1/tasks/{ENDING_TASK}/stream",
        (("Last-Event-ID", b"-1"),),
    ),
    Case(
        "huge Last-Event-ID",
        400,
        "INVALID_PARAMS",
        "GET",
        f"/v1/tasks/{ENDING_TASK}/stream",
        (("Last-Event-ID", b"9" * 40),),
    ),
]


def cases_of(kind: str, act: tuple[str, str], good: dict[str, Any]) -> list[Case]:
    """What can be wrong with either act on a pool; `good` is a body that it takes."""
    (field,), body = good, json.dumps(good).encode()
    return [
        Case(f"{kind} without token", 401, "UNAUTHORIZED", *act, headers=(("Authorization", b""),), body=body),
        Case(f"{kind} by GET", 405, "METHOD_NOT_ALLOWED", "GET", act[1]),
        Case(f"{kind} as a form", 415, "UNSUPPORTED_MEDIA_TYPE", *act, (("Content-Type", b"text/plain"),), body),
        Case(f"{kind} without content type", 202, None, *act, headers=(("Content-Type", b""),), body=body),
        Case(f"{kind} in chunks", 202, None, *act, headers=CHUNKED, body=chunked(body[:5], body[5:])),
        Case(f"{kind} of no pool", 404, "NOT_FOUND", "POST", act[1].replace(SPARE_POOL, "nowhere"), body=body),
        Case(f"{kind} of a long name", 400, "INVALID_PARAMS", "POST", act[1].replace(SPARE_POOL, "x" * 65), body=body),
        Case(f"{kind} with a query", 400, "INVALID_PARAMS", act[0], act[1] + "?force=1", body=body, says="none"),
        Case(f"{kind} no body", 400, "INVALID_PARAMS", *act, body=b"", says="JSON object"),
        Case(f"{kind} not JSON", 400, "INVALID_PARAMS", *act, body=body[:-1], says="body: "),
        Case(f"{kind} two values", 400, "INVALID_PARAMS", *act, body=body + body, says="body: "),
        Case(f"{kind} null", 400, "INVALID_PARAMS", *act, body=b"null", says="Expected `object`"),
        Case(f"{kind} in a list", 400, "INVALID_PARAMS", *act, body=b"[" + body + b"]", says="Expected `object`"),
        Case(f"{kind} nested", 400, "INVALID_PARAMS", *act, body=b'{"%b":' % field.encode() + b"[" * 30000),
        Case(f"{kind} without its field", 400, "INVALID_PARAMS", *act, body=b"{}", says=f"`{field}`"),
        Case(f"{kind} null field", 400, "INVALID_PARAMS", *act, body=b'{"%b":null}' % field.encode(), says=field),
        Case(
            f"{kind} unknown field",
            400,
            "INVALID_PARAMS",
            *act,
            body=json.dumps({**good, field[:-1]: 1}).encode(),
            says=f"did you mean `{field}`?",
        ),
        Case(f"{kind} too long", 413, "PAYLOAD_TOO_LARGE", *act, body=body + BIG, says="max_body_bytes"),
        Case(f"{kind} chunks too long", 413, "PAYLOAD_TOO_LARGE", *act, headers=CHUNKED, body=chunked(body, BIG)),
    ]


WEEK_MS = 7 * 24 * 3600 * 1000
ACTS_ON_POOLS = [
    *cases_of("drain", DRAINING, DRAIN),
    *cases_of("reload", RELOADING, RELOAD),
    Case("unknown state", 400, "INVALID_PARAMS", *STATING, body=b'{"state": "retired"}', says="`$.state`"),
    Case("no state", 400, "INVALID_PARAMS", *STATING, body=b'{"deadline_ms": 1}', says="state"),
    Case("state too late", 400, "INVALID_PARAMS", *STATING, body=b'{"state": "Retired", "deadline_ms": 604800001}'),
    Case("id with a slash", 400, "INVALID_PARAMS", *ENTERING, body=model_of(id="a/b"), says="`$.id`"),
    Case("id with dots", 400, "INVALID_PARAMS", *ENTERING, body=model_of(id=".."), says="`$.id`"),
    Case("id with a newline", 400, "INVALID_PARAMS", *ENTERING, body=model_of(id="a\n"), says="`$.id`"),
    Case("id like a reference", 400, "INVALID_PARAMS", *ENTERING, body=model_of(id="file:a"), says="`$.id`"),
    Case("longest id", 201, None, *ENTERING, body=model_of(id="x" * 64)),
    Case("id too long", 400, "INVALID_PARAMS", *ENTERING, body=model_of(id="x" * 65), says="`$.id`"),
    Case("no source", 400, "INVALID_PARAMS", *ENTERING, body=b'{"id": "a"}', says="source_url"),
    Case("digest in capitals", 400, "INVALID_PARAMS", *ENTERING, body=model_of(digest=f"sha256:{'A' * 64}")),
    Case("other digest", 400, "INVALID_PARAMS", *ENTERING, body=model_of(digest="md5:00"), says="`$.digest`"),
    Case("tags as text", 400, "INVALID_PARAMS", *ENTERING, body=model_of(tags="a"), says="`$.tags`"),
    Case("too many tags", 400, "INVALID_PARAMS", *ENTERING, body=model_of(tags=["a"] * 65), says="`$.tags`"),
    Case("a manifest of nothing", 400, "INVALID_PARAMS", *ENTERING, body=model_of(manifests=[{}]), says="digest"),
    Case("unknown field", 400, "INVALID_PARAMS", *ENTERING, body=model_of(sign="a"), says="signatures"),
    Case("deadline of 0", 202, None, *DRAINING, body=drain_of(0)),
    Case("deadline of a week", 202, None, *DRAINING, body=drain_of(WEEK_MS)),
    Case("deadline beyond a week", 400, "INVALID_PARAMS", *DRAINING, body=drain_of(WEEK_MS + 1), says="`int` <= 6048"),
    Case("deadline of -1", 400, "INVALID_PARAMS", *DRAINING, body=drain_of(-1), says="`int` >= 0 - at `$.deadline_ms`"),
    Case("deadline of 2^63", 400, "INVALID_PARAMS", *DRAINING, body=drain_of(2**63), says="`$.deadline_ms`"),
    Case("deadline of -2^64", 400, "INVALID_PARAMS", *DRAINING, body=drain_of(-(2**64)), says="`$.deadline_ms`"),
    Case("deadline of 4000 digits", 400, "INVALID_PARAMS", *DRAINING, body=drain_of(10**4000)),
    Case("deadline of 1e400", 400, "INVALID_PARAMS", *DRAINING, body=b'{"deadline_ms":1e400}'),
    Case("deadline as a string", 400, "INVALID_PARAMS", *DRAINING, body=drain_of("5"), says="got `str`"),
    Case("deadline as a float", 400, "INVALID_PARAMS", *DRAINING, body=drain_of(0.5), says="`$.deadline_ms`"),
    Case("deadline true", 400, "INVALID_PARAMS", *DRAINING, body=drain_of(True), says="got `bool`"),
    Case("deadline in a list", 400, "INVALID_PARAMS", *DRAINING, body=drain_of([5]), says="got `array`"),
    Case("deadline NaN", 400, "INVALID_PARAMS", *DRAINING, body=b'{"deadline_ms":NaN}'),
    Case("empty reference", 400, "INVALID_PARAMS", *RELOADING, body=reload_of(""), says="`$.new_model_ref`"),
    Case("longest reference", 202, None, *RELOADING, body=reload_of("x" * 1024)),
    Case("reference too long", 400, "INVALID_PARAMS", *RELOADING, body=reload_of("x" * 1025), says="length <= 1024"),
    Case("longest in letters", 202, None, *RELOADING, body=reload_of("🦙" * 1024)),
    Case("reference of 60 kB", 400, "INVALID_PARAMS", *RELOADING, body=reload_of("x" * 60_000), says="length"),
    Case("reference as a number", 400, "INVALID_PARAMS", *RELOADING, body=reload_of(5), says="Expected `str`"),
    Case("reference true", 400, "INVALID_PARAMS", *RELOADING, body=reload_of(True), says="Expected `str`"),
    Case("reference as an object", 400, "INVALID_PARAMS", *RELOADING, body=reload_of({"a": 1}), says="Expected `str`"),
    Case("reference in a list", 400, "INVALID_PARAMS", *RELOADING, body=reload_of(["x"]), says="Expected `str`"),
    Case("reference in Latin-1", 400, "INVALID_PARAMS", *RELOADING, body=b'{"new_model_ref":"\xff"}', says="UTF-8"),
    Case("half a surrogate pair", 400, "INVALID_PARAMS", *RELOADING, body=reload_of("\ud800")),
    Case("reference that leads nowhere", 400, "INVALID_PARAMS", *RELOADING, body=reload_of(ABSENT_MODEL)),
    Case("reload raises", 500, "INTERNAL", *RELOADING, body=reload_of(CRASHING_MODEL), says="correlation ID"),
]


def assert_envelope(answer: Answer, code: str, correlation_id: str | None = None) -> Error:
    """The body is the contract's error, whole and alone, and agrees with the headers."""
    error = msgspec.json.decode(answer.body, type=Error)
    assert error.code == code
    assert error.correlation_id == answer.correlation_id
    assert correlation_id in (None, answer.correlation_id)
    assert error.retriable == CODES[error.code].is_retryable
    assert answer.headers["Content-Type"] == "application/json"
    assert "Access-Control-Allow-Origin" not in answer.headers
    return error


@pytest.mark.spec("HP-SEC-2", "HP-ERR-1", "HP-ERR-4")
@pytest.mark.parametrize("case", CASES + ACTS_ON_POOLS, ids=lambda case: case.name.replace(" ", "-"))
def test_bad_input_gets_its_status_the_envelope_and_the_correlation_id(server: Server, case: Case) -> None:
    """Whatever comes in, the answer has the right status, our envelope and the client's correlation ID."""
    headers: HeaderList = [("X-Correlation-Id", CID.encode()), *case.headers]
    answer = server.call(case.method, case.target, headers, case.body)
    assert answer.http_status == case.http_status
    assert answer.correlation_id == CID
    if case.code:
        error = assert_envelope(answer, case.code, CID)
        assert case.says in error.message


@pytest.mark.spec("HP-ERR-1")
def test_headers_that_go_with_a_refusal(server: Server) -> None:
    """401 names the scheme, 429 the wait, 413 and 431 the end of the connection."""
    unauthorized = server.call("GET", "/v1/pools", [("Authorization", b"")])
    assert unauthorized.headers["WWW-Authenticate"] == "Bearer"
    refused = server.call("POST", "/v1/tasks", body=body_of(model_ref=FULL_QUEUE))
    assert (refused.headers["Retry-After"], refused.headers["X-Backoff-Ms"]) == ("2", "1200")
    assert refused.json["policy_label"] == "reject"
    assert refused.json["engine"] == "llamacpp"
    keep_alive = [("Connection", b"")]
    too_long = server.call("POST", "/v1/tasks", keep_alive, body_of() + BIG)
    assert too_long.headers["Connection"] == "close"
    too_wide = server.call("GET", "/v1/pools", [*keep_alive, ("X-Big", b"x" * 40_000)])
    assert too_wide.headers["Connection"] == "close"


@pytest.mark.spec("HP-SEC-7")
def test_an_unforeseen_exception_says_nothing_to_the_client(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The text of an unexpected exception is in the log, with the correlation ID, and not in the answer."""
    answer = server.call("POST", "/v1/tasks", [("X-Correlation-Id", b"find-me")], body_of(model_ref=CRASHING_MODEL))
    assert SECRET.encode() not in answer.body
    (record,) = [record for record in caplog.records if "find-me" in record.getMessage()]
    assert record.exc_info
    assert SECRET in str(record.exc_info[1])


def test_a_response_that_the_contract_does_not_allow_is_a_500_in_tests(checking_server: Server) -> None:
    """With response validation on, a wrong body does not get out."""
    answer = checking_server.call("GET", f"/v1/pools/{MISSHAPEN_POOL}")
    assert answer.http_status == 500
    assert_envelope(answer, "INTERNAL")


@pytest.mark.parametrize("hostile", [b"\xff", b"x" * 10_000, b"x" * 129, b"a b", b"a\tb", "ü".encode()], ids=range(6))
@pytest.mark.spec("HP-SEC-2")
def test_a_hostile_correlation_id_is_replaced(server: Server, hostile: bytes) -> None:
    """Anything but 1 to 128 visible ASCII characters becomes a new UUIDv4, on success and on failure."""
    for target, http_status in (("/v1/pools", 200), ("/v1/nothing", 404)):
        answer = server.call("GET", target, [("X-Correlation-Id", hostile)])
        assert answer.http_status == http_status
        assert uuid.UUID(answer.correlation_id).version == 4


@pytest.mark.spec("HP-SEC-2", "HP-ERR-1")
@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Correlation-Id: \x7f\r\n\r\n",
        b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=["no HTTP", "byte 255 in the path", "control byte", "two lengths", "length and chunks", "negative length"],
)
def test_what_is_not_http_is_refused_in_our_words(server: Server, data: bytes) -> None:
    """A request that the parser refuses gets the envelope, a correlation ID and the end of the connection."""
    answer = server.exchange(data)
    assert (answer.http_status, answer.headers["Connection"]) == (400, "close")
    assert_envelope(answer, "INVALID_PARAMS")
    assert uuid.UUID(answer.correlation_id).version == 4


@pytest.mark.spec("HP-SEC-2")
def test_correlation_ids_that_are_kept_or_made(server: Server) -> None:
    """128 visible characters are kept as they are; of two the first counts; without one each request gets its own."""
    longest = "!~" * 64
    assert server.call("GET", "/v1/pools", [("X-Correlation-Id", longest.encode())]).correlation_id == longest
    twice = [("X-Correlation-Id", b"first"), ("X-Correlation-Id", b"second")]
    assert server.call("GET", "/v1/pools", twice).correlation_id == "first"
    made = {server.call("GET", "/v1/pools").correlation_id for _ in range(3)}
    assert len(made) == 3


@pytest.mark.spec("HP-SEC-3")
def test_the_token_is_compared_as_bytes(server: Server) -> None:
    """A token with non-ASCII letters works, and no prefix, other case or Latin-1 spelling of it does."""
    assert server.call("GET", "/v1/pools", [("Authorization", BEARER)]).http_status == 200
    wrong = [BEARER[:-1], BEARER + b"x", BEARER.upper(), BEARER.decode().encode("latin-1")]
    for value in wrong:
        assert server.call("GET", "/v1/pools", [("Authorization", value)]).http_status == 401


@pytest.mark.spec("HP-SEC-7")
def test_logs_name_a_token_by_its_digest() -> None:
    """The identity in logs is the first six hex digits of the token's SHA-256."""
    assert identity("abc") == "token:ba7816"


def test_a_body_that_breaks_off_is_not_taken() -> None:
    """What came before the connection broke may by chance be whole JSON; it is not run."""
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": body_of(), "more_body": True},
        {"type": "http.disconnect"},
    ]

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    with pytest.raises(InvalidParams, match="before the body was complete"):
        run(read_body(receive))


def test_of_equal_keys_the_last_counts(server: Server) -> None:
    """Duplicate JSON keys are taken as most parsers take them: the last one wins."""
    task_id = str(uuid.uuid4())
    body = b'{"model_ref":"first","task_id":"%b","model_ref":"last"}' % task_id.encode()
    assert server.call("POST", "/v1/tasks", body=body).http_status == 202
    assert server.service.requests[task_id].model_ref == "last"


def test_http_1_0_without_host_is_served(server: Server) -> None:
    """Only HTTP/1.1 demands a Host header, and a browser always sends one."""
    answer = server.exchange(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert (answer.http_status, answer.json) == (200, {"status": "ok"})


@pytest.mark.spec("HP-SEC-3")
@pytest.mark.parametrize("rest", [b"0\r\n" + b"A: x\r\n" * 60_000, b"0\r\nA: " + b"x" * 400_000], ids=["many", "long"])
def test_trailers_without_end_are_cut_off(server: Server, rest: bytes) -> None:
    """What comes behind the last chunk is bounded, and none of it is kept; no token is needed to be cut off."""
    head = b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with closing(server.connect(head + b"Transfer-Encoding: chunked\r\n\r\n")) as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        with suppress(ConnectionError):
            client.sendall(rest)
        assert ends(client)


@pytest.mark.spec("HP-SEC-3")
def test_a_body_that_never_comes_does_not_hold_a_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is answered before its body is whole has a bounded time for the rest, whatever trickles in."""
    monkeypatch.setattr(protocol, "DRAIN_LIMIT_S", 0.1)
    head = b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8000\r\n\r\n"
    with closing(server.connect(head)) as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        client.sendall(b"x")
        assert ends(client)


@pytest.mark.spec("HP-SEC-3")
def test_a_head_that_never_ends_does_not_hold_a_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An idle connection, and one that sends a header byte by byte, has a bounded time for its head."""
    monkeypatch.setattr(protocol, "HEAD_LIMIT_S", 0.1)
    with closing(server.connect(b"GET / HTTP/1.1\r\nX: ")) as client:
        assert ends(client)


def test_a_refused_body_that_comes_late_leaves_the_connection_in_order(server: Server) -> None:
    """A client that sends its body after the answer can go on using the connection."""
    head = b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
    with closing(server.connect(head)) as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        client.sendall(b"12345GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_a_large_body_leaves_the_connection_in_order() -> None:
    """What a request had is not counted against the next one, whose body comes after its head."""
    settings = structs.replace(SETTINGS, server=structs.replace(SETTINGS.server, max_body_bytes=1 << 20))
    head = b"POST /v1/tasks HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
    with serving(settings) as server, closing(server.connect(head % 400_000)) as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        client.sendall(b"x" * 400_000 + head % 5)
        assert client.recv(65536).startswith(b"HTTP/1.1 401 ")
        client.sendall(b"12345GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def ends(client: socket.socket) -> bool:
    """The other side closes, in good order or not, before the socket's own limit."""
    try:
        while client.recv(65536):
            pass
    except ConnectionError:
        pass
    return True
