"""What a task is told when it is refused or ended before its time: the code, what happened, what to do next.

Waits are computed by whoever refuses, from the present load (HP-ERR-2).
"""

from __future__ import annotations

from llama_orch.budgets import BudgetsLeft
from llama_orch.contract.models import TaskState
from llama_orch.core.bar import Bar, BarKind
from llama_orch.core.pool import Pool
from llama_orch.core.task import Task
from llama_orch.errors import (
    AdmissionReject,
    BudgetExhausted,
    Canceled,
    DeadlineUnmet,
    LlorchError,
    ModelDeprecated,
    PoolUnavailable,
    PoolUnready,
    QueueFullDropLru,
    UntrustedArtifact,
    WorkerReset,
)

# No load to compute a wait from: a restart takes some seconds, and a person some minutes.
RESTART_MS = 5_000
MENDING_MS = 60_000
RESET_MS = 1_000


def ending(pool: Pool) -> PoolUnavailable:
    return PoolUnavailable(
        "the service is ending and takes no new tasks; submit the task again once it is back",
        engine=pool.spec.engine,
        retry_after_ms=RESTART_MS,
    )


def draining(pool: Pool) -> PoolUnavailable:
    return PoolUnavailable(
        f"pool {pool.spec.pool_id} is drained and takes no new tasks; use another model, or have the pool reloaded",
        engine=pool.spec.engine,
        retry_after_ms=MENDING_MS,  # it comes back when somebody sees to it
    )


def barred(pool: Pool | None, bar: Bar) -> LlorchError:
    """What the catalog has decided of a model; `pool` None where none serves it."""
    engine = None if pool is None else pool.spec.engine
    match bar.kind:
        case BarKind.RETIRED:
            return ModelDeprecated(bar.reason, engine=engine)
        case BarKind.UNTRUSTED:
            return UntrustedArtifact(bar.reason, engine=engine)
        case BarKind.UNVERIFIED:
            return PoolUnready(bar.reason, engine=engine, retry_after_ms=bar.wait_ms)


def drained(pool: Pool) -> PoolUnavailable:
    return PoolUnavailable(
        f"pool {pool.spec.pool_id} was drained and its deadline has passed; submit the task again once it is back",
        engine=pool.spec.engine,
        retry_after_ms=MENDING_MS,
    )


def reloading(pool: Pool, wait_ms: int) -> PoolUnready:
    return PoolUnready(
        f"pool {pool.spec.pool_id} is getting another model ({pool.last_reload}); repeat shortly",
        engine=pool.spec.engine,
        retry_after_ms=wait_ms,
    )


def without_devices(pool: Pool, lost: str) -> PoolUnavailable:
    return PoolUnavailable(
        f"pool {pool.spec.pool_id} has no device left ({lost}); see to the card, its models come back with it",
        engine=pool.spec.engine,
        retry_after_ms=MENDING_MS,
    )


def without_room(pool: Pool) -> PoolUnavailable:
    return PoolUnavailable(
        f"pool {pool.spec.pool_id} has no room, and none that could be made ({pool.why_not_loaded}); free some memory, "
        "or drain a pool that stays loaded",
        engine=pool.spec.engine,
        retry_after_ms=MENDING_MS,
    )


def unready(pool: Pool, wait_ms: int) -> PoolUnready:
    state = "is loading its model" if pool.last_error is None else f"starts again after: {pool.last_error}"
    state = "waits for its model to be fetched" if pool.is_arriving else state
    state = state if pool.why_not_loaded is None else f"waits for room: {pool.why_not_loaded}"
    return PoolUnready(
        f"pool {pool.spec.pool_id} {state}; repeat shortly", engine=pool.spec.engine, retry_after_ms=wait_ms
    )


def went(pool: Pool) -> PoolUnready:
    """Between the look at a request and its admission."""
    return PoolUnready(
        f"pool {pool.spec.pool_id} has gone meanwhile; repeat", engine=pool.spec.engine, retry_after_ms=RESET_MS
    )


def not_arrived(pool: Pool, error: LlorchError) -> LlorchError:
    """The file that its tasks wait for does not come: what is wrong is said by whoever fetched it."""
    return type(error)(
        f"model {pool.spec.model!r} could not be fetched: {error.message}",
        retry_after_ms=error.retry_after_ms,
        policy_label=error.policy_label,
        details=error.details,
    )


def gone(pool: Pool) -> PoolUnavailable:
    return PoolUnavailable(
        f"pool {pool.spec.pool_id} has no replica left ({pool.last_error}); mend that, then reload the pool, "
        "or restart the service",
        engine=pool.spec.engine,
        retry_after_ms=MENDING_MS,
    )


def full(pool: Pool, wait_ms: int) -> AdmissionReject:
    return AdmissionReject(
        f"the queue of pool {pool.spec.pool_id} is full ({len(pool.queue)} tasks wait); repeat in {wait_ms} ms",
        engine=pool.spec.engine,
        retry_after_ms=wait_ms,
        policy_label=pool.queue.full_policy,
    )


def dropped(pool: Pool, wait_ms: int) -> QueueFullDropLru:
    return QueueFullDropLru(
        f"dropped from the full queue of pool {pool.spec.pool_id} for a newer task; repeat in {wait_ms} ms",
        engine=pool.spec.engine,
        retry_after_ms=wait_ms,
        policy_label=pool.queue.full_policy,
    )


def over_budget(pool: Pool, session_id: str, shortage: str, left: BudgetsLeft, wait_ms: int) -> BudgetExhausted:
    error = BudgetExhausted(
        f"the task is over the budget of session {session_id}: {shortage}; or go on in a new session",
        engine=pool.spec.engine,
        retry_after_ms=wait_ms,
        policy_label="budget",
    )
    error.left = left
    return error


def cannot_be_met(pool: Pool, task: Task, wait_s: float, wait_ms: int) -> DeadlineUnmet:
    return DeadlineUnmet(
        f"the task would start in {wait_s * 1000:.0f} ms, after its deadline of {task.request.deadline_ms} ms; "
        "allow more time or repeat later",
        engine=pool.spec.engine,
        retry_after_ms=wait_ms,
        policy_label="deadline",
    )


def too_late(pool: Pool, task: Task) -> DeadlineUnmet:
    where = "in the queue" if task.state is TaskState.QUEUED else "while decoding"
    return DeadlineUnmet(
        f"the deadline of {task.request.deadline_ms} ms passed {where}; allow more time or repeat later",
        engine=pool.spec.engine,
        retry_after_ms=RESET_MS,
        policy_label="deadline",
    )


def reset(pool: Pool, replica_id: str, reason: str) -> WorkerReset:
    return WorkerReset(
        f"the worker of replica {replica_id} was lost ({reason}) and is started again; submit the task again",
        engine=pool.spec.engine,
        retry_after_ms=RESET_MS,
    )


def service_ended(pool: Pool) -> Canceled:
    return Canceled("the service ended; submit the task again once it is back", engine=pool.spec.engine)


def canceled(pool: Pool) -> Canceled:
    return Canceled("the task was canceled; submit it again if it is needed", engine=pool.spec.engine)
