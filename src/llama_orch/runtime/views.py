"""The contract's answers made from the core's state. Plain functions; times become the wire's units here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from msgspec import UNSET

from llama_orch.budgets import BudgetsLeft
from llama_orch.clock import timestamp
from llama_orch.contract.models import (
    AdmissionResponse,
    EndFrame,
    MetricsFrame,
    PoolHealth,
    PoolMetrics,
    Priority,
    Queue,
    QueueDepth,
    SessionInfo,
    StartedFrame,
    TaskError,
    TaskStatus,
)
from llama_orch.contract.models import FullPolicy as FullPolicyName
from llama_orch.contract.models import Pool as PoolView
from llama_orch.contract.models import Replica as ReplicaView
from llama_orch.core.affinity import Warmth
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Outlook
from llama_orch.core.replica import Replica
from llama_orch.core.session import Session
from llama_orch.core.task import ENDED, Outcome, Task

NOT_WAITING = Outlook(queue_position=None, start_in_s=None)


def to_ms(seconds: float | None) -> int | None:
    return None if seconds is None else max(0, round(seconds * 1000))


def admission(task: Task, outlook: Outlook, backoff_ms: int) -> AdmissionResponse:
    has_started = task.started_s is not None
    return AdmissionResponse(
        task_id=task.task_id,
        queue_position=0 if has_started else outlook.queue_position,
        predicted_start_ms=0 if has_started else to_ms(outlook.start_in_s),
        backoff_ms=backoff_ms,
        pool_id=task.pool_id,
        seed=task.seed,
    )


def started_frame(task: Task, outlook: Outlook) -> StartedFrame:
    has_started = task.started_s is not None
    return StartedFrame(
        task_id=task.task_id,
        queue_position=0 if has_started else outlook.queue_position,
        predicted_start_ms=0 if has_started else to_ms(outlook.start_in_s),
    )


def metrics_frame(
    task: Task, outlook: Outlook, queue_depth: int, on_time: float | None, left: BudgetsLeft
) -> MetricsFrame:
    return MetricsFrame(
        queue_depth=queue_depth,
        queue_position=outlook.queue_position,
        predicted_start_ms=to_ms(outlook.start_in_s),
        tokens_in=task.tokens_in or 0,
        tokens_out=task.tokens_out,
        on_time_probability=on_time,
        kv_warmth=task.outcome is not None and task.outcome.is_kv_warm,
        tokens_budget_remaining=left.tokens,
        time_budget_remaining_ms=left.time_ms,
        cost_budget_remaining=left.cost,
    )


def session_info(
    session: Session, ttl_s: float, warmth: Warmth | None, kv_bytes_per_token: int, left: BudgetsLeft
) -> SessionInfo:
    """`kv_bytes_per_token`: of the pool that holds its KV."""
    return SessionInfo(
        ttl_ms_remaining=round(ttl_s * 1000),
        turns=session.turns,
        kv_bytes=0 if warmth is None else warmth.tokens * kv_bytes_per_token,
        kv_warmth=warmth is not None,
        tokens_budget_remaining=left.tokens,
        time_budget_remaining_ms=left.time_ms,
        cost_budget_remaining=left.cost,
    )


def end_frame(task: Task, outcome: Outcome, pool: Pool) -> EndFrame:
    return EndFrame(
        tokens_in=outcome.tokens_in,
        tokens_out=outcome.tokens_out,
        decode_time_ms=outcome.decode_ms,
        finish_reason=outcome.finish_reason,
        seed=task.seed,
        model_digest=task.model_digest or "",
        engine=pool.spec.engine,
        engine_version=pool.spec.engine_version,
        sampler_profile_version=task.request.sampler_profile_version or pool.spec.sampler_profile_version,
        kv_warmth=outcome.is_kv_warm,
        embeddings=UNSET if outcome.embeddings is None else [list(vector) for vector in outcome.embeddings],
        scores=UNSET if outcome.scores is None else list(outcome.scores),
    )


def task_status(task: Task, pool: Pool, outlook: Outlook, wall: Callable[[float], float], text: str) -> TaskStatus:
    """`wall` turns the scheduler's seconds into seconds since the epoch."""

    def when(seconds: float | None) -> str | None:
        return None if seconds is None else timestamp(wall(seconds))

    has_ended = task.state in ENDED
    return TaskStatus(
        task_id=task.task_id,
        session_id=task.request.session_id,
        state=task.state,
        priority=task.priority,
        engine=pool.spec.engine,
        pool_id=task.pool_id,
        replica_id=task.replica_id,
        queue_position=outlook.queue_position,
        predicted_start_ms=to_ms(outlook.start_in_s),
        created_at=timestamp(wall(task.created_s)),
        started_at=when(task.started_s),
        ended_at=when(task.ended_s),
        tokens_in=task.tokens_in or 0,
        tokens_out=task.tokens_out,
        seed=task.seed,
        placement=task.placement,
        error=task_error(task),
        text=text if has_ended else None,
    )


def task_error(task: Task) -> TaskError | None:
    if task.error is None:
        return None
    body = task.error.body(task.correlation_id)
    return TaskError(**{name: getattr(body, name) for name in body.__struct_fields__})


def pool_view(pool: Pool) -> PoolView:
    spec = pool.spec
    return PoolView(
        id=spec.pool_id,
        engine=spec.engine,
        engine_version=spec.engine_version,
        model=spec.model,
        model_digest=pool.model_digest,
        ctx=spec.ctx,
        slots=spec.slots,
        slots_total=pool.slots_total(),
        max_tokens=spec.max_tokens,
        sampler_profile_version=spec.sampler_profile_version,
        queue=Queue(capacity=spec.queue_capacity, full_policy=FullPolicyName(spec.full_policy)),
        queue_depth=QueueDepth(
            interactive=pool.queue.depth(Priority.INTERACTIVE), batch=pool.queue.depth(Priority.BATCH)
        ),
        ready=pool.is_ready,
        on_demand=spec.is_on_demand,
        keep_alive_ms=to_ms(spec.keep_alive_s),
    )


def replica_view(replica: Replica) -> ReplicaView:
    return ReplicaView(
        id=replica.replica_id,
        devices=list(replica.device_ids),
        state=replica.state,
        slots_busy=replica.slots_busy,
        slots_total=replica.slots,
        restarts=replica.restarts,
        last_error=replica.last_error,
        vram_reserved_bytes=sum(replica.need_bytes.values()) if replica.holds_memory else 0,
    )


def pool_health(pool: Pool, others: Iterable[Replica], tokens_per_second: float | None) -> PoolHealth:
    """`others`: replicas of another model that takes the pool's place or has left it."""
    return PoolHealth(
        live=pool.is_live,
        ready=pool.is_ready,
        draining=pool.is_draining,
        last_error=pool.why_not_loaded or pool.last_error,
        last_reload=pool.last_reload,
        replicas=[replica_view(replica) for replica in (*pool.replicas.values(), *others)],
        metrics=PoolMetrics(
            queue_depth=len(pool.queue),
            tokens_in=pool.tokens_in,
            tokens_out=pool.tokens_out,
            tokens_per_second=tokens_per_second,
        ),
    )
