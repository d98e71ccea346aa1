"""uvicorn's HTTP parser with what has to happen before a request is whole: limits on its head in size and time, and a
refusal in our words where uvicorn would answer in plain text without a correlation ID. None of it reaches the ASGI
application, and none of it needs a token, so that nobody can hold memory or descriptors without one."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llama_orch.api.edge import usable_correlation_id
from llama_orch.api.refusals import rendered
from llama_orch.errors import HeadersTooLarge, InvalidParams, LlorchError

HEAD_MAX_BYTES = 65536  # request line and headers as they come, before the edge looks at them one by one
HEAD_LIMIT_S = 20.0  # from the connection, or from the first byte of a further request, to the end of the head
BODY_LIMIT_S = 60.0  # from there to the end of the body
DRAIN_LIMIT_S = 2.0  # for the rest of a request that is answered already: nobody reads it, the client may still send it
FRAMING_PER_BODY_BYTE = 8  # chunks of one byte have five bytes around it; trailers are nothing but framing


class HttpProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    _is_in_head = True
    _head_bytes = 0
    _body_bytes = 0
    _body_bytes_now = 0  # of the data in hand, which may also have the end of a body before
    _framing_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._close_in(HEAD_LIMIT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._head_bytes += len(data)
            if self._timer is None:
                self._close_in(HEAD_LIMIT_S)
        self._body_bytes_now = 0
        super().data_received(data)
        if self._is_in_head:
            if self._head_bytes > HEAD_MAX_BYTES:
                self._refuse(HeadersTooLarge(f"the request's head exceeds {HEAD_MAX_BYTES} bytes"))
            return
        self._framing_bytes += len(data) - self._body_bytes_now
        if self._framing_bytes > 2 * HEAD_MAX_BYTES + FRAMING_PER_BODY_BYTE * self._body_bytes:
            self.transport.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # trailers are not kept: nothing here reads them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_in_head, self._body_bytes, self._framing_bytes = False, 0, 0
        self._close_in(BODY_LIMIT_S)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._body_bytes_now += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._is_in_head, self._head_bytes = True, 0
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._is_in_head:  # answered before the request was whole
            self._close_in(DRAIN_LIMIT_S)

    def _close_in(self, seconds: float) -> None:
        """Data that comes does not put it off."""
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.transport.close)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(InvalidParams("the request is not valid HTTP/1.1"))

    def _refuse(self, error: LlorchError) -> None:
        given = [value for name, value in self.headers or () if name == b"x-correlation-id"]
        correlation_id = usable_correlation_id(given)  # of the headers that were parsed so far
        headers, body = rendered(error, correlation_id)
        headers = [header for header in headers if header[0].lower() != b"connection"]
        headers += [(b"x-correlation-id", correlation_id.encode()), (b"connection", b"close")]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        reason = b"Bad Request" if error.http_status == 400 else b"Request Header Fields Too Large"
        self.transport.write(b"HTTP/1.1 %d %b\r\n" % (error.http_status, reason) + lines + b"\r\n" + body)
        self.transport.close()
