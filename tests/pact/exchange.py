"""One interaction between our client and a mock of the service, and the words that interactions are made of.

Every matcher has an example, and every example is fixed, so that the file comes out the same each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from pact.interaction import HttpInteraction

from llama_orch.client import Client, Frame
from llama_orch.contract.models import FRAMES
from pact import Pact, match

CONSUMER = "llama-orch-cli"
PROVIDER = "llama-orch"
TOKEN = "pact-0123456789abcdef0123456789abcdef"
CORRELATION_ID = "5f3c9b1e-7d2a-4e86-9c40-1b8f6d3a2e57"
UUID = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
DIGEST = "sha256:" + "1f" * 32

uuid_text = match.regex(CORRELATION_ID, regex=UUID)
digest = match.regex(DIGEST, regex="sha256:[0-9a-f]{64}")
timestamp = match.regex("2026-01-01T12:00:00.000Z", regex=r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


class Exchange:
    """Say what is given, asked and answered; then let the client do it."""

    def __init__(self, description: str, consumer: str = CONSUMER) -> None:
        self._pact = Pact(consumer, PROVIDER).with_specification("V4")
        self._interaction: HttpInteraction = self._pact.upon_receiving(description)
        self.waits: list[float] = []  # what the client waited before it asked again, in seconds

    def given(self, state: str, **parameters: object) -> None:
        self._interaction.given(state, **parameters)

    def asks(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, Any] | None = None,
        token: str | None = TOKEN,
    ) -> None:
        """What the client is to send. `token` None: none, which a mock cannot insist on."""
        it = self._interaction.with_request(method, path).with_header("X-Correlation-Id", uuid_text)
        if token is not None:
            it.with_header("Authorization", f"Bearer {token}")
        for name, value in (headers or {}).items():
            it.with_header(name, value)
        if query:
            it.with_query_parameters(dict(query))
        if body is not None:
            it.with_body(msgspec.to_builtins(body), "application/json")

    def gets(self, status: int, body: object = None, *, headers: Mapping[str, Any] | None = None) -> None:
        """What the service is to answer. The request's correlation ID comes back: the verifier sends the example, so
        that the same text without a matcher demands the echo."""
        it = self._interaction.will_respond_with(status).with_header("X-Correlation-Id", CORRELATION_ID)
        for name, value in (headers or {}).items():
            it.with_header(name, value)
        if body is not None:
            it.with_body(body, "application/json")

    def gets_text(self, media_type: str, example: str, pattern: str) -> None:
        """An answer that is no JSON and matches `pattern` as a whole."""
        self.gets(200)
        self._interaction.with_body(example, media_type).with_matching_rules(
            {"body": {"$": {"combine": "AND", "matchers": [{"match": "regex", "regex": pattern}]}}}
        )

    @contextmanager
    def client(self, token: str = TOKEN) -> Iterator[Client]:
        """The client at the mock. Once the block is left, the mock has got exactly what was said. A client that is told
        to wait asks a second time, and gives up then."""
        mock = self._pact.serve(addr="127.0.0.1")
        exact = {"sleep": self.waits.append, "dice": lambda: 0.0}
        with mock, Client(str(mock.url), token, attempts_max=2, **exact) as client:
            yield client

    @contextmanager
    def plain_client(self) -> Iterator[httpx.Client]:
        """For what our client has no use of."""
        mock = self._pact.serve(addr="127.0.0.1")
        headers = {"X-Correlation-Id": CORRELATION_ID, "Authorization": f"Bearer {TOKEN}"}
        with mock, httpx.Client(base_url=str(mock.url), headers=headers, trust_env=False) as client:
            yield client

    def write(self, folder: Path) -> None:
        """Add the interaction to the folder's pact."""
        folder.mkdir(parents=True, exist_ok=True)
        self._pact.write_file(folder)


def error(code: str, **fields: object) -> dict[str, object]:
    """The one error body. `engine` is null unless told otherwise."""
    fixed = {"code": code, "message": match.str("What happened and what to do next."), "engine": None}
    return {**fixed, "correlation_id": CORRELATION_ID, "retriable": False, **fields}


# The same wait in seconds and in milliseconds, in headers and body (HP-ERR-2).
BACKOFF_HEADERS = {
    "Retry-After": match.regex("2", regex=r"[1-9]\d*"),
    "X-Backoff-Ms": match.regex("1200", regex=r"[1-9]\d*"),
}


def backoff(code: str, **fields: object) -> dict[str, object]:
    waits = {"engine": match.str("llamacpp"), "retriable": True, "retry_after_ms": match.int(1200)}
    return error(code, **waits | fields)


# -- streams ---------------------------------------------------------------------------------------------------------


def sse(*frames: Frame, first: int = 0) -> str:
    """A stream's text as the service writes it."""
    names = {kind: name for name, kind in FRAMES.items()}
    return "".join(
        f"id: {number}\nevent: {names[type(frame)]}\ndata: {msgspec.json.encode(frame).decode()}\n\n"
        for number, frame in enumerate(frames, first)
    )


def frame(event: str, *, number: str = r"\d+", **fields: str) -> str:
    """A pattern of one frame with at least these fields, in any order; values are patterns of JSON."""
    seen = "".join(rf'(?=[^\n]*"{name}":{value}[,}}])' for name, value in fields.items())
    return rf"id: {number}\nevent: {event}\ndata: {seen}\{{[^\n]*\}}\n\n"


COMMENT = r"(: [^\n]*\n\n)"
COUNT = r"\d+"
MAYBE_COUNT = r"(\d+|null)"
STARTED = frame("started", number="0", task_id=f'"{UUID}"', queue_position=MAYBE_COUNT, predicted_start_ms=MAYBE_COUNT)
TOKEN_FRAME = frame("token", t=r'"[^\n]+"', i=COUNT)
METRICS = frame(
    "metrics",
    queue_depth=COUNT,
    queue_position=MAYBE_COUNT,
    predicted_start_ms=MAYBE_COUNT,
    tokens_in=COUNT,
    tokens_out=COUNT,
    on_time_probability=r"(null|\d[^,}]*)",
    kv_warmth="(true|false)",
    tokens_budget_remaining=MAYBE_COUNT,
    time_budget_remaining_ms=MAYBE_COUNT,
    cost_budget_remaining=r"(null|\d[^,}]*)",
)


def stream_of(*frames: str) -> str:
    """A pattern of a stream: these frames, and comments wherever they are allowed."""
    return f"{COMMENT}*" + "".join(f"{one}{COMMENT}*" for one in frames)


def any_of(*frames: str) -> str:
    """A pattern of any number of these frames in any order, at least one."""
    return f"({'|'.join((*frames, COMMENT))})+"
