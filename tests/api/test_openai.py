"""OpenAI's API over a real socket on a service that is scripted: what reaches it, what comes back, and who cancels."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import msgspec
import pytest

from llama_orch.api.openai_run import PATIENCE_S, WAITING_FOR_MODEL, ChunkedAnswer, Run, Waiters, WholeAnswer
from llama_orch.budgets import NO_BUDGETS, BudgetsLeft
from llama_orch.contract.models import Determinism, Priority, TaskRequest, Workload
from llama_orch.errors import LlorchError, PoolUnready
from llama_orch.openai.answers import ChatWording, Chunks, Subject
from llama_orch.testing.loop import run

from .harness import MAX_BODY_BYTES, Answer, HeaderList, Server, a_request, serving
from .service_fake import (
    CRASHING_MODEL,
    CROWDED_MODEL,
    ENDLESS_MODEL,
    FAILING_MODEL,
    FULL_QUEUE,
    SECRET,
    SPARE_POOL,
    UNREADY_MODEL,
    WORDS,
    FakeService,
)

TIMEOUT_S = 30.0
SESSION_ID = "7a1d0f3c-5b2e-4f6a-8c9d-1e2f3a4b5c6d"
CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "default", "messages": [{"role": "user", "content": "Once"}]},
    TEXT: {"model": "default", "prompt": "Once"},
    VECTORS: {"model": "default", "input": ["a", "b"]},
}
STORY = "".join(WORDS)


@pytest.fixture
def own() -> Iterator[Server]:
    """A server of the test's own, whose answers are held against the contract."""
    with serving(validate_responses=True) as server:
        yield server


def ask(server: Server, path: str, headers: HeaderList | None = None, **changes: Any) -> Answer:
    return server.call("POST", path, headers, json.dumps(BODIES[path] | changes).encode())


def error_of(answer: Answer) -> dict[str, Any]:
    """In OpenAI's shape, whole and alone."""
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.correlation_id
    assert list(answer.json) == ["error"]
    error: dict[str, Any] = answer.json["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert answer.headers["X-Should-Retry"] in ("true", "false")
    return error


def request_of(server: Server, answer: Answer) -> TaskRequest:
    return server.service.requests[answer.headers["X-Task-Id"]]


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-OAI-1")
def test_models_are_pools_and_what_they_serve(own: Server) -> None:
    """All pages of the pools, then each model once; each of them can be read, slashes and all."""
    own.service.pools[SPARE_POOL].model = "file:/models/a b.gguf"
    listed = own.call("GET", "/v1/models").json
    names = [one["id"] for one in listed["data"]]
    assert names[:2] == ["default", SPARE_POOL]
    assert sorted(names[2:]) == ["builtin:tiny", "file:/models/a b.gguf"]
    for one in listed["data"]:
        plain = own.call("GET", f"/v1/models/{one['id'].replace(' ', '%20')}")
        escaped = own.call("GET", "/v1/models/" + one["id"].replace("/", "%2F").replace(" ", "%20"))
        assert plain.json == escaped.json == one
    missing = own.call("GET", "/v1/models/gpt/4")
    assert (missing.http_status, error_of(missing)["type"]) == (404, "not_found_error")


@pytest.mark.spec("HP-OAI-1")
def test_a_model_is_a_pool_or_a_reference(own: Server) -> None:
    """A pool's ID becomes its model on its engine; anything else is for admission to judge."""
    own.service.pools[SPARE_POOL].model = "builtin:other"
    named, referred = (request_of(own, ask(own, TEXT, model=name)) for name in (SPARE_POOL, "builtin:tiny"))
    assert (named.model_ref, named.engine) == ("builtin:other", "llamacpp")
    assert (referred.model_ref, referred.engine) == ("builtin:tiny", None)


# -- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-OAI-1", "HP-OAI-5")
def test_whole_answers_have_the_words_and_the_headers(own: Server) -> None:
    """All of the text at once, the task's ID and its place at admission; a start that nobody knows is absent."""
    chat, text = ask(own, CHAT), ask(own, TEXT)
    assert (chat.http_status, text.http_status) == (200, 200)
    assert chat.json["choices"][0]["message"] == {"role": "assistant", "content": STORY, "refusal": None}
    assert text.json["choices"][0]["text"] == STORY
    for answer, prefix in ((chat, "chatcmpl-"), (text, "cmpl-")):
        assert answer.json["id"] == prefix + answer.headers["X-Task-Id"]
        assert answer.json["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
        assert answer.headers["X-Queue-Position"] == "0"
        assert "X-Predicted-Start-Ms" not in answer.headers
    assert own.service.canceled == []


@pytest.mark.spec("HP-OAI-3", "HP-OAI-5", "HP-OAI-7")
def test_a_stream_has_comments_chunks_and_done(own: Server) -> None:
    """How it waits, then the chunks, then [DONE]; the same headers as any stream, and the task's."""
    answer = ask(own, CHAT, stream=True, stream_options={"include_usage": True})
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert (answer.headers["Cache-Control"], answer.headers["X-Queue-Position"]) == ("no-store", "0")
    messages = answer.body.decode().split("\n\n")
    assert messages[:2] == [": waiting, 1 ahead, start in 420 ms", ": waiting, 0 ahead"]
    assert messages[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(one.removeprefix("data: ")) for one in messages[2:-2]]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-1]) == STORY
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["usage"]["total_tokens"] == 7
    assert request_of(own, answer).messages is not None
    assert own.service.canceled == []


