"""The outermost ASGI layer. Invariants, for whatever happens inside: every response has its correlation ID, every error
is our envelope, no request is larger than the limits, and no response to HEAD has a body."""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama_orch.api.bodies import Bodies, Body
from llama_orch.api.hosts import AllowedHosts
from llama_orch.api.refusals import answer, refusal
from llama_orch.clock import new_id
from llama_orch.context import correlation_id
from llama_orch.contract.config import ServerSettings
from llama_orch.errors import HeadersTooLarge, InvalidParams

HEADERS_MAX_BYTES = 32768  # httptools has no limit of its own

log = logging.getLogger("llama_orch.api")
_is_correlation_id = re.compile(rb"[!-~]{1,128}").fullmatch  # nothing that could break a header or a line of the log


def usable_correlation_id(given: list[bytes]) -> str:
    """The first that came, where it is harmless; else a new one (HP-SEC-2)."""
    return given[0].decode("ascii") if given and _is_correlation_id(given[0]) else new_id()


class Head(NamedTuple):
    """What the edge reads of the headers."""

    correlation_id: str
    hosts: list[bytes]
    content_length: bytes | None
    size: int

    @classmethod
    def of(cls, scope: Scope) -> Head:
        given: list[bytes] = []
        hosts: list[bytes] = []
        length, size = None, 0
        for name, value in scope["headers"]:
            size += len(name) + len(value)
            if name == b"x-correlation-id":
                given.append(value)
            elif name == b"host":
                hosts.append(value)
            elif name == b"content-length":
                length = value
        return cls(usable_correlation_id(given), hosts, length, size)


class Edge:
    def __init__(self, app: ASGIApp, server: ServerSettings) -> None:
        self._app = app
        self._bodies = Bodies(server.max_body_bytes)
        self._hosts = AllowedHosts(server)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        elif scope["type"] != "http":
            await self._app(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        head = Head.of(scope)
        stamp = (b"x-correlation-id", head.correlation_id.encode("ascii"))
        is_head, has_started, body = scope["method"] == "HEAD", False, Body(self._bodies, receive)

        def stamped(message: Message) -> Awaitable[None]:  # no coroutine: streams pass here once per chunk
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                body.release()
                message["headers"] = [*message["headers"], stamp]
            elif is_head:
                message["body"] = b""
            return send(message)

        token = correlation_id.set(head.correlation_id)
        try:
            self._admit(scope, head)
            await self._app(scope, body.receive, stamped)
        except Exception as exc:
            error = refusal(exc, scope["path"])
            if error.http_status >= 500 and error is not exc:
                log.exception("unexpected failure [%s]", head.correlation_id)
            if has_started:
                log.warning("the response broke off [%s]", head.correlation_id)
                raise  # the server closes the connection: the client sees a truncated body, not a clean end
            await answer(error, head.correlation_id, scope["path"], stamped)
        finally:
            body.release()
            correlation_id.reset(token)

    def _admit(self, scope: Scope, head: Head) -> None:
        if head.size > HEADERS_MAX_BYTES:
            raise HeadersTooLarge(f"the request's headers exceed {HEADERS_MAX_BYTES} bytes")
        if len(head.hosts) > 1 or (not head.hosts and scope["http_version"] != "1.0"):
            raise InvalidParams("send exactly one Host header")
        if head.hosts:
            self._hosts.check(head.hosts[0].decode("latin-1"))
        if head.content_length and int(head.content_length) > self._bodies.max_body_bytes:
            raise self._bodies.too_large()
