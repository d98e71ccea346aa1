"""Requests to one server through the service's one door out, and what their failures mean.

Everything that the other side sends is bounded: heads by the parser, bodies by `Limits`, silence and slowness by time.
Its words are shortened, and the key is struck out of them, before anybody reads them.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Literal

import msgspec

from llama_orch.contract.config import OpenaiServerSettings
from llama_orch.engines.base import JobRefused, RunStalled, WorkerLost
from llama_orch.engines.remote.dialect import Event, Lines, Nonsense
from llama_orch.errors import PolicyDenied, UpstreamFailed
from llama_orch.outbound.door import Limits, Outbound, Reply

ANSWER_BYTES_MAX = 8 << 20
_FAULT_BYTES_MAX = 1 << 16
_FAULT_CHARS_MAX = 300
STREAM_BYTES_BASE, STREAM_BYTES_PER_TOKEN = 4 << 20, 4096  # an event is some hundred bytes
RETRY_AFTER_S, RETRY_AFTER_MAX_S = 1.0, 60.0
BUSY = (429, 503)
_JOBS_FAULT = (400, 402, 403, 413, 415, 422)


class Busy(Exception):
    """The server takes no more now; after `retry_after_s` it may."""

    def __init__(self, reason: str, retry_after_s: float) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Broke(Exception):
    """The exchange broke off, or the server failed. The text is for people."""


class RemoteClient:
    """Speaks to one server. Safe for concurrent use; holds no connection between requests."""

    def __init__(self, door: Outbound, server: OpenaiServerSettings, key: str | None) -> None:
        self.base_url = server.base_url.rstrip("/")
        self.root_url = self.base_url.removesuffix("/v1")  # where /health, /props and /tokenize are
        self.name = f"server {server.name}"
        self._door = door
        self._key = key
        self._connect_s = server.connect_timeout_ms / 1000

    def said(self, text: str) -> str:
        """What the server says, fit for people."""
        text = text if self._key is None else text.replace(self._key, "[redacted]")
        return re.sub(r"[^\x20-\x7e\xa1-\ud7ff]+", " ", text)[:_FAULT_CHARS_MAX].strip()

    async def ask(
        self, method: Literal["GET", "POST"], url: str, body: bytes = b"", *, limit_s: float, bytes_max: int = 0
    ) -> tuple[int, bytes]:
        """One request and the whole of its answer: HTTP status and body. Raises Broke and WorkerLost."""
        async with self._open(method, url, body, self._whole(limit_s, bytes_max)) as reply:
            return reply.http_status, b"".join([chunk async for chunk in reply.chunks()])

    async def demand(self, url: str, body: bytes, *, limit_s: float, bytes_max: int = 0) -> bytes:
        """The same of a POST that has to succeed. Raises Busy and JobRefused as well."""
        async with self._open("POST", url, body, self._whole(limit_s, bytes_max)) as reply:
            if reply.http_status != 200:
                raise await self._failure(reply)
            return b"".join([chunk async for chunk in reply.chunks()])

    def _whole(self, limit_s: float, bytes_max: int) -> Limits:
        """Of an answer that is read as a whole."""
        connect_s = min(limit_s, self._connect_s)
        return Limits(bytes_max or ANSWER_BYTES_MAX, limit_s, idle_s=limit_s, connect_s=connect_s, answer_s=limit_s)

    async def events(self, path: str, body: bytes, *, tokens_max: int, idle_s: float) -> AsyncGenerator[Event, None]:
        """A stream's events, up to its end. Raises Busy, Broke, JobRefused, WorkerLost, and RunStalled when no event
        came for `idle_s`, whatever else did."""
        began = asyncio.get_running_loop().time()
        bytes_max = STREAM_BYTES_BASE + STREAM_BYTES_PER_TOKEN * tokens_max
        limits = Limits(bytes_max, None, idle_s=idle_s, connect_s=self._connect_s, answer_s=idle_s)
        try:
            async with aclosing(self._events(path, body, limits)) as events:
                async for event in events:
                    yield event
                    began = asyncio.get_running_loop().time()
        except Broke as error:
            if asyncio.get_running_loop().time() - began >= idle_s:  # too late to try again
                raise RunStalled(str(error)) from error
            raise

    async def _events(self, path: str, body: bytes, limits: Limits) -> AsyncGenerator[Event, None]:
        async with self._open("POST", self.base_url + path, body, limits) as reply:
            if reply.http_status != 200:
                raise await self._failure(reply)
            kind = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "text/event-stream":
                raise Broke(f"{self.name} does not stream: its answer is of type {self.said(kind)[:60] or 'none'}")
            async with aclosing(self._timed(reply, limits.idle_s)) as events:
                async for event in events:
                    yield event

    async def _timed(self, reply: Reply, idle_s: float) -> AsyncGenerator[Event, None]:
        loop, lines = asyncio.get_running_loop(), Lines()
        deadline = loop.time() + idle_s
        async with aclosing(reply.chunks()) as chunks:
            while (chunk := await self._next(chunks, deadline, idle_s)) is not None:
                has_event = False
                try:
                    for event in lines.feed(chunk):
                        has_event = True
                        yield event
                except Nonsense as error:
                    raise Broke(f"{self.name} sent {error}") from error
                if has_event:  # time in which nobody reads is not the server's
                    deadline = loop.time() + idle_s

    async def _next(self, chunks: AsyncGenerator[bytes, None], deadline: float, idle_s: float) -> bytes | None:
        """None at the end."""
        try:
            async with asyncio.timeout_at(deadline):
                return await anext(chunks, None)
        except TimeoutError as error:
            raise RunStalled(f"{self.name} sent no token for {idle_s:g} s") from error

    @asynccontextmanager
    async def _open(
        self, method: Literal["GET", "POST"], url: str, body: bytes, limits: Limits
    ) -> AsyncIterator[Reply]:
        headers: dict[str, str] = {"accept": "application/json, text/event-stream"}
        if body:
            headers["content-type"] = "application/json"
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            async with self._door.call(method, url, limits=limits, headers=headers, body=body) as reply:
                if reply.http_status == 401:
                    raise WorkerLost(f"{self.name} refuses the key (401): see to api_key_file")
                if 300 <= reply.http_status < 400:
                    raise WorkerLost(f"{self.name} redirects ({reply.http_status}), which is not followed")
                yield reply
        except UpstreamFailed as error:
            raise Broke(f"{self.name}: {error.message}") from error
        except PolicyDenied as error:
            raise WorkerLost(error.message) from error

    async def _failure(self, reply: Reply) -> Exception:
        """What an answer that is not 200 means."""
        status = reply.http_status
        reason = f"{self.name} answers {status}: {self.said(await self._fault(reply)) or 'nothing'}"
        if status in BUSY:
            return Busy(reason, retry_after_s(reply.headers))
        if status == 404:
            return WorkerLost(reason)  # the model, or the path, is not there any more
        return JobRefused(reason) if status in _JOBS_FAULT else Broke(reason)

    async def _fault(self, reply: Reply) -> str:
        """The message of an error's body, in the shapes that servers give it."""
        body = b""
        try:
            async for chunk in reply.chunks():
                body += chunk
                if len(body) > _FAULT_BYTES_MAX:
                    break
        except UpstreamFailed:
            pass  # the status says enough
        return fault_of(body)


def fault_of(body: bytes) -> str:
    """`{"error": {"message"}}`, `{"error": "…"}`, `{"message"}`, `{"detail"}`, or the text itself."""
    try:
        found = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return body.decode(errors="replace")
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and name in found:
            found = found[name]
    return found if isinstance(found, str) else ""


def retry_after_s(headers: Mapping[str, str]) -> float:
    """Seconds, as the server says; a date is not taken for one."""
    text = headers.get("retry-after", "")
    return min(RETRY_AFTER_MAX_S, float(text)) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text) else RETRY_AFTER_S
