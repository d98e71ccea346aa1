"""One request of OpenAI's API at work: its task, from admission to the last frame. Whoever began it calls `leave` in
the end, and a task that nobody listens to any more is canceled (HP-OAI-6)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import msgspec
from msgspec import UNSET, Struct, structs
from starlette.types import Receive, Scope, Send

from llama_orch.api.service import Reader, Service
from llama_orch.api.sse import EventStream
from llama_orch.context import correlation_id
from llama_orch.contract.models import AdmissionResponse, EndFrame, Error, TaskRequest, TokenFrame
from llama_orch.errors import LlorchError, NotFound, PoolUnready
from llama_orch.openai.answers import Chunks, Frame, data_line, frames_of
from llama_orch.openai.errors import openai_error

PATIENCE_S = 600.0  # for a model that has to be there before its task can be judged; what these clients wait by default
ASK_AGAIN_S = 5.0  # at the latest: loads end earlier than predicted, too
COMMENT_S = 1.0  # between two comments meanwhile, as between the frames of a task that waits
WAITING_FOR_MODEL = b": waiting for the model\n\n"

log = logging.getLogger("llama_orch.api")


class TaskEnded(LlorchError):
    """The task ended with an error: it becomes the answer."""

    def __init__(self, error: Error, task_id: str) -> None:
        wait_ms = None if error.retry_after_ms is UNSET else error.retry_after_ms
        super().__init__(error.message, engine=error.engine, retry_after_ms=wait_ms)
        self.code = error.code  # type: ignore[misc]  # of this instance
        self._task_id = task_id

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "X-Task-Id": self._task_id}


class Waiters:
    """Those who wait for a model before they are admitted: each holds a connection and a body, so there is a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._runs: set[Run] = set()

    def take(self, run: Run) -> bool:
        """Whether there is room, or the run has it already."""
        if run not in self._runs and len(self._runs) >= self._limit:
            return False
        self._runs.add(run)
        return True

    def release(self, run: Run) -> None:
        self._runs.discard(run)


class Run:
    """`request` has its `task_id`."""

    def __init__(self, service: Service, request: TaskRequest, waiters: Waiters) -> None:
        self._service = service
        self._waiters = waiters
        self._request = request
        self.task_id = request.task_id or ""
        self._admission: AdmissionResponse | None = None
        self._reader: Reader | None = None
        self._has_ended = False
        self._now = asyncio.get_running_loop().time
        limits_s = [PATIENCE_S] + ([request.deadline_ms / 1000] if request.deadline_ms else [])
        self._began, self._gives_up = self._now(), self._now() + min(limits_s)
        self._asks_again = 0.0

    @property
    def is_admitted(self) -> bool:
        return self._reader is not None

    async def admit(self) -> None:
        """Submit the task; a conversation whose model is not there yet cannot be judged, and then is not admitted
        afterwards: ask again when `pause_s` is over. Raises every other refusal."""
        try:
            self._admission = await self._service.submit(self._request_now())
        except PoolUnready as error:
            wait_s = min(ASK_AGAIN_S, (error.retry_after_ms or 0) / 1000)
            self._asks_again = self._now() + wait_s
            if self._asks_again >= self._gives_up or not self._waiters.take(self):
                raise
        else:
            self._waiters.release(self)
            self._reader = self._service.open_stream(self.task_id, -1)

    def _request_now(self) -> TaskRequest:
        """What has passed already is off the deadline."""
        if self._request.deadline_ms is None:
            return self._request
        passed_ms = round((self._now() - self._began) * 1000)
        return structs.replace(self._request, deadline_ms=max(1, self._request.deadline_ms - passed_ms))

    async def frames(self) -> list[Frame] | None:
        """Of an admitted task; None after the last."""
        batch = None if self._reader is None else await self._reader.batch()
        if batch is None:
            return None
        frames = list(frames_of(batch))
        self._has_ended |= any(_is_last(frame) for frame in frames)
        return frames

    async def pause(self, limit_s: float) -> None:
        """Until it is time to ask again, at most so long."""
        await asyncio.sleep(max(0.0, min(limit_s, self._asks_again - self._now())))

    @property
    def is_time_to_ask(self) -> bool:
        return self._now() >= self._asks_again

    async def leave(self) -> None:
        self._waiters.release(self)
        if self._reader is not None:
            self._reader.close()
        if not self._has_ended:
            with suppress(NotFound):  # it was refused, or is long over
                await self._service.cancel(self.task_id)

    def headers(self) -> dict[str, str]:
        headers = {"X-Task-Id": self.task_id}
        if self._admission is not None:
            told = {
                "X-Queue-Position": self._admission.queue_position,
                "X-Predicted-Start-Ms": self._admission.predicted_start_ms,
            }
            headers |= {name: str(value) for name, value in told.items() if value is not None}
        return headers | self._service.budgets_left(self._request.session_id).headers()


