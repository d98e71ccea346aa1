"""The client that blocks."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import httpx

from llama_orch.client import calls, wire
from llama_orch.client.calls import Call
from llama_orch.client.errors import UnreachableError
from llama_orch.client.reading import Answer, Frame, Reading, answer_of
from llama_orch.client.retry import ATTEMPTS_MAX, WAIT_MAX_S, Attempts, Patience
from llama_orch.contract.models import (
    AdmissionResponse,
    Artifact,
    ArtifactKind,
    ArtifactList,
    ArtifactRef,
    Capabilities,
    FetchRequest,
    FetchResult,
    PolicyDecision,
    Pool,
    PoolHealth,
    PoolList,
    SessionInfo,
    StoredArtifact,
    TaskList,
    TaskRequest,
    TaskState,
    TaskStatus,
)

T = TypeVar("T")


class Client:
    """A service at `url`, such as http://127.0.0.1:8080. One for each thread.

    Every method tries again as `llama_orch.client.retry` says, within `attempts_max` requests and `wait_max_s` seconds
    of waiting, and raises ApiError (the service said no), or UnreachableError (it said nothing that could be used).
    `waits_for_start` False: a service that has never answered this client is not waited for. For tests: `sleep` takes
    seconds, `dice` gives a number from 0 up to 1, `transport` carries the requests.
    """

    def __init__(
        self,
        url: str,
        token: str,
        *,
        attempts_max: int = ATTEMPTS_MAX,
        wait_max_s: float = WAIT_MAX_S,
        waits_for_start: bool = True,
        sleep: Callable[[float], None] = time.sleep,
        dice: Callable[[], float] = random.random,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._peer = wire.Peer(url, token)
        self._patience = Patience(attempts_max, wait_max_s, waits_for_start, dice)
        self._sleep = sleep
        self._http = httpx.Client(transport=transport, **self._peer.options())

    @property
    def url(self) -> str:
        return self._peer.url

    @property
    def correlation_id(self) -> str:
        """Sent with every request."""
        return self._peer.correlation_id

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # -- tasks -------------------------------------------------------------------------------------------------------

    def run(self, request: TaskRequest) -> Answer:
        """Submit the task and read it to its end. Raises TaskFailed for its `error` frame. Left half-way, by an
        exception or Ctrl-C, the task goes on: give the request a `task_id` to be able to `cancel` it."""
        task_id = self.submit(request).task_id
        with contextlib.closing(self.stream(task_id)) as frames:
            return answer_of(task_id, frames)

    def submit(self, request: TaskRequest) -> AdmissionResponse:
        """Have the task admitted. It gets a `task_id` if it has none: however often this is sent, it runs once."""
        return self._call(calls.submit(request))

    def stream(self, task_id: str, last_event_id: str = "") -> Generator[Frame, None, None]:
        """The task's frames, to its `end` or `error`. Each comes once, also over broken connections."""
        reading = Reading(self._peer, task_id, last_event_id)
        attempts = self._attempts()
        while not reading.is_over:
            cause: Exception | None = None
            with contextlib.closing(self._send(reading.call(), attempts, stream=True)) as answer:
                try:
                    for chunk in answer.iter_bytes():
                        for frame in reading.feed(chunk):
                            attempts.renew()
                            yield frame
                except httpx.TransportError as error:
                    cause = error
            if not reading.is_over:
                self._sleep(attempts.broke(reading.what, cause, reading.retry_s))

    def cancel(self, task_id: str) -> None:
        """Cancel the task; one that has ended is left as it is."""
        self._call(calls.cancel(task_id))

    def get_task(self, task_id: str) -> TaskStatus:
        return self._call(calls.get_task(task_id))

    def list_tasks(
        self,
        *,
        state: TaskState | None = None,
        session_id: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> TaskList:
        """One page, newest first; `next_cursor` of the answer leads to the next."""
        return self._call(calls.list_tasks(state, session_id, limit, cursor))

    # -- artifacts ---------------------------------------------------------------------------------------------------

    def put_artifact(self, artifact: Artifact) -> ArtifactRef:
        """Store an artifact; equal content is one artifact. Once this returns it is on the service's disk."""
        return self._call(calls.put_artifact(artifact))

    def get_artifact(self, artifact_id: str) -> StoredArtifact:
        return self._call(calls.get_artifact(artifact_id))

    def list_artifacts(
        self,
        *,
        kind: ArtifactKind | None = None,
        tag: str | None = None,
        parent: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> ArtifactList:
        """One page, newest first; `next_cursor` of the answer leads to the next."""
        return self._call(calls.list_artifacts(kind, tag, parent, limit, cursor))

    def delete_artifact(self, artifact_id: str) -> None:
        """Delete the artifact. Those that come from it stay. Where the connection breaks it may be gone."""
        self._call(calls.delete_artifact(artifact_id))

    # -- pools and the installation ----------------------------------------------------------------------------------

    def session(self, session_id: str) -> SessionInfo:
        return self._call(calls.session(session_id))

    def delete_session(self, session_id: str) -> None:
        """End the session; nothing where there is none."""
        self._call(calls.delete_session(session_id))

    def pools(self, *, limit: int | None = None, cursor: str | None = None) -> PoolList:
        return self._call(calls.pools(limit, cursor))

    def pool(self, pool_id: str) -> Pool:
        return self._call(calls.pool(pool_id))

    def pool_health(self, pool_id: str) -> PoolHealth:
        return self._call(calls.pool_health(pool_id))

    def watch_pool(self, pool_id: str) -> Iterator[PoolHealth]:
        """The pool's health about twice a second, the first after one wait; for as long as the caller wants it."""
        while True:
            self._sleep(calls.POLL_S)
            yield self.pool_health(pool_id)

    def drain_pool(self, pool_id: str, deadline_ms: int) -> PoolHealth:
        """Begin a drain, or give the one that runs a new deadline. The pool's health as it is then."""
        return self._call(calls.drain_pool(pool_id, deadline_ms))

    def reload_pool(self, pool_id: str, new_model_ref: str) -> PoolHealth:
        """Begin a reload. The pool's health as it is then. Where the connection breaks it may have begun."""
        return self._call(calls.reload_pool(pool_id, new_model_ref))

    def check_outbound(self, url: str) -> PolicyDecision:
        """What the service's outbound policy says about a request that it would make; it makes none."""
        return self._call(calls.check_outbound(url))

    def fetch_url(self, request: FetchRequest) -> FetchResult:
        """Have the service fetch a text from elsewhere."""
        return self._call(calls.fetch_url(request))

    def capabilities(self) -> Capabilities:
        return self._call(calls.capabilities())

    def is_there(self) -> bool:
        """Whether a llama-orch answers at the address. Says nothing about the token, and does not send it."""
        try:
            return wire.is_healthy(self._http.get("/healthz"))
        except httpx.TimeoutException as error:
            raise UnreachableError(f"{self.url} takes connections but does not answer") from error
        except (httpx.TransportError, *wire.BAD_JSON):
            return False

    # -- HTTP --------------------------------------------------------------------------------------------------------

    def _call(self, call: Call[T]) -> T:
        content = self._send(call, self._attempts(is_repeatable=call.is_repeatable)).content
        answer: Any = None if call.answer is None else self._peer.decoded(content, call.answer)
        return answer  # type: ignore[no-any-return]

    def _attempts(self, *, is_repeatable: bool = True) -> Attempts:
        return Attempts(self._peer, self._patience, is_repeatable=is_repeatable)

    def _send(self, call: Call[Any], attempts: Attempts, *, stream: bool = False) -> httpx.Response:
        """The successful answer, after as many attempts as it takes; its body unread where it is a stream."""
        timeout = wire.STREAM_TIMEOUT_S if stream else wire.ANSWER_TIMEOUT_S
        while True:
            request = self._http.build_request(**call.parts(), timeout=timeout)
            request.headers.update(self._peer.authorization)
            try:
                answer = self._http.send(request, stream=stream)
                if answer.is_success:
                    self._peer.has_answered = True
                    return answer
                with contextlib.closing(answer):
                    content = answer.read()
            except httpx.TransportError as error:
                wait_s = attempts.failed(error)
            else:
                wait_s = attempts.refused(answer.status_code, answer.headers, content)
            self._sleep(wait_s)
