"""One exception per error code that we raise. The code decides HTTP status and whether a repeat can help; the message
says what happened and what to do next, and never holds a secret or a prompt."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from msgspec import UNSET

from llama_orch.budgets import NO_BUDGETS, BudgetsLeft
from llama_orch.contract.codes import CODES
from llama_orch.contract.models import Error, ErrorCode


class LlorchError(Exception):
    """A refusal or failure that the contract names."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        engine: str | None = None,
        retry_after_ms: int | None = None,
        policy_label: str | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.engine = engine
        self.retry_after_ms = None if retry_after_ms is None else max(1, retry_after_ms)
        self.policy_label = policy_label
        self.details = details

    @property
    def http_status(self) -> int:
        return CODES[self.code].http_status

    def body(self, correlation_id: str) -> Error:
        """The one error body, for HTTP answers and `error` frames alike (HP-ERR-1)."""
        return Error(
            code=self.code,
            message=self.message,
            engine=self.engine,
            correlation_id=correlation_id,
            retriable=CODES[self.code].is_retryable,
            retry_after_ms=UNSET if self.retry_after_ms is None else self.retry_after_ms,
            policy_label=UNSET if self.policy_label is None else self.policy_label,
            details=UNSET if self.details is None else self.details,
        )

    def headers(self) -> dict[str, str]:
        """Headers that the code asks for besides the body (HP-ERR-2)."""
        if self.retry_after_ms is None:
            return {}
        return {"Retry-After": str(math.ceil(self.retry_after_ms / 1000)), "X-Backoff-Ms": str(self.retry_after_ms)}


class AdmissionReject(LlorchError):
    code = ErrorCode.ADMISSION_REJECT


class QueueFullDropLru(LlorchError):
    code = ErrorCode.QUEUE_FULL_DROP_LRU


class InvalidParams(LlorchError):
    """`param` is the field concerned, where it is known; only OpenAI's shape of errors has a place for it."""

    code = ErrorCode.INVALID_PARAMS

    def __init__(self, message: str, *, param: str | None = None, **more: Any) -> None:
        super().__init__(message, **more)
        self.param = param


class Unauthorized(LlorchError):
    code = ErrorCode.UNAUTHORIZED

    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(LlorchError):
    code = ErrorCode.FORBIDDEN


class NotFound(LlorchError):
    code = ErrorCode.NOT_FOUND


class MethodNotAllowed(LlorchError):
    """`allow` is the value of the Allow header."""

    code = ErrorCode.METHOD_NOT_ALLOWED

    def __init__(self, message: str, allow: str) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> dict[str, str]:
        return {"Allow": self.allow}


class Conflict(LlorchError):
    code = ErrorCode.CONFLICT


class PayloadTooLarge(LlorchError):
    """The rest of the body stays unread, so the connection cannot go on."""

    code = ErrorCode.PAYLOAD_TOO_LARGE

    def headers(self) -> dict[str, str]:
        return {"Connection": "close"}


class HeadersTooLarge(PayloadTooLarge):
    """The same code; HTTP has a status of its own for headers."""

    @property
    def http_status(self) -> int:
        return 431


class UnsupportedMediaType(LlorchError):
    code = ErrorCode.UNSUPPORTED_MEDIA_TYPE


class PoolUnready(LlorchError):
    code = ErrorCode.POOL_UNREADY


class PoolUnavailable(LlorchError):
    code = ErrorCode.POOL_UNAVAILABLE


class ReplicaExhausted(LlorchError):
    code = ErrorCode.REPLICA_EXHAUSTED


class DecodeTimeout(LlorchError):
    code = ErrorCode.DECODE_TIMEOUT


class WorkerReset(LlorchError):
    code = ErrorCode.WORKER_RESET


class DeadlineUnmet(LlorchError):
    code = ErrorCode.DEADLINE_UNMET


class BudgetExhausted(LlorchError):
    """`left` is what the session has left, as everywhere else."""

    code = ErrorCode.BUDGET_EXHAUSTED
    left: BudgetsLeft = NO_BUDGETS

    def headers(self) -> dict[str, str]:
        return {**super().headers(), **self.left.headers()}


class SessionExpired(LlorchError):
    code = ErrorCode.SESSION_EXPIRED


class ModelDeprecated(LlorchError):
    code = ErrorCode.MODEL_DEPRECATED


class UntrustedArtifact(LlorchError):
    code = ErrorCode.UNTRUSTED_ARTIFACT


class PolicyDenied(LlorchError):
    code = ErrorCode.POLICY_DENIED


class StorageUnavailable(LlorchError):
    code = ErrorCode.STORAGE_UNAVAILABLE


class UpstreamFailed(LlorchError):
    """What another machine did wrong, in our words: what it says itself is not to be trusted."""

    code = ErrorCode.UPSTREAM_FAILED


class Canceled(LlorchError):
    code = ErrorCode.CANCELED


class Internal(LlorchError):
    code = ErrorCode.INTERNAL
