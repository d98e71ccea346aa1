"""An ASGI application without a socket, for httpx and a virtual-time loop: bodies stream, connections can break.

httpx has a transport of its own for this, which hands an answer out when it is complete: nobody could leave a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

import httpx

Message = MutableMapping[str, Any]
App = Callable[[Any, Any, Any], Awaitable[None]]
Cut = Callable[[httpx.Request], int | None]


def never(_: httpx.Request) -> int | None:
    return None


class AppTransport(httpx.AsyncBaseTransport):
    """Carries requests to `app`. `requests` is every one that was sent, in order. `cut` says after how many bytes of an
    answer's body the connection breaks, None for never; the application sees the client go."""

    def __init__(self, app: App, *, cut: Cut = never) -> None:
        self.requests: list[httpx.Request] = []
        self._app = app
        self._cut = cut

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        exchange = _Exchange(await request.aread())
        exchange.start(self._app, _scope(request))
        try:
            status, headers = await exchange.answered()
        except BaseException:
            await exchange.leave()
            raise
        return httpx.Response(status, headers=headers, stream=_Body(exchange, self._cut(request)))


class _Exchange:
    """One request at the application. It sends no further than the client reads: one part is under way at a time."""

    def __init__(self, body: bytes) -> None:
        self.head: asyncio.Future[tuple[int, list[tuple[bytes, bytes]]]] = asyncio.get_running_loop().create_future()
        self.parts: asyncio.Queue[bytes | httpx.TransportError | None] = asyncio.Queue(1)  # None: the end
        self._request: bytes | None = body
        self._is_complete = False
        self._gone = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self, app: App, scope: dict[str, Any]) -> None:
        self._task = asyncio.create_task(self._run(app, scope), name=f"{scope['method']} {scope['path']}")

    async def _run(self, app: App, scope: dict[str, Any]) -> None:
        await app(scope, self.receive, self.send)
        if not self._is_complete:  # the application hung up
            await self._put(httpx.RemoteProtocolError("the answer broke off"))

    async def answered(self) -> tuple[int, list[tuple[bytes, bytes]]]:
        """Status and headers. Raises what the application raised before them."""
        assert self._task is not None
        waits: list[asyncio.Future[Any]] = [self.head, self._task]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not self.head.done():
            self._task.result()
            raise httpx.RemoteProtocolError("no answer came")
        return self.head.result()

    async def receive(self) -> Message:
        if self._request is not None:
            body, self._request = self._request, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self._gone.is_set():
            return
        if message["type"] == "http.response.start":
            self.head.set_result((message["status"], list(message["headers"])))
            return
        await self._put(message.get("body", b""))
        if not message.get("more_body", False):
            self._is_complete = True
            await self._put(None)

    async def _put(self, part: bytes | httpx.TransportError | None) -> None:
        """Wait until the client takes it, or goes."""
        if part != b"":
            waits = [asyncio.ensure_future(one) for one in (self.parts.put(part), self._gone.wait())]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()

    async def leave(self) -> None:
        """The client goes; the application is to notice, and to end."""
        self._gone.set()
        if self._task is not None:
            await self._task


class _Body(httpx.AsyncByteStream):
    def __init__(self, exchange: _Exchange, cut_after: int | None) -> None:
        self._exchange = exchange
        self._left = cut_after

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (part := await self._exchange.parts.get()) is not None:
            if isinstance(part, httpx.TransportError):
                raise part
            if self._left is None:
                yield part
            elif len(part) < self._left:
                self._left -= len(part)
                yield part
            else:
                if whole := part[: self._left]:
                    yield whole
                raise httpx.ReadError("the connection broke")

    async def aclose(self) -> None:
        await self._exchange.leave()


def _scope(request: httpx.Request) -> dict[str, Any]:
    path, _, query = request.url.raw_path.partition(b"?")
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.url.scheme,
        "path": request.url.path,
        "raw_path": path,
        "root_path": "",
        "query_string": query,
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
        "server": (request.url.host, request.url.port or 80),
        "client": ("127.0.0.1", 50_000),
        "state": {},
    }