def _is_last(frame: Frame) -> bool:
    """Of the task: a reader that is cut off for being slow leaves it running."""
    return isinstance(frame, EndFrame) or (isinstance(frame, Error) and frame.policy_label != "slow-reader")


class ChunkReader:
    """The frames of a run as chunks. A refusal that comes late, since the model had to be there first, is the last."""

    def __init__(self, run: Run, chunks: Chunks) -> None:
        self._run = run
        self._chunks = chunks
        self._is_over = False

    async def batch(self) -> bytes | None:
        if self._is_over:
            return None
        if not self._run.is_admitted:
            return await self._ask_again()
        while (frames := await self._run.frames()) is not None:
            if content := b"".join(map(self._chunks.of, frames)):
                return content
        return None

    async def _ask_again(self) -> bytes:
        await self._run.pause(COMMENT_S)
        try:
            if self._run.is_time_to_ask:
                await self._run.admit()
        except LlorchError as error:
            self._is_over = True
            return data_line(openai_error(error.body(correlation_id.get())))
        return WAITING_FOR_MODEL

    def close(self) -> None:
        """The run is left by whoever began it."""


class ChunkedAnswer:
    """An ASGI response: the stream. What is refused before it begins is an answer like any other."""

    def __init__(self, run: Run, chunks: Chunks) -> None:
        self._run = run
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._run.admit()
            reader = ChunkReader(self._run, self._chunks)
            await EventStream(lambda after: reader, self._run.headers())(scope, receive, send)
        finally:
            await self._run.leave()


class _ClientGone(Exception):
    """Nobody waits for the answer any more."""


class WholeAnswer:
    """An ASGI response: everything at once, when the task has ended. `put` makes the body."""

    def __init__(self, run: Run, put: Callable[[Sequence[TokenFrame], EndFrame], Struct]) -> None:
        self._run = run
        self._put = put

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome: Struct | LlorchError | None = None
        try:
            async with asyncio.TaskGroup() as group:
                watcher = group.create_task(_watch(receive))
                outcome = await self._outcome()
                watcher.cancel()
        except* _ClientGone:
            log.info("an answer's client went away [%s]", correlation_id.get())
        finally:
            await self._run.leave()
        if isinstance(outcome, LlorchError):
            raise outcome
        if outcome is not None:
            await self._send(outcome, send)

    async def _outcome(self) -> Struct | LlorchError:
        """A refusal is returned, since a group of tasks would wrap it."""
        try:
            await self._run.admit()
            while not self._run.is_admitted:
                await self._run.pause(ASK_AGAIN_S)
                await self._run.admit()
            return await self._read()
        except LlorchError as error:
            return error

    async def _read(self) -> Struct:
        answer: list[TokenFrame] = []
        while (frames := await self._run.frames()) is not None:
            for frame in frames:
                if isinstance(frame, TokenFrame):
                    answer.append(frame)
                elif isinstance(frame, EndFrame):
                    return self._put(answer, frame)
                elif isinstance(frame, Error):
                    raise TaskEnded(frame, self._run.task_id)
        raise RuntimeError(f"the stream of task {self._run.task_id} has no last frame")

    async def _send(self, outcome: Struct, send: Send) -> None:
        body = msgspec.json.encode(outcome)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **self._run.headers()}
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})
        await send({"type": "http.response.body", "body": body})


async def _watch(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise _ClientGone
