"""One HTTP/1.1 request and its answer over a Unix socket, on a connection of its own.

httptools parses, so this module only moves bytes and keeps the limits. Every way in which the other side can break the
exchange is a WorkerLost; what the answer says is the caller's to judge.
"""

from __future__ import annotations

import asyncio
import errno

import httptools

from llama_orch.engines.base import EngineBusy, WorkerLost

# Our own process or the machine has nothing left; the worker is not to blame.
NOTHING_LEFT = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN)
_READ_BYTES = 1 << 16
_HEADERS_MAX = 64
_BODY_BYTES_MAX = 64 << 20  # /tokenize answers about 7 bytes for each token


class Exchange:
    """Sends one request and reads its answer piece by piece."""

    def __init__(self, socket_path: str) -> None:
        self.http_status = 0  # 0 until the answer's head is read
        self.is_complete = False
        self._socket_path = socket_path
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._headers = 0
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, method: str, path: str, api_key: str, body: bytes) -> None:
        """Connect and send the request."""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\nAuthorization: Bearer {api_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        try:
            self._reader, self._writer = await asyncio.open_unix_connection(self._socket_path)
            self._writer.write(head.encode("ascii") + body)
            await self._writer.drain()
        except OSError as error:
            if error.errno in NOTHING_LEFT:
                raise EngineBusy(f"no connection to the worker could be made: {error.strerror}") from error
            raise WorkerLost(f"the worker does not take requests: {error.strerror or error}") from error

    async def read_head(self) -> int:
        """Read until the answer's head is there; returns its HTTP status."""
        while not self.http_status:
            await self._read_more()
        return self.http_status

    async def read_some(self) -> bytes:
        """The next bytes of the body; empty once all of it was returned."""
        while not self._pieces and not self.is_complete:
            await self._read_more()
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data

    async def read_all(self) -> bytes:
        """The whole body."""
        body = bytearray()
        while data := await self.read_some():
            body += data
            if len(body) > _BODY_BYTES_MAX:
                raise WorkerLost("the worker's answer is larger than any honest one")
        return bytes(body)

    def close(self) -> None:
        """Drop the connection at once; the worker takes it for a cancel."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def _read_more(self) -> None:
        if self._reader is None:
            raise WorkerLost("the request was never sent")
        try:
            data = await self._reader.read(_READ_BYTES)
            if not data:
                raise WorkerLost("the worker closed the connection in the middle of an answer")
            self._parser.feed_data(data)
        except OSError as error:
            raise WorkerLost(f"the connection to the worker broke: {error.strerror or error}") from error
        except httptools.HttpParserError as error:
            raise WorkerLost("the worker's answer is not HTTP") from error

    # What httptools calls.

    def on_header(self, _name: bytes, _value: bytes) -> None:
        self._headers += 1
        if self._headers > _HEADERS_MAX:
            raise httptools.HttpParserError("too many headers")

    def on_headers_complete(self) -> None:
        self.http_status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)

    def on_message_complete(self) -> None:
        self.is_complete = True
