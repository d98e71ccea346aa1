"""Turns any exception into the one error answer. The only text that reaches a client is ours: what an unforeseen
exception says may hold a path, a prompt or a token, so it goes to the log alone."""

from __future__ import annotations

import re

import msgspec
from starlette.exceptions import HTTPException
from starlette.types import Send

from llama_orch.contract.codes import CODES
from llama_orch.contract.operations import ALLOW, OPERATIONS
from llama_orch.errors import (
    Forbidden,
    Internal,
    InvalidParams,
    LlorchError,
    MethodNotAllowed,
    NotFound,
    Unauthorized,
    UnsupportedMediaType,
)
from llama_orch.openai.errors import openai_error

_ALLOW_BY_PATH = [
    (re.compile("/".join("[^/]+" if part.startswith("{") else re.escape(part) for part in path.split("/"))), allow)
    for path, allow in ALLOW.items()
]

_OPENAI_PATHS = {operation.path for operation in OPERATIONS.values() if operation.document == "openai"}
_OPENAI_PREFIXES = tuple(path.partition("{")[0] for path in _OPENAI_PATHS if "{" in path)


def is_openai(path: str) -> bool:
    """Whether the path is one of OpenAI's, whose errors have its shape (HP-OAI-4)."""
    return path in _OPENAI_PATHS or path.startswith(_OPENAI_PREFIXES)


def allow_for(path: str) -> str:
    """The methods that a path takes. Starlette's own answer names those of one route only."""
    return next((allow for pattern, allow in _ALLOW_BY_PATH if pattern.fullmatch(path)), "GET, HEAD")


def refusal(exc: Exception, path: str) -> LlorchError:
    """The error to answer with; `Internal` for everything that nobody foresaw."""
    if isinstance(exc, LlorchError):
        return exc
    match exc.status_code if isinstance(exc, HTTPException) else 500:
        case 401:
            return Unauthorized("send `Authorization: Bearer TOKEN`; `llama-orch token` prints the token")
        case 403:
            return Forbidden("this service does not allow that")
        case 404:
            return NotFound("there is no such path; /ui/ shows those that exist")
        case 405:
            return MethodNotAllowed(f"this path takes {allow_for(path)}", allow_for(path))
        case 415:
            return UnsupportedMediaType("send the body as application/json")
        case status if 400 <= status < 500:
            return InvalidParams("the request is not what the contract describes; see /ui/")
    return Internal("an unexpected failure of the service; its log has the cause under this correlation ID")


def rendered(error: LlorchError, correlation_id: str, path: str = "") -> tuple[list[tuple[bytes, bytes]], bytes]:
    """The error's headers and body, in the shape that the path has; ours before the path is known."""
    content: msgspec.Struct = error.body(correlation_id)
    headers = {"Content-Type": "application/json", **error.headers()}
    if is_openai(path):
        content = openai_error(error.body(correlation_id), error.param if isinstance(error, InvalidParams) else None)
        headers["X-Should-Retry"] = "true" if CODES[error.code].is_retryable else "false"
    body = msgspec.json.encode(content)
    headers["Content-Length"] = str(len(body))
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()], body


async def answer(error: LlorchError, correlation_id: str, path: str, send: Send) -> None:
    """Send the error as a whole response."""
    headers, body = rendered(error, correlation_id, path)
    await send({"type": "http.response.start", "status": error.http_status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
