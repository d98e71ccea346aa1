"""A task's frames: one writer, many readers, replay (HP-STR-1, HP-STR-7).

The log is the stream: frames are encoded once, when they are written, and kept until the task is forgotten, so a reader
that comes late or comes back reads the same bytes. A reader never holds the writer up: it owns a position, not a queue.
Of `metrics` frames that follow each other only the newest is kept, so a long wait does not grow the log.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple

import msgspec

from llama_orch.contract.models import EndFrame, Error, MetricsFrame, StartedFrame, TokenLogprob, ToolCallPiece
from llama_orch.errors import PolicyDenied

BATCH_FRAMES_MAX = 256  # per read, so that a replay does not build one huge answer
BATCH_BYTES_MAX = 1 << 20  # the same, but for a single frame that is larger
TEXT_CHARS_MAX = 1 << 15  # of one `token` frame; what an engine says at once beyond that becomes several
FRAME_OVERHEAD_BYTES = 160  # what Python needs around a frame's bytes, about
LAG_FRAMES_MAX = 4096  # a reader that has once caught up may fall behind by this many frames

_encode = msgspec.json.Encoder().encode


class Frame(NamedTuple):
    number: int
    data: bytes  # as it goes over the wire


def encode_frame(number: int, event: str, payload: bytes) -> bytes:
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (number, event.encode(), payload)


class TaskStream:
    """The frames of one task, in order. `started` first; nothing after the last frame."""

    def __init__(self, started: StartedFrame) -> None:
        self._frames: list[Frame] = []
        self._next_number = 0
        self._texts: list[str] = []
        self._whole_text: str | None = None  # once ended
        self._readers: set[Reader] = set()
        self._is_last_metrics = False
        self.is_ended = False
        self.size_bytes = 0
        self._write("started", _encode(started))

    @property
    def text(self) -> str:
        return "".join(self._texts) if self._whole_text is None else self._whole_text

    def token(
        self, text: str, calls: list[ToolCallPiece] | None = None, likelihoods: list[TokenLogprob] | None = None
    ) -> None:
        """A `token` frame, or several where the text is so long that one would hold up a reader's connection; none for
        an empty text. Nothing once the stream has ended, whatever the engine still says (HP-STR-6). What belongs to the
        text comes with its first frame."""
        for start in range(0, 0 if self.is_ended else len(text), TEXT_CHARS_MAX):
            part = text[start : start + TEXT_CHARS_MAX]
            more = b"" if calls is None else b',"tool_calls":%b' % _encode([] if start else calls)
            more += b',"logprobs":%b' % _encode(likelihoods) if likelihoods and not start else b""
            self._write("token", b'{"t":%b,"i":%d%b}' % (_encode(part), len(self._texts), more))
            self._texts.append(part)
            self._is_last_metrics = False

    def metrics(self, frame: MetricsFrame) -> None:
        if self.is_ended:
            return
        if self._is_last_metrics:
            self.size_bytes -= len(self._frames.pop().data) + FRAME_OVERHEAD_BYTES
        self._write("metrics", _encode(frame))
        self._is_last_metrics = True

    def end(self, frame: EndFrame | Error) -> None:
        self._write("error" if isinstance(frame, Error) else "end", _encode(frame), is_last=True)
        self._whole_text, self._texts = self.text, []
        self.size_bytes += len(self._whole_text)

    def _write(self, event: str, payload: bytes, *, is_last: bool = False) -> None:
        if self.is_ended:
            raise RuntimeError(f"a {event} frame after the last one")
        data = encode_frame(self._next_number, event, payload)
        self._frames.append(Frame(self._next_number, data))
        self._next_number += 1
        self.size_bytes += len(data) + FRAME_OVERHEAD_BYTES
        self.is_ended = is_last
        for reader in self._readers:
            reader.wake()

    @property
    def frames(self) -> list[bytes]:
        """Every frame as it goes over the wire."""
        return [frame.data for frame in self._frames]

    def after(self, number: int) -> list[Frame]:
        """Frames behind the given number, a bounded batch of them."""
        if len(self._frames) > 1 and self._frames[-2].number <= number:  # who keeps up, and nearly all do
            return self._frames[-1:] if self._frames[-1].number > number else []
        start = bisect_right(self._frames, number, key=lambda frame: frame.number)
        found = self._frames[start : start + BATCH_FRAMES_MAX]
        sizes = accumulate(len(frame.data) for frame in found)
        return found[: max(1, sum(size <= BATCH_BYTES_MAX for size in sizes))]

    @property
    def last_number(self) -> int:
        return self._next_number - 1

    def open(self, after: int, *, correlation_id: str, on_close: Callable[[], None]) -> Reader:
        # Whoever names a number that is still to come has read wrongly; the last frame is always to be had (HP-STR-1).
        reader = Reader(self, min(after, self.last_number - int(self.is_ended)), correlation_id, on_close)
        self._readers.add(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        self._readers.discard(reader)


class Reader:
    """One client's position in a stream. `after`: the number of the last frame that the client has."""

    def __init__(self, stream: TaskStream, after: int, correlation_id: str, on_close: Callable[[], None]) -> None:
        self._stream = stream
        self._position = after
        self._correlation_id = correlation_id
        self._on_close: Callable[[], None] | None = on_close
        self._waiter: asyncio.Future[None] | None = None
        self._has_caught_up = False
        self._is_done = False

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def batch(self) -> bytes | None:
        """Encoded frames that are ready, at least one; None after the last."""
        while not self._is_done:
            if self._has_caught_up and self._stream.last_number - self._position > LAG_FRAMES_MAX:
                return self._cut_off()
            frames = self._stream.after(self._position)
            if frames:
                self._position = frames[-1].number
                return frames[0].data if len(frames) == 1 else b"".join(frame.data for frame in frames)
            self._has_caught_up = True
            if self._stream.is_ended:
                break
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return None

    def _cut_off(self) -> bytes:
        """The last frame of a reader that is too slow. The task goes on, and so may a new reader (HP-STR-7)."""
        self._is_done = True
        error = PolicyDenied(
            f"this reader fell more than {LAG_FRAMES_MAX} frames behind; connect again with "
            f"`Last-Event-ID: {self._position}`",
            policy_label="slow-reader",
        )
        return encode_frame(self._position, "error", _encode(error.body(self._correlation_id)))

    def close(self) -> None:
        """Idempotent."""
        self._stream.leave(self)
        self._is_done = True
        self.wake()
        if self._on_close is not None:
            self._on_close()
            self._on_close = None
