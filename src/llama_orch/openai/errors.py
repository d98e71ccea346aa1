"""Errors in OpenAI's shape (HP-OAI-4): our code and message, its word for the kind."""

from __future__ import annotations

from typing import Literal

from llama_orch.contract.codes import CODES
from llama_orch.contract.models import Error, OpenAiError, OpenAiErrorDetail

Kind = Literal[
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "conflict_error",
    "rate_limit_error",
    "server_error",
]
_KINDS: dict[int, Kind] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


def kind_of(http_status: int) -> Kind:
    if http_status >= 500:
        return "server_error"
    return _KINDS.get(http_status, "invalid_request_error")


def openai_error(error: Error, param: str | None = None) -> OpenAiError:
    """`param`: the field concerned."""
    kind = kind_of(CODES[error.code].http_status)
    return OpenAiError(error=OpenAiErrorDetail(message=error.message, type=kind, code=error.code, param=param))
