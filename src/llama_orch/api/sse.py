"""Server-Sent Events. One send per wake-up of the reader, a comment when nothing was sent for a while, and an end in
every case: the task's last frame, a client that went away, a client that does not read, or the service's own end. The
reader is closed in all of them and no task is left behind."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping

from starlette.types import Receive, Scope, Send

from llama_orch.api.service import Reader
from llama_orch.context import correlation_id
from llama_orch.errors import InvalidParams

HEARTBEAT_S = 15.0
SEND_LIMIT_S = 30.0
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold frames back
]

log = logging.getLogger("llama_orch.api")
_is_frame_number = re.compile(rb"[0-9]{1,18}").fullmatch


class _ClientGone(Exception):
    """The connection closed, or the client has not read for too long."""


def last_event_id(scope: Scope) -> int:
    """The number of the last frame that the client has, -1 for none."""
    value = next((value for name, value in scope["headers"] if name == b"last-event-id"), None)
    if value is None:
        return -1
    if not _is_frame_number(value):
        raise InvalidParams("header Last-Event-ID: must be the `id` of a frame, a whole number from 0")
    return int(value)


class EventStream:
    """An ASGI response. `open_reader` gets the number of the last frame that the client has; its refusals become
    answers, because nothing has been sent by then."""

    def __init__(
        self,
        open_reader: Callable[[int], Reader],
        headers: Mapping[str, str] | None = None,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        send_limit_s: float = SEND_LIMIT_S,
    ) -> None:
        self._open_reader = open_reader
        self._headers = [
            *HEADERS,
            *((name.lower().encode(), value.encode()) for name, value in (headers or {}).items()),
        ]
        self._heartbeat_s = heartbeat_s
        self._send_limit_s = send_limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = self._open_reader(last_event_id(scope))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers})
            if scope["method"] == "HEAD" or await self._pass_on(reader, receive, send):
                await send({"type": "http.response.body", "body": b""})
        finally:
            reader.close()

    async def _pass_on(self, reader: Reader, receive: Receive, send: Send) -> bool:
        """Whether the client got everything."""
        gone: _ClientGone | None = None
        try:
            await _Connection(reader, receive, send).run(self._heartbeat_s, self._send_limit_s)
        except* _ClientGone as group:
            gone = next(exc for exc in group.exceptions if isinstance(exc, _ClientGone))
        if gone:
            log.info("%s [%s]", gone, correlation_id.get())
        return gone is None


class _Connection:
    """One client at one reader. `since` is when the present phase, sending or waiting, began."""

    def __init__(self, reader: Reader, receive: Receive, send: Send) -> None:
        self._reader, self._receive, self._send = reader, receive, send
        self._now = asyncio.get_running_loop().time
        self._is_sending, self._since = False, self._now()

    async def run(self, heartbeat_s: float, send_limit_s: float) -> None:
        """Returns after the last frame. The helpers end with the pump, and the pump with the first helper that gives
        up."""
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(self._watch()), group.create_task(self._tick(heartbeat_s, send_limit_s))]
            await self._pump()
            for helper in helpers:
                helper.cancel()

    async def _pump(self) -> None:
        while (frames := await self._reader.batch()) is not None:
            self._is_sending, self._since = True, self._now()
            await self._send({"type": "http.response.body", "body": frames, "more_body": True})
            self._is_sending, self._since = False, self._now()

    async def _watch(self) -> None:
        """A send to a closed connection does nothing in ASGI; only `receive` tells."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        raise _ClientGone("a stream's client went away")

    async def _tick(self, heartbeat_s: float, send_limit_s: float) -> None:
        while True:
            left = self._since + (send_limit_s if self._is_sending else heartbeat_s) - self._now()
            if left > 0:  # never longer than a heartbeat: the phase may change meanwhile
                await asyncio.sleep(min(left, heartbeat_s))
            elif self._is_sending:
                raise _ClientGone(f"a stream's client has not read for {send_limit_s:g} s")
            else:
                await self._keep_alive(send_limit_s)

    async def _keep_alive(self, send_limit_s: float) -> None:
        try:
            async with asyncio.timeout(send_limit_s):
                await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        except TimeoutError:
            raise _ClientGone(f"a stream's client has not read for {send_limit_s:g} s") from None
        self._since = self._now()
