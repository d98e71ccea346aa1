"""What a client of OpenAI's API says to the service and what it needs to hear: a consumer of its own, since it knows
nothing of ours. One test, one interaction; a test's name is its interaction's description."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from pact import match
from tests.pact.conftest import description_of
from tests.pact.exchange import BACKOFF_HEADERS, CORRELATION_ID, UUID, Exchange

pytestmark = [pytest.mark.spec("HP-ALN-2")]

CONSUMER = "openai-client"
CHAT, TEXT, VECTORS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
HELLO = {"model": "default", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "seed": 7}
ONCE = {"model": "builtin:tiny", "prompt": "Once upon a time", "max_tokens": 3, "seed": 7}
USAGE = {"prompt_tokens": match.int(5), "completion_tokens": match.int(3), "total_tokens": match.int(8)}
TASK_HEADERS = {
    "X-Task-Id": match.regex(CORRELATION_ID, regex=UUID),
    "X-Queue-Position": match.regex("0", regex=r"\d+"),
}
FINGERPRINT = match.regex("llamacpp-1-1f1f1f1f1f1f", regex=r"\w+-[\w.]+-[0-9a-f]{12}")


@pytest.fixture
def exchange(request: pytest.FixtureRequest, pacts_written: Path) -> Iterator[Exchange]:
    exchange = Exchange(description_of(request.function.__name__), CONSUMER)
    yield exchange
    exchange.write(pacts_written)


def an_error(kind: str, code: str, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": match.str("What happened."), "type": kind, "code": code, "param": param}}


def answer_id(prefix: str) -> Any:
    return match.regex(prefix + CORRELATION_ID, regex=f"{prefix}{UUID}")


def sent(exchange: Exchange, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    with exchange.plain_client() as client:
        return client.post(path, json=body, headers=headers)


def test_a_client_lists_the_models(exchange: Exchange) -> None:
    """The pool's ID, then the model's reference."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/models")
    model = {"object": "model", "created": match.int(1767268800), "owned_by": match.str("llamacpp")}
    exchange.gets(200, {"object": "list", "data": [{"id": "default", **model}, {"id": "builtin:tiny", **model}]})
    with exchange.plain_client() as client:
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["default", "builtin:tiny"]


def test_a_client_reads_a_model(exchange: Exchange) -> None:
    """By its reference."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/models/builtin:tiny")
    exchange.gets(200, {"id": "builtin:tiny", "object": "model", "created": match.int(1), "owned_by": match.str("x")})
    with exchange.plain_client() as client:
        assert client.get("/v1/models/builtin:tiny").json()["id"] == "builtin:tiny"


def test_a_client_reads_a_model_that_is_not_there(exchange: Exchange) -> None:
    """404 in OpenAI's shape, and no need to try again."""
    exchange.given("an idle pool")
    exchange.asks("GET", "/v1/models/gpt-4")
    exchange.gets(404, an_error("not_found_error", "NOT_FOUND"), headers={"X-Should-Retry": "false"})
    with exchange.plain_client() as client:
        assert client.get("/v1/models/gpt-4").status_code == 404


def test_a_client_chats(exchange: Exchange) -> None:
    """The whole answer, with the task's headers."""
    exchange.given("an idle pool")
    exchange.asks("POST", CHAT, body=HELLO)
    message = {"role": "assistant", "content": match.str("Hello"), "refusal": None}
    answer = {
        "id": answer_id("chatcmpl-"),
        "object": "chat.completion",
        "created": match.int(1767268800),
        "model": "default",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}],
        "usage": USAGE,
        "system_fingerprint": FINGERPRINT,
    }
    exchange.gets(200, answer, headers=TASK_HEADERS)
    assert sent(exchange, CHAT, HELLO).json()["choices"][0]["message"]["content"] == "Hello"


def test_a_client_completes_a_text(exchange: Exchange) -> None:
    """Likewise."""
    exchange.given("an idle pool")
    exchange.asks("POST", TEXT, body=ONCE)
    answer = {
        "id": answer_id("cmpl-"),
        "object": "text_completion",
        "created": match.int(1767268800),
        "model": "builtin:tiny",
        "choices": [{"index": 0, "text": match.str(" there"), "logprobs": None, "finish_reason": "length"}],
        "usage": USAGE,
        "system_fingerprint": FINGERPRINT,
    }
    exchange.gets(200, answer, headers=TASK_HEADERS)
    assert sent(exchange, TEXT, ONCE).json()["choices"][0]["text"] == " there"


