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
_UNREAD_BYTES_MAX = 1 << 20  # beyond which the worker is made to wait
_HEADERS_MAX = 64
_BODY_BYTES_MAX = 64 << 20  # /tokenize answers about 7 bytes for each token


class Exchange(asyncio.Protocol):
    """Sends one request and reads its answer piece by piece. Bytes are parsed as they come in, with no stream, no task
    and no future between the socket and the pieces: this is passed once for each token."""

    def __init__(self, socket_path: str, kept: asyncio.Transport | None = None) -> None:
        """`kept`: an open connection that another exchange has left."""
        self.http_status = 0  # 0 until the answer's head is read
        self.is_complete = False
        self._socket_path = socket_path
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._headers = 0
        self._transport = kept
        self._waiter: asyncio.Future[None] | None = None
        self._trouble: WorkerLost | None = None
        self._is_held = False  # the worker is made to wait
        self._may_follow = False  # another request

    async def send(self, method: str, path: str, api_key: str, body: bytes, *, keep: bool = False) -> None:
        """Connect and send the request. `keep`: another one may follow on the same connection."""
        connection = "keep-alive" if keep else "close"
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: worker\r\nConnection: {connection}\r\n"
            f"Authorization: Bearer {api_key}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        transport = await self._connected() if self._transport is None else self._transport
        transport.set_protocol(self)
        self._transport = transport
        transport.write(head.encode("ascii") + body)

    async def _connected(self) -> asyncio.Transport:
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.create_unix_connection(lambda: self, self._socket_path)
        except OSError as error:
            if error.errno in NOTHING_LEFT:
                raise EngineBusy(f"no connection to the worker could be made: {error.strerror}") from error
            raise WorkerLost(f"the worker does not take requests: {error.strerror or error}") from error
        return transport

    def left(self) -> asyncio.Transport | None:
        """The connection, where the answer was whole and another request may follow. Else it is closed."""
        transport = self._transport
        if transport is not None and self.is_complete and self._may_follow and not transport.is_closing():
            return transport
        self.close()
        return None

    async def read_head(self) -> int:
        """Read until the answer's head is there; returns its HTTP status."""
        while not self.http_status:
            await self._more()
        return self.http_status

    async def read_some(self) -> bytes:
        """The next bytes of the body; empty once all of it was returned."""
        while not self._pieces and not self.is_complete:
            await self._more()
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._waiting_bytes = 0
        if self._is_held and self._transport is not None:
            self._transport.resume_reading()
            self._is_held = False
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
        if self._transport is not None:
            self._transport.abort()

    async def _more(self) -> None:
        """Wait until something has come."""
        if self._transport is None:
            raise WorkerLost("the request was never sent")
        if self._trouble is not None:
            raise self._trouble
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What asyncio calls.

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._trouble = WorkerLost("the worker's answer is not HTTP")
            self.close()
        self._wake()
        if self._waiting_bytes > _UNREAD_BYTES_MAX and not self._is_held and self._transport is not None:
            self._transport.pause_reading()
            self._is_held = True

    def connection_lost(self, exc: Exception | None) -> None:
        if self._trouble is None:
            if isinstance(exc, OSError):
                self._trouble = WorkerLost(f"the connection to the worker broke: {exc.strerror or exc}")
            else:
                self._trouble = WorkerLost("the worker closed the connection in the middle of an answer")
        self._wake()

    # What httptools calls.

    def on_header(self, _name: bytes, _value: bytes) -> None:
        self._headers += 1
        if self._headers > _HEADERS_MAX:
            raise httptools.HttpParserError("too many headers")

    def on_headers_complete(self) -> None:
        self.http_status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._waiting_bytes += len(data)

    def on_message_complete(self) -> None:
        self.is_complete = True
        self._may_follow = self._parser.should_keep_alive()


class Kept:
    """Open connections on which nothing is asked."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._connections: list[asyncio.Transport] = []

    def take(self) -> asyncio.Transport | None:
        """One that has not been closed since, if there is one."""
        while self._connections:
            if not (connection := self._connections.pop()).is_closing():
                return connection
        return None

    def put(self, connection: asyncio.Transport) -> None:
        if len(self._connections) < self._most:
            self._connections.append(connection)
        else:
            connection.abort()
