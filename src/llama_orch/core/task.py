"""A task and its life. The life is the table below; a step that the table lacks is a defect, not a case to handle."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec
from msgspec import UNSET, structs

from llama_orch.contract.models import Determinism, FinishReason, Priority, TaskRequest, TaskState
from llama_orch.core.pool import Pool
from llama_orch.core.replica import Lease
from llama_orch.errors import LlorchError


class TaskEvent(StrEnum):
    """What can happen to a task."""

    START = "start"  # it got a slot
    FINISH = "finish"  # the engine ended it
    FAIL = "fail"  # dropped, too late, or its replica was lost
    CANCEL = "cancel"


TRANSITIONS: dict[tuple[TaskState, TaskEvent], TaskState] = {
    (TaskState.QUEUED, TaskEvent.START): TaskState.RUNNING,
    (TaskState.QUEUED, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.QUEUED, TaskEvent.CANCEL): TaskState.CANCELED,
    (TaskState.RUNNING, TaskEvent.FINISH): TaskState.SUCCEEDED,
    (TaskState.RUNNING, TaskEvent.FAIL): TaskState.FAILED,
    (TaskState.RUNNING, TaskEvent.CANCEL): TaskState.CANCELED,
}

ENDED = frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELED})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the engine reported of a task that ran to its end."""

    tokens_in: int
    tokens_out: int
    decode_ms: int
    finish_reason: FinishReason
    is_kv_warm: bool
    prefill_ms: float = 0.0
    tokens_cached: int = 0
    embeddings: Sequence[Sequence[float]] | None = None  # one vector for each input, of embedding tasks
    scores: Sequence[float] | None = None  # one for each document, of rerank tasks


def request_digest(request: TaskRequest) -> bytes:
    """Equal requests have equal digests; kept instead of the request's texts once the task has ended."""
    return hashlib.sha256(msgspec.json.encode(request)).digest()


@dataclass(slots=True, eq=False)
class Task:
    """One admitted unit of work. Times are seconds of the scheduler's clock."""

    request: TaskRequest
    task_id: str
    number: int  # counts admissions; orders lists and ties
    pool: Pool  # the very one: another model may take its id while the task is there
    seed: int
    max_tokens: int
    correlation_id: str
    created_s: float
    deadline_s: float | None
    tokens_in: int | None  # None until the engine has counted (admitted while the model was loading)
    prompts: int = 1  # that run one after the other, each with an answer of at most `max_tokens`
    state: TaskState = TaskState.QUEUED
    lease: Lease | None = None  # outlives the state: held until the engine has let go of the slot
    replica_id: str | None = None
    model_digest: str | None = None  # of what the replica had loaded when the task started there
    placement: str | None = None
    started_s: float | None = None
    ended_s: float | None = None
    tokens_out: int = 0
    held_back_since_s: float | None = None  # it could have started on a slower replica
    predicted_s: float | None = None  # when it was to start, as told at its admission
    outcome: Outcome | None = None
    error: LlorchError | None = None
    request_digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        self.request_digest = request_digest(self.request)

    @property
    def pool_id(self) -> str:
        return self.pool.spec.pool_id

    @property
    def tokens_out_max(self) -> int:
        return self.max_tokens * self.prompts

    @property
    def is_strict(self) -> bool:
        """Asked for, or not asked for on an engine that can be."""
        asked = self.request.determinism
        return asked is Determinism.STRICT or (asked is UNSET and self.pool.spec.can_be_strict)

    @property
    def priority(self) -> Priority:
        return self.request.priority

    def forget_texts(self) -> None:
        """An ended task is kept for its figures and its stream; its prompts may be megabytes."""
        self.request = structs.replace(self.request, prompt=None, inputs=None, messages=None)

    def step(self, event: TaskEvent) -> None:
        self.state = TRANSITIONS[self.state, event]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What admission says of one submission."""

    task: Task
    is_repeat: bool  # the same task_id with the same body came before (HP-ADM-8)
