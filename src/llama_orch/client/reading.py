"""What has been read of one task's stream, over as many connections as it takes. No I/O.

Invariant: the frames that come out are the task's own, in their order, each once; one that was cut off half-way comes
out whole, from the next connection.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llama_orch.client import calls
from llama_orch.client.errors import TaskFailed, UnreachableError
from llama_orch.client.sse import SseMessage, SseParser, SseTooLarge
from llama_orch.client.wire import Peer
from llama_orch.contract.models import FRAMES, EndFrame, Error, MetricsFrame, StartedFrame, TokenFrame

Frame = StartedFrame | TokenFrame | MetricsFrame | EndFrame | Error

RETRY_MAX_S = 10.0  # of a stream's own `retry:`


class Answer(NamedTuple):
    """A task that succeeded: its text, and the frame with the figures that repeat the run."""

    text: str
    end: EndFrame


class Reading:
    """A position in a stream. For each connection: send `call()`, and give `feed` what comes, until `is_over`."""

    def __init__(self, peer: Peer, task_id: str, last_event_id: str) -> None:
        self.what = f"the stream of task {task_id}"
        self.is_over = False
        self._peer = peer
        self._task_id = task_id
        self._parser = SseParser(last_event_id)
        self._last = last_event_id
        self._is_cut = False

    @property
    def retry_s(self) -> float | None:
        """The wait before the next connection that the server asked for."""
        return None if self._parser.retry_ms is None else min(self._parser.retry_ms / 1000, RETRY_MAX_S)

    def call(self) -> calls.Call[None]:
        """The request for what comes behind the last whole frame. Whatever the last connection left half-way is
        forgotten."""
        retry_ms = self._parser.retry_ms
        self._parser, self._is_cut = SseParser(self._last), False
        self._parser.retry_ms = retry_ms
        return calls.stream(self._task_id, self._last)

    def feed(self, chunk: bytes) -> Iterator[Frame]:
        """The frames that are complete with these bytes. Raises UnreachableError for what is no stream of ours."""
        try:
            for message in self._parser.feed(chunk):
                if (frame := self._frame(message)) is not None:
                    yield frame
        except SseTooLarge as error:
            raise UnreachableError(f"{self.what}: {error}") from error

    def _frame(self, message: SseMessage) -> Frame | None:
        if self.is_over or self._is_cut:
            return None
        if message.event not in FRAMES:  # a later version's
            self._last = message.id
            return None
        frame: Frame = self._peer.decoded(message.data, FRAMES[message.event])
        if isinstance(frame, Error) and frame.policy_label == "slow-reader":
            self._is_cut = True  # about this connection, not about the task: another one goes on behind it
            return None
        if self._is_old(message.id):
            return None
        self._last = message.id
        self.is_over = isinstance(frame, EndFrame | Error)
        return frame

    def _is_old(self, number: str) -> bool:
        """Whether we have it already: somebody in between has replayed it."""
        return _is_number(number) and _is_number(self._last) and int(number) <= int(self._last)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18


def answer_of(task_id: str, frames: Iterable[Frame]) -> Answer:
    """What the frames of a whole stream come to. Raises TaskFailed."""
    texts: list[str] = []
    for frame in frames:
        if isinstance(frame, TokenFrame):
            texts.append(frame.t)
        elif isinstance(frame, EndFrame):
            return Answer("".join(texts), frame)
        elif isinstance(frame, Error):
            raise TaskFailed(task_id, frame, "".join(texts))
    raise ValueError(f"the stream of task {task_id} has no last frame")