def test_vectors(own: Server) -> None:
    """One for each text, of a task that embeds."""
    answer = ask(own, VECTORS)
    assert [one["embedding"] for one in answer.json["data"]] == [[0.6, -0.8]] * 2
    assert request_of(own, answer).workload is Workload.EMBEDDING
    packed = ask(own, VECTORS, encoding_format="base64")
    assert [one["embedding"] for one in packed.json["data"]] == ["mpkZP83MTL8="] * 2


@pytest.mark.spec("HP-OAI-5")
@pytest.mark.parametrize("path", BODIES)
def test_our_headers_reach_the_task(own: Server, path: str) -> None:
    """Priority, session, deadline, determinism; and the budgets of that session come back."""
    own.service.left = BudgetsLeft(tokens=1200, cost=0.5)
    headers: HeaderList = [
        ("X-Priority", b"batch"),
        ("X-Session-Id", SESSION_ID.encode()),
        ("X-Deadline-Ms", b"90000"),
        ("X-Determinism", b"best_effort"),
    ]
    answer = ask(own, path, headers)
    request = request_of(own, answer)
    assert (request.priority, request.session_id) == (Priority.BATCH, SESSION_ID)
    assert request.determinism is Determinism.BEST_EFFORT
    assert 80_000 < (request.deadline_ms or 0) <= 90_000  # what has passed already is off it
    assert answer.headers["X-Budget-Tokens-Remaining"] == "1200"
    assert answer.headers["X-Budget-Cost-Remaining"] == "0.5"
    assert own.service.budgets_left(None) == NO_BUDGETS
    assert "X-Budget-Tokens-Remaining" not in ask(own, path).headers


@pytest.mark.spec("HP-OAI-5")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Priority", b"urgent"),
        ("X-Priority", b""),
        ("X-Session-Id", b"me"),
        ("X-Deadline-Ms", b"0"),
        ("X-Deadline-Ms", b"soon"),
        ("X-Determinism", b"\xff"),
    ],
)
def test_a_header_of_ours_that_is_wrong_is_refused(own: Server, name: str, value: bytes) -> None:
    """With its name, and never ignored in silence."""
    body = json.dumps(BODIES[CHAT]).encode()
    data = a_request("POST", CHAT, [], body).replace(
        b"\r\n\r\n", b"\r\n" + name.encode() + b": " + value + b"\r\n\r\n", 1
    )
    answer = own.exchange(data)
    assert answer.http_status == 400
    assert f"`{name}`" in error_of(answer)["message"]
    assert own.service.requests == {}


