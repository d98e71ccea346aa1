"""What is the same for every request to one service, and what its answers mean. No I/O."""

from __future__ import annotations

import ipaddress
import uuid
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec
from msgspec import UNSET

from llama_orch.client.errors import ApiError, UnreachableError
from llama_orch.contract.models import Error, ErrorCode, Healthz

ANSWER_TIMEOUT_S = 30.0
STREAM_TIMEOUT_S = 60.0  # the service breaks every silence after 15 s
BAD_JSON = (msgspec.MsgspecError, UnicodeDecodeError)


class Peer:
    """The service at one address. `correlation_id` goes with every request, so that the log of the service can be
    searched for this client. `has_answered`: somebody was there before, so that a refused connection is a restart."""

    def __init__(self, url: str, token: str) -> None:
        if any(char < " " or char == "\x7f" for char in token):
            raise ValueError("the token has control characters")  # httpx would quote the token in its own complaint
        self.url = url.rstrip("/")
        self.correlation_id = str(uuid.uuid4())
        self.has_answered = False
        self.authorization = {b"Authorization": b"Bearer " + token.encode()}

    def options(self) -> dict[str, Any]:
        """Arguments of httpx's clients. No proxy comes between a program and its own machine; the token goes with each
        request that needs it, not with all."""
        return {
            "base_url": self.url,
            "headers": {"X-Correlation-Id": self.correlation_id, "User-Agent": "llama-orch"},
            "timeout": ANSWER_TIMEOUT_S,
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),  # a stream holds one for long
            "trust_env": not _is_loopback(self.url),
        }

    # -- what answers mean -------------------------------------------------------------------------------------------

    def decoded(self, content: bytes | str, type: type[Any]) -> Any:
        """The answer as `type`. Raises UnreachableError where it is something else."""
        try:
            return msgspec.json.decode(content, type=type)
        except BAD_JSON as error:
            message = f"{self.url} answered something else than the contract's {type.__name__}: {error}"
            raise UnreachableError(f"{message}; client and server may be of different versions") from error

    def failure(self, status: int, headers: httpx.Headers, content: bytes) -> ApiError:
        """An answer that is no success."""
        try:
            error = msgspec.json.decode(content, type=Error)
        except BAD_JSON:  # something between us and the service
            error = Error(
                code=ErrorCode.INTERNAL,
                message=f"HTTP status {status} without an error body of llama-orch; is {self.url} the right address?",
                engine=None,
                correlation_id=headers.get("X-Correlation-Id", "")[:128] or self.correlation_id,
            )
        return ApiError(status, error, retry_after_s(headers, error))


def is_healthy(answer: httpx.Response) -> bool:
    """Whether this is what a llama-orch says on /healthz. Raises what BAD_JSON has."""
    return answer.status_code == 200 and bool(msgspec.json.decode(answer.content, type=Healthz))


def retry_after_s(headers: httpx.Headers, error: Error) -> float | None:
    """The wait that the server asks for: the finest figure that it gave (HP-ERR-2)."""
    figures = ((headers.get("X-Backoff-Ms"), 1000), (headers.get("Retry-After"), 1))
    for figure, per_s in figures:
        if figure and figure.isascii() and figure.isdigit() and len(figure) <= 15:
            return int(figure) / per_s
    return None if error.retry_after_ms is UNSET else error.retry_after_ms / 1000


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
