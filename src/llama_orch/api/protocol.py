"""uvicorn's HTTP parser, so that a request that is not HTTP is refused in our words too. It never reaches the ASGI
application; uvicorn's own answer is plain text without a correlation ID."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from llama_orch.api.refusals import rendered
from llama_orch.clock import new_id
from llama_orch.errors import InvalidParams


class HttpProtocol(HttpToolsProtocol):
    """For `uvicorn.Config(http=...)`."""

    def send_400_response(self, msg: str) -> None:
        """What the client sent as its correlation ID may not even be parsed yet, so it gets a new one."""
        correlation_id = new_id()
        headers, body = rendered(InvalidParams("the request is not valid HTTP/1.1"), correlation_id)
        headers += [(b"x-correlation-id", correlation_id.encode()), (b"connection", b"close")]
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + lines + b"\r\n" + body)
        self.transport.close()