@pytest.mark.spec("HP-OAI-5")
def test_a_header_of_ours_comes_once(own: Server) -> None:
    """Of two nobody knows which one is meant."""
    answer = ask(own, CHAT, [("X-Priority", b"batch"), ("X-Priority", b"interactive")])
    assert (answer.http_status, "give it once" in error_of(answer)["message"]) == (400, True)


# -- errors ----------------------------------------------------------------------------------------------------------

NO_TOKEN: HeaderList = [("Authorization", b"")]
FOREIGN: HeaderList = [("Host", b"evil.example")]
TEXT_TYPE: HeaderList = [("Content-Type", b"text/plain")]
BAD = {
    "wrong token": ("POST", CHAT, [("Authorization", b"Bearer wrong")], b"{}", 401, "UNAUTHORIZED"),
    "no token": ("GET", "/v1/models/default", NO_TOKEN, None, 401, "UNAUTHORIZED"),
    "foreign host": ("GET", "/v1/models", FOREIGN, None, 403, "FORBIDDEN"),
    "other method": ("GET", CHAT, [], None, 405, "METHOD_NOT_ALLOWED"),
    "other method of a model": ("DELETE", "/v1/models/a/b", [], None, 405, "METHOD_NOT_ALLOWED"),
    "large": ("POST", TEXT, [], b" " * (MAX_BODY_BYTES + 1), 413, "PAYLOAD_TOO_LARGE"),
    "no JSON": ("POST", TEXT, TEXT_TYPE, b"{}", 415, "UNSUPPORTED_MEDIA_TYPE"),
    "broken JSON": ("POST", VECTORS, [], b"{", 400, "INVALID_PARAMS"),
    "unknown query": ("GET", "/v1/models?x=1", [], None, 400, "INVALID_PARAMS"),
}


@pytest.mark.spec("HP-OAI-4", "HP-ERR-1")
@pytest.mark.parametrize("name", BAD)
def test_whatever_is_wrong_has_the_shape(own: Server, name: str) -> None:
    """Also where the edge, the router or the token's check says no; the headers are those of any path."""
    method, path, headers, body, status, code = BAD[name]
    answer = own.call(method, path, headers, body)
    assert (answer.http_status, error_of(answer)["code"]) == (status, code)
    assert answer.headers["X-Should-Retry"] == "false"
    assert ("WWW-Authenticate" in answer.headers) == (status == 401)
    assert ("Allow" in answer.headers) == (status == 405)


def test_other_paths_keep_theirs(own: Server) -> None:
    """Neighbours in name are none in shape."""
    for path in ("/v1/model", "/v1/modelsx", "/v1/chat", "/v1/tasks/x", "/v1/embeddings/x"):
        assert "correlation_id" in own.call("GET", path).json


@pytest.mark.spec("HP-OAI-4", "HP-ERR-2")
@pytest.mark.parametrize("path", BODIES)
def test_a_full_queue_says_when_to_come_again(own: Server, path: str) -> None:
    """429 with the wait in the headers that OpenAI's clients follow, also for a stream."""
    for changes in ({}, {"stream": True}) if path != VECTORS else ({},):
        answer = ask(own, path, model=FULL_QUEUE, **changes)
        assert (answer.http_status, error_of(answer)["type"]) == (429, "rate_limit_error")
        waits = [answer.headers[name] for name in ("Retry-After", "X-Backoff-Ms", "X-Should-Retry")]
        assert waits == ["2", "1200", "true"]