def test_a_client_gets_vectors(exchange: Exchange) -> None:
    """One for each text."""
    body = {"model": "default", "input": ["a red fox", "an old dog"]}
    exchange.given("an idle pool")
    exchange.asks("POST", VECTORS, body=body)
    vector = match.each_like(match.number(0.5), min=1)
    data = [{"object": "embedding", "index": index, "embedding": vector} for index in (0, 1)]
    usage = {"prompt_tokens": match.int(6), "total_tokens": match.int(6)}
    exchange.gets(200, {"object": "list", "model": "default", "data": data, "usage": usage}, headers=TASK_HEADERS)
    assert [one["embedding"] for one in sent(exchange, VECTORS, body).json()["data"]] == [[0.5], [0.5]]


def chunk(choices: str, usage: str) -> str:
    """A pattern of one chunk, with its fields in any order."""
    seen = "".join(
        rf'(?=[^\n]*"{name}":{value}[,}}])'
        for name, value in {
            "id": f'"chatcmpl-{UUID}"',
            "object": r'"chat\.completion\.chunk"',
            "created": r"\d+",
            "model": '"default"',
            "choices": choices,
            "usage": usage,
        }.items()
    )
    return rf"data: {seen}\{{[^\n]*\}}\n\n"


COMMENT = r"(: [^\n]*\n\n)*"
NO_REASON = r'\[\{[^\n]*"finish_reason":null\}\]'
STREAM = (
    '{"id":"chatcmpl-%s","object":"chat.completion.chunk","created":1767268800,"model":"default",'
    '"choices":%s,"usage":%s}'
)
CHOICE = '[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}]'
SAID_USAGE = '{"prompt_tokens":5,"completion_tokens":3,"total_tokens":8}'
LINES = [
    STREAM % (CORRELATION_ID, CHOICE % ('{"role":"assistant","content":""}', "null"), "null"),
    STREAM % (CORRELATION_ID, CHOICE % ('{"content":"Hello"}', "null"), "null"),
    STREAM % (CORRELATION_ID, CHOICE % ("{}", '"length"'), "null"),
    STREAM % (CORRELATION_ID, "[]", SAID_USAGE),
    "[DONE]",
]
STREAM_TEXT = ": waiting, 0 ahead\n\n" + "".join(f"data: {line}\n\n" for line in LINES)
STREAM_PATTERN = (
    COMMENT
    + chunk(r'\[\{[^\n]*"role":"assistant"[^\n]*\}\]', "null")
    + f"({chunk(NO_REASON, 'null')}{COMMENT})+"
    + chunk(r'\[\{[^\n]*"finish_reason":"length"\}\]', "null")
    + chunk(r"\[\]", r'\{"prompt_tokens":\d+,"completion_tokens":\d+,"total_tokens":\d+\}')
    + r"data: \[DONE\]\n\n"
)


def test_a_client_streams_a_chat(exchange: Exchange) -> None:
    """Comments while it waits, the role, the text, the reason, the usage, and the end."""
    body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
    exchange.given("an idle pool")
    exchange.asks("POST", CHAT, body=body)
    exchange.gets_text("text/event-stream", STREAM_TEXT, STREAM_PATTERN)
    assert sent(exchange, CHAT, body).text == STREAM_TEXT


def test_a_client_meets_a_full_queue(exchange: Exchange) -> None:
    """429 with the wait, which is worth it."""
    exchange.given("a full queue", full_policy="reject")
    exchange.asks("POST", CHAT, body=HELLO)
    headers = BACKOFF_HEADERS | {"X-Should-Retry": "true"}
    exchange.gets(429, an_error("rate_limit_error", "ADMISSION_REJECT"), headers=headers)
    assert sent(exchange, CHAT, HELLO).headers["X-Should-Retry"] == "true"


