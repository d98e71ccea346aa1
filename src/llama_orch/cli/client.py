"""The typed client of the contract.

It follows the retry guidance (HP-ERR-3): a 429 or 503 that can pass is repeated after the wait that the server named,
a bounded number of times and for a bounded time. Every request that it repeats is safe to repeat: a task's id is chosen
here, before the first attempt (HP-ADM-8), and a reload is not repeated unless it was refused. A broken stream goes on
behind the last frame that came whole.
"""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from msgspec import UNSET

from llama_orch.cli.sse import SseParser, SseTooLarge
from llama_orch.contract.models import (
    FRAMES,
    AdmissionResponse,
    Capabilities,
    DrainRequest,
    EndFrame,
    Error,
    ErrorCode,
    Healthz,
    MetricsFrame,
    Pool,
    PoolHealth,
    PoolList,
    ReloadRequest,
    StartedFrame,
    TaskList,
    TaskRequest,
    TaskState,
    TaskStatus,
    TokenFrame,
)

Frame = StartedFrame | TokenFrame | MetricsFrame | EndFrame | Error
T = TypeVar("T")

ATTEMPTS_MAX = 5
WAIT_MAX_S = 60.0  # all waits of one call together
ANSWER_TIMEOUT_S = 30.0
POLL_S = 0.5
STREAM_TIMEOUT_S = 60.0  # the server breaks every silence after 15 s
_RETRIED_STATUSES = (429, 503)
_BAD_JSON = (msgspec.MsgspecError, UnicodeDecodeError)


