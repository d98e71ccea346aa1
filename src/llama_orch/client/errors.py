"""What a client raises. Everything else that comes out of it is a defect, or the caller's own."""

from __future__ import annotations

from llama_orch.contract.models import Error, ErrorCode

RETRIED_STATUSES = (429, 503)


class ClientError(Exception):
    """Whatever went wrong between the caller and the service."""


class ApiError(ClientError):
    """The service refused or failed; `error` is its one error body (HP-ERR-1). `retry_after_s`: the wait that it asked
    for, None where it named none."""

    def __init__(self, status: int, error: Error, retry_after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.status = status
        self.error = error
        self.retry_after_s = retry_after_s

    @property
    def code(self) -> ErrorCode:
        return self.error.code

    @property
    def can_pass(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in RETRIED_STATUSES and self.error.retriable is not False


class TaskFailed(ClientError):
    """The task was admitted and ended with an `error` frame. `text` is what came before it. To run it again is a new
    task: submit it with another `task_id`."""

    def __init__(self, task_id: str, error: Error, text: str) -> None:
        super().__init__(f"task {task_id} failed: {error.message}")
        self.task_id = task_id
        self.error = error
        self.text = text


class UnreachableError(ClientError):
    """No usable answer came. `is_refused`: nothing listens at the address."""

    def __init__(self, message: str, *, is_refused: bool = False) -> None:
        super().__init__(message)
        self.is_refused = is_refused
