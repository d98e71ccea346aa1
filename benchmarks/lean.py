"""A client of HTTP that costs next to nothing, so that what is measured is the server: raw asyncio, one connection for
each request in flight, kept open. And the processor time of a process, as the kernel counts it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import httptools

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """User and system time of the process's threads so far, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * _TICK_S


def resident_bytes(pid: int) -> int:
    """What it has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Connection(asyncio.Protocol):
    """One request at a time. `target` is http://host:port or the path of a Unix socket."""

    def __init__(self, target: str, headers: Mapping[str, str]) -> None:
        self._target = target
        self._lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self._transport: asyncio.Transport | None = None
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.chunks: list[bytes] = []
        self.first_at = 0.0  # of the body
        self._is_complete = False
        self._is_closed = False
        self._something = asyncio.Event()

    async def _open(self) -> asyncio.Transport:
        if self._transport is None or self._transport.is_closing():
            loop = asyncio.get_running_loop()
            if self._target.startswith("http"):
                where = urlsplit(self._target)
                opened = loop.create_connection(lambda: self, where.hostname, where.port)
                transport, _ = await opened
            else:
                transport, _ = await loop.create_unix_connection(lambda: self, self._target)
            self._transport = transport
        return self._transport

    async def send(self, method: str, path: str, body: bytes = b"") -> None:
        transport = await self._open()
        self._begin()
        head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{self._lines}"
        if body or method != "GET":
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        transport.write(f"{head}\r\n".encode() + body)

    async def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The whole answer."""
        await self.send(method, path, body)
        async for _ in self.parts():
            pass
        return b"".join(self.chunks)

    async def parts(self) -> AsyncIterator[bytes]:
        """What comes of the body, as it comes; all of it stays in `chunks`."""
        seen = 0
        while True:
            if seen < len(self.chunks):
                seen += 1
                yield self.chunks[seen - 1]
            elif self._is_complete:
                return
            elif self._is_closed:
                raise ConnectionError("the server closed the connection in the middle of an answer")
            else:
                self._something.clear()
                await self._something.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # What asyncio and httptools call.

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        self._something.set()

    def on_status(self, _status: bytes) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if not self.chunks:
            self.first_at = time.perf_counter()
        self.chunks.append(data)
        self._something.set()

    def on_message_complete(self) -> None:
        self._is_complete = True
        self._something.set()