def test_a_client_asks_for_what_is_not_offered(exchange: Exchange) -> None:
    """400 with the field's name."""
    body = {**HELLO, "tools": [{"type": "function", "function": {"name": "look"}}]}
    exchange.given("an idle pool")
    exchange.asks("POST", CHAT, body=body)
    exchange.gets(400, an_error("invalid_request_error", "INVALID_PARAMS", "tools"))
    assert sent(exchange, CHAT, body).json()["error"]["param"] == "tools"


TOOLS = {
    "tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tokens": 60,
}
CALL_ID = match.regex("a1b2c3d4e", regex="[0-9a-z]{9}")


@pytest.mark.spec("HP-OAI-8")
def test_a_client_has_a_tool_called(exchange: Exchange) -> None:
    """The call, and that it is why the answer ended."""
    body = {**HELLO, **TOOLS}
    exchange.given("an idle pool that knows tools")
    exchange.asks("POST", CHAT, body=body)
    call = {"id": CALL_ID, "type": "function", "function": {"name": "look", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
    exchange.gets(200, {"choices": [choice], "usage": USAGE}, headers=TASK_HEADERS)
    assert sent(exchange, CHAT, body).json()["choices"][0]["message"]["tool_calls"][0]["id"] == "a1b2c3d4e"


@pytest.mark.spec("HP-OAI-8")
def test_a_client_sends_back_what_a_tool_found(exchange: Exchange) -> None:
    """The call as it came, then the tool's message: the answer goes on from there."""
    call = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    said = [{"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}]
    found = [{"role": "tool", "tool_call_id": "a1b2c3d4e", "content": "a fox"}]
    body = {**HELLO, "messages": [*HELLO["messages"], *said, *found]}  # type: ignore[misc]
    exchange.given("an idle pool that knows tools")
    exchange.asks("POST", CHAT, body=body)
    message = {"role": "assistant", "content": match.str("A fox"), "refusal": None}
    exchange.gets(200, {"choices": [{"index": 0, "message": message, "finish_reason": "length"}], "usage": USAGE})
    assert sent(exchange, CHAT, body).json()["choices"][0]["message"]["content"] == "A fox"


@pytest.mark.spec("HP-OAI-9")
def test_a_client_asks_how_likely_tokens_were(exchange: Exchange) -> None:
    """Each with its bytes, and the likeliest ones beside it."""
    body = {**HELLO, "logprobs": True, "top_logprobs": 1}
    exchange.given("an idle pool on llamacpp")
    exchange.asks("POST", CHAT, body=body)
    token = {"token": match.str("A"), "logprob": match.number(-0.5), "bytes": match.each_like(match.int(65), min=1)}
    told = match.each_like({**token, "top_logprobs": match.each_like(token, min=1)}, min=1)
    choice = {"index": 0, "logprobs": {"content": told, "refusal": None}, "finish_reason": "length"}
    exchange.gets(200, {"choices": [choice], "usage": USAGE})
    assert sent(exchange, CHAT, body).json()["choices"][0]["logprobs"]["content"][0]["token"] == "A"


def test_a_client_has_a_wrong_key(exchange: Exchange) -> None:
    """401 in the same shape."""
    exchange.given("an idle pool")
    exchange.asks("POST", TEXT, body=ONCE, token="wrong")
    headers = {"WWW-Authenticate": "Bearer", "X-Should-Retry": "false"}
    exchange.gets(401, an_error("authentication_error", "UNAUTHORIZED"), headers=headers)
    assert sent(exchange, TEXT, ONCE, Authorization="Bearer wrong").status_code == 401


def test_a_client_says_our_extras(exchange: Exchange) -> None:
    """A session with a budget: what is left of it comes back."""
    session_id = "7a1d0f3c-5b2e-4f6a-8c9d-1e2f3a4b5c6d"
    extras = {"X-Session-Id": session_id, "X-Priority": "batch", "X-Deadline-Ms": "600000"}
    exchange.given("a session", session_id=session_id, budget_tokens=10_000)
    exchange.asks("POST", TEXT, body=ONCE, headers=extras)
    budget = {"X-Budget-Tokens-Remaining": match.regex("9000", regex=r"\d+")}
    exchange.gets(200, {"choices": match.each_like({"text": match.str("x")}, min=1)}, headers=TASK_HEADERS | budget)
    assert sent(exchange, TEXT, ONCE, **extras).headers["X-Budget-Tokens-Remaining"] == "9000"