class ApiError(Exception):
    """The server refused or failed; `error` is its one error body (HP-ERR-1)."""

    def __init__(self, status: int, error: Error, retry_after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error
        self.retry_after_s = retry_after_s

    @property
    def can_pass(self) -> bool:
        return self.status in _RETRIED_STATUSES and self.error.retriable is not False


class UnreachableError(Exception):
    """No usable answer came. `is_refused`: nothing listens at the address."""

    def __init__(self, message: str, *, is_refused: bool = False) -> None:
        super().__init__(message)
        self.is_refused = is_refused


class Client:
    """One connection to a service. Not for several threads. `sleep` takes seconds."""

    def __init__(
        self,
        url: str,
        token: str,
        *,
        is_loopback: bool = True,
        sleep: Callable[[float], None] = time.sleep,
        attempts_max: int = ATTEMPTS_MAX,
        wait_max_s: float = WAIT_MAX_S,
    ) -> None:
        self.url = url
        self.correlation_id = str(uuid.uuid4())
        self._token = token
        self._sleep = sleep
        self._attempts_max = attempts_max
        self._wait_max_s = wait_max_s
        self._http = httpx.Client(
            base_url=url,
            headers={"X-Correlation-Id": self.correlation_id, "User-Agent": "llama-orch"},
            timeout=ANSWER_TIMEOUT_S,
            trust_env=not is_loopback,  # no proxy between a program and its own machine
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # --- operations ---

    def is_there(self) -> bool:
        """Whether a llama-orch answers at the address. Says nothing about the token, and does not send it."""
        try:
            answer = self._http.get("/healthz")
            return answer.status_code == 200 and bool(msgspec.json.decode(answer.content, type=Healthz))
        except httpx.ConnectError:
            return False
        except httpx.TimeoutException as error:
            raise UnreachableError(f"{self.url} takes connections but does not answer") from error
        except (httpx.TransportError, *_BAD_JSON):
            return False

    def submit(self, request: TaskRequest) -> AdmissionResponse:
        if request.task_id is None:
            request = msgspec.structs.replace(request, task_id=str(uuid.uuid4()))
        return self._call("POST", "/v1/tasks", AdmissionResponse, body=request)

    def cancel(self, task_id: str) -> None:
        """Cancel the task; one that has ended is left as it is."""
        self._answer("POST", f"/v1/tasks/{_quoted(task_id)}/cancel")

    def get_task(self, task_id: str) -> TaskStatus:
        return self._call("GET", f"/v1/tasks/{_quoted(task_id)}", TaskStatus)

    def list_tasks(
        self,
        *,
        state: TaskState | None = None,
        session_id: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> TaskList:
        """One page, newest first; `next_cursor` of the answer leads to the next."""
        query = {"state": state, "session_id": session_id, "limit": limit, "cursor": cursor}
        return self._call("GET", "/v1/tasks", TaskList, query=query)

    def pools(self, *, limit: int | None = None, cursor: str | None = None) -> PoolList:
        return self._call("GET", "/v1/pools", PoolList, query={"limit": limit, "cursor": cursor})

    def pool(self, pool_id: str) -> Pool:
        return self._call("GET", f"/v1/pools/{_quoted(pool_id)}", Pool)

    def pool_health(self, pool_id: str) -> PoolHealth:
        return self._call("GET", f"/v1/pools/{_quoted(pool_id)}/health", PoolHealth)

    def watch_pool(self, pool_id: str) -> Iterator[PoolHealth]:
        """The pool's health about twice a second, the first after one wait; for as long as the caller wants it."""
        while True:
            self._sleep(POLL_S)
            yield self.pool_health(pool_id)

    def drain_pool(self, pool_id: str, deadline_ms: int) -> PoolHealth:
        """Begin a drain, or give the one that runs a new deadline. The pool's health as it is then."""
        body = DrainRequest(deadline_ms=deadline_ms)
        return self._call("POST", f"/v1/pools/{_quoted(pool_id)}/drain", PoolHealth, body=body)

    def reload_pool(self, pool_id: str, new_model_ref: str) -> PoolHealth:
        """Begin a reload. The pool's health as it is then.

        Where the connection breaks it may have begun, and a second request would be in conflict with it.
        """
        body, path = ReloadRequest(new_model_ref=new_model_ref), f"/v1/pools/{_quoted(pool_id)}/reload"
        return self._call("POST", path, PoolHealth, body=body, is_repeatable=False)

    def capabilities(self) -> Capabilities:
        return self._call("GET", "/v1/capabilities", Capabilities)

    def stream(self, task_id: str, last_event_id: str = "") -> Generator[Frame, None, None]:
        """The task's frames, to its `end` or `error`. Each comes once, also over broken connections."""
        path, failures = f"/v1/tasks/{_quoted(task_id)}/stream", 0
        while True:
            parser = SseParser(last_event_id)
            cause: Exception | None = None
            try:
                for frame in self._frames(path, parser):
                    failures, last_event_id = 0, parser.last_id
                    if isinstance(frame, Error) and frame.policy_label == "slow-reader":
                        break  # about this connection, not about the task: take the stream up again behind it
                    yield frame
                    if isinstance(frame, EndFrame | Error):
                        return
            except httpx.TransportError as error:
                cause = error
            except UnreachableError as error:
                if not error.is_refused:  # else a tunnel or a proxy may be back soon
                    raise
                cause = error
            failures += 1
            if failures >= self._attempts_max:
                raise UnreachableError(f"the stream of task {task_id} broke and could not be taken up again") from cause
            self._sleep(_backoff_s(failures) if parser.retry_ms is None else min(parser.retry_ms / 1000, 10.0))

    # --- HTTP ---

    def _frames(self, path: str, parser: SseParser) -> Iterator[Frame]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": parser.last_id} if parser.last_id else {})
        request = self._request("GET", path, headers=headers, timeout=STREAM_TIMEOUT_S)
        with contextlib.closing(self._send(request, stream=True)) as answer:
            for chunk in answer.iter_bytes():
                for message in self._messages(parser, chunk):
                    if message.event in FRAMES:  # others: a later version's
                        yield self._decoded(message.data, FRAMES[message.event])

    def _messages(self, parser: SseParser, chunk: bytes) -> Iterator[Any]:
        try:
            yield from parser.feed(chunk)
        except SseTooLarge as error:
            raise UnreachableError(str(error)) from error

    def _call(self, method: str, path: str, type: type[T], **parts: Any) -> T:
        answer: T = self._decoded(self._answer(method, path, **parts).content, type)
        return answer

    def _answer(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        query: dict[str, Any] | None = None,
        is_repeatable: bool = True,
    ) -> httpx.Response:
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        params = {key: str(value) for key, value in (query or {}).items() if value is not None}
        request = self._request(method, path, content=content, headers=headers, params=params)
        return self._send(request, is_repeatable=is_repeatable)

    def _request(self, method: str, path: str, *, headers: dict[str, str], **parts: Any) -> httpx.Request:
        headers = headers | {"Authorization": f"Bearer {self._token}"}
        return self._http.build_request(method, path, headers=headers, **parts)

    def _send(self, request: httpx.Request, *, stream: bool = False, is_repeatable: bool = True) -> httpx.Response:
        """The successful answer, after as many attempts as the guidance allows. What is not repeatable is sent again
        after a refusal only: then nothing has happened."""
        waited_s, attempt = 0.0, 0
        while True:
            attempt += 1
            try:
                answer = self._http.send(request, stream=stream)
                if answer.is_success:
                    return answer
                failure = self._failure(answer)
                wait_s = failure.retry_after_s or _backoff_s(attempt)
                if not failure.can_pass or attempt >= self._attempts_max or waited_s + wait_s > self._wait_max_s:
                    raise failure
            except httpx.ConnectError as error:
                raise UnreachableError(f"nothing answers at {self.url}", is_refused=True) from error
            except httpx.TransportError as error:  # cut off half-way
                is_final = not is_repeatable or attempt >= self._attempts_max
                if is_final or isinstance(error, httpx.TimeoutException):
                    raise UnreachableError(f"no answer from {self.url}: {error}") from error
                wait_s = _backoff_s(attempt)
            self._sleep(wait_s)
            waited_s += wait_s

    def _failure(self, answer: httpx.Response) -> ApiError:
        with contextlib.closing(answer):
            content = answer.read()
        try:
            error = msgspec.json.decode(content, type=Error)
        except _BAD_JSON:  # something between us and the service
            error = Error(
                code=ErrorCode.INTERNAL,
                message=f"HTTP status {answer.status_code} without an error body of llama-orch; check LLORCH_URL",
                engine=None,
                correlation_id=answer.headers.get("X-Correlation-Id", "")[:128] or self.correlation_id,
            )
        return ApiError(answer.status_code, error, _retry_after_s(answer.headers, error))

    def _decoded(self, content: bytes | str, type: type[Any]) -> Any:
        try:
            return msgspec.json.decode(content, type=type)
        except _BAD_JSON as error:
            message = f"{self.url} answered something else than the contract's {type.__name__}: {error}"
            raise UnreachableError(f"{message}; client and server may be of different versions") from error


def _retry_after_s(headers: httpx.Headers, error: Error) -> float | None:
    """The wait that the server asks for: the finest figure that it gave (HP-ERR-2)."""
    figures = ((headers.get("X-Backoff-Ms"), 1000), (headers.get("Retry-After"), 1))
    for figure, per_s in figures:
        if figure and figure.isascii() and figure.isdigit() and len(figure) <= 15:
            return int(figure) / per_s
    return None if error.retry_after_ms is UNSET else error.retry_after_ms / 1000


def _backoff_s(attempt: int) -> float:
    """Where the server named no wait: 0.25 s, doubled each time, to 4 s."""
    return math.ldexp(0.25, min(attempt - 1, 4))


def _quoted(part: str) -> str:
    return quote(part, safe="")