@pytest.mark.spec("HP-OAI-4")
def test_a_field_that_is_wrong_is_the_param(own: Server) -> None:
    """By its place, whether the form is wrong, it is unknown, or it is not offered."""
    for changes, param in (
        ({"temperature": 3}, "temperature"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "tone": 1}]}, "messages[0].tone"),
        ({"max_token": 3}, "max_token"),
        ({"n": 2}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "two\nlines"}}]}, "tools[0].function.name"),
    ):
        answer = ask(own, CHAT, **changes)
        assert (answer.http_status, error_of(answer)["param"]) == (400, param)
        assert param.rpartition(".")[2].partition("[")[0] in error_of(answer)["message"]


@pytest.mark.spec("HP-OAI-4", "HP-OAI-5")
def test_a_task_that_fails_is_the_answer(own: Server) -> None:
    """Its code decides the status; the task's ID is there to look at it. In a stream it comes last, without [DONE]."""
    answer = ask(own, CHAT, model=FAILING_MODEL)
    assert (answer.http_status, error_of(answer)["code"]) == (503, "WORKER_RESET")
    assert (answer.headers["X-Backoff-Ms"], answer.headers["X-Should-Retry"]) == ("1200", "true")
    assert answer.headers["X-Task-Id"] in own.service.requests
    streamed = ask(own, CHAT, model=FAILING_MODEL, stream=True)
    *_, last, rest = streamed.body.decode().split("\n\n")
    assert (streamed.http_status, rest) == (200, "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "WORKER_RESET"
    assert own.service.canceled == []


@pytest.mark.spec("HP-OAI-4")
def test_a_crash_tells_nothing(own: Server) -> None:
    """500 in the shape, without a word of the cause."""
    answer = ask(own, TEXT, model=CRASHING_MODEL)
    assert (answer.http_status, error_of(answer)["code"]) == (500, "INTERNAL")
    assert SECRET.encode() not in answer.body


# -- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.spec("HP-OAI-6")
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_cancels(is_stream: bool) -> None:
    """The task is canceled and its reader closed, whether the client streams or waits for everything."""
    with serving() as server:
        body = json.dumps(BODIES[CHAT] | {"model": ENDLESS_MODEL, "stream": is_stream}).encode()
        with closing(server.connect(a_request("POST", CHAT, None, body))) as client:
            if is_stream:
                assert client.recv(1)
            wait_for(lambda: bool(server.service.readers))
        (task_id,) = server.service.readers
        assert server.service.readers[task_id].closed.wait(TIMEOUT_S)
        wait_for(lambda: server.service.canceled == [task_id])


def wait_for(condition: Any) -> None:
    from tests.live.client import until

    until(condition, TIMEOUT_S)


@pytest.mark.spec("HP-OAI-6")
def test_a_task_whose_stream_cannot_be_opened_is_canceled(own: Server) -> None:
    """Nobody would hear it."""
    answer = ask(own, CHAT, model=CROWDED_MODEL, stream=True)
    assert (answer.http_status, error_of(answer)["code"]) == (503, "REPLICA_EXHAUSTED")
    assert own.service.canceled == list(own.service.requests)


# -- a model that has to be there first, in virtual time ---------------------------------------------------------------


class Client:
    """The other end of an ASGI response. It leaves after so many seconds, or stays."""

    def __init__(self, leaves_after_s: float | None = None) -> None:
        self.leaves_after_s = leaves_after_s
        self.status = 0
        self.body = b""

    async def receive(self) -> dict[str, Any]:
        if self.leaves_after_s is None:
            await asyncio.Event().wait()
        await asyncio.sleep(self.leaves_after_s or 0.0)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)
        self.body += message.get("body", b"")


TASK_ID = "3f2b8c1e-9d5a-4c57-8a43-0c7d5b1f2e90"
REQUEST = TaskRequest(task_id=TASK_ID, model_ref=UNREADY_MODEL, prompt="Once")


async def answered(
    service: FakeService, client: Client, request: TaskRequest = REQUEST, *, is_stream: bool, limit: int = 1
) -> float:
    """Have the request answered; the seconds that it took."""
    began = asyncio.get_running_loop().time()
    wording = ChatWording(Subject(TASK_ID, 0, "default"))
    work = Run(service, request, Waiters(limit))
    answer = ChunkedAnswer(work, Chunks(wording, tells_usage=False)) if is_stream else WholeAnswer(work, wording.whole)
    scope = {"type": "http", "method": "POST", "headers": []}
    await answer(scope, client.receive, client.send)
    return asyncio.get_running_loop().time() - began


@pytest.mark.spec("HP-OAI-7")
@pytest.mark.parametrize("is_stream", [True, False])
def test_the_door_asks_again_until_the_model_is_there(is_stream: bool) -> None:
    """Three refusals with 2.5 s to wait: the answer begins 7.5 s later, and a stream says so each second."""
    service, client = FakeService(), Client()
    service.loads_left = 3
    assert run(answered(service, client, is_stream=is_stream)) == pytest.approx(7.5)
    assert client.status == 200
    assert list(service.requests) == [TASK_ID]
    assert client.body.count(WAITING_FOR_MODEL) == (9 if is_stream else 0)
    assert b"[DONE]" in client.body if is_stream else json.loads(client.body)["choices"]


@pytest.mark.spec("HP-OAI-7")
def test_what_has_passed_is_off_the_deadline() -> None:
    """It counts from the request, not from the admission that took so long."""
    service = FakeService()
    service.loads_left = 3
    request = TaskRequest(task_id=TASK_ID, model_ref=UNREADY_MODEL, prompt="Once", deadline_ms=10_000)
    run(answered(service, Client(), request, is_stream=False))
    assert service.requests[TASK_ID].deadline_ms == 2500


@pytest.mark.spec("HP-OAI-7")
@pytest.mark.parametrize(("deadline_ms", "limit_s"), [(None, PATIENCE_S), (20_000, 20.0)])
def test_patience_ends(deadline_ms: int | None, limit_s: float) -> None:
    """After ten minutes, or with the deadline: the refusal of the service, last in a stream that has begun."""
    service, client = FakeService(), Client()
    service.loads_left = 10**6
    request = TaskRequest(task_id=TASK_ID, model_ref=UNREADY_MODEL, prompt="Once", deadline_ms=deadline_ms)
    took_s = run(answered(service, client, request, is_stream=True))
    assert limit_s - 2.5 <= took_s < limit_s
    last = client.body.decode().split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "POOL_UNREADY"
    with pytest.raises(PoolUnready):
        run(answered(service, Client(), request, is_stream=False))


@pytest.mark.spec("HP-OAI-6", "HP-OAI-7")
@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_meanwhile_is_not_submitted_for(is_stream: bool) -> None:
    """Its task never comes to be."""
    service = FakeService()
    service.loads_left = 10**6
    assert run(answered(service, Client(leaves_after_s=6.0), is_stream=is_stream)) == pytest.approx(6.0)
    assert service.requests == {}


@pytest.mark.spec("HP-OAI-7")
def test_no_more_wait_than_there_is_room_for() -> None:
    """Beyond the limit they are told to come again, like everybody on the other paths; who is served leaves room."""

    async def three() -> list[bool]:
        service, waiters = FakeService(), Waiters(2)
        service.loads_left = 3
        runs = [Run(service, msgspec.structs.replace(REQUEST, task_id=str(uuid.uuid4())), waiters) for _ in range(3)]
        await runs[0].admit()
        await runs[1].admit()
        with pytest.raises(PoolUnready):
            await runs[2].admit()
        await runs[0].admit()
        service.loads_left = 1
        await runs[2].admit()
        return [one.is_admitted for one in runs]

    assert run(three()) == [True, False, False]


def test_another_refusal_is_not_asked_again() -> None:
    """Only a model that is not there yet is waited for."""
    request = TaskRequest(task_id=TASK_ID, model_ref=FULL_QUEUE, prompt="Once")
    for is_stream in (True, False):
        with pytest.raises(LlorchError, match="full"):
            run(answered(FakeService(), Client(), request, is_stream=is_stream))
