"""Turns committed events into log lines and counters. One method per kind of event; none changes any state."""

from __future__ import annotations

import logging
from typing import Any

from prometheus_client import Counter

from llama_orch.contract.models import TaskRequest, TaskState
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Outlook
from llama_orch.core.replica import Replica
from llama_orch.core.task import Task
from llama_orch.errors import LlorchError
from llama_orch.observe.logs import event
from llama_orch.observe.metrics import Metrics

log = logging.getLogger("llama_orch.tasks")
replica_log = logging.getLogger("llama_orch.replicas")


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)


class Journal:
    """Log and counters of one service."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._tokens_out: dict[tuple[str, str, str, str], Counter] = {}  # moved once for each token

    def _labels(self, pool: Pool, **more: str) -> dict[str, str]:
        spec = pool.spec
        return {"engine": spec.engine, "engine_version": spec.engine_version, "pool_id": spec.pool_id, **more}

    def _fields(self, task: Task, pool: Pool) -> dict[str, Any]:
        return {
            "correlation_id": task.correlation_id,
            "task_id": task.task_id,
            "session_id": task.request.session_id,
            "engine": pool.spec.engine,
            "engine_version": pool.spec.engine_version,
            "pool_id": task.pool_id,
            "replica_id": task.replica_id,
        }

    def admitted(self, task: Task, pool: Pool, outlook: Outlook) -> None:
        labels = self._labels(pool, replica_id=task.replica_id or "", priority=task.priority.value)
        self._metrics.count("tasks_enqueued_total", labels)
        event(
            log,
            logging.INFO,
            "task admitted",
            **self._fields(task, pool),
            priority=task.priority.value,
            queue_position=0 if task.started_s is not None else outlook.queue_position,
            predicted_start_ms=0 if task.started_s is not None else _ms(outlook.start_in_s),
            tokens_in=task.tokens_in,
        )

    def refused(self, request: TaskRequest, pool: Pool | None, error: LlorchError) -> None:
        """A refusal at admission. A repeat of the request is a new event."""
        engine = error.engine or ("" if pool is None else pool.spec.engine)
        self._metrics.count("tasks_rejected_total", {"engine": engine, "reason": error.code.value})
        if error.retry_after_ms is not None:
            labels = {
                "engine": engine,
                "pool_id": "" if pool is None else pool.spec.pool_id,
                "policy": error.policy_label or "",
            }
            self._metrics.count("admission_backpressure_events_total", labels)
        event(
            log,
            logging.INFO,
            f"task refused: {error.message}",
            task_id=request.task_id,
            session_id=request.session_id,
            engine=engine or None,
            code=error.code.value,
            policy_label=error.policy_label,
            retry_after_ms=error.retry_after_ms,
        )

    def started(self, task: Task, pool: Pool, now: float) -> None:
        labels = self._labels(pool, replica_id=task.replica_id or "", priority=task.priority.value)
        self._metrics.count("tasks_started_total", labels)
        if task.predicted_s is not None:
            error_ms = abs(now - task.predicted_s) * 1000
            self._metrics.observe("prediction_error_ms", self._labels(pool, priority=task.priority.value), error_ms)
        event(
            log,
            logging.INFO,
            "task started",
            **self._fields(task, pool),
            waited_ms=_ms(now - task.created_s),
            placement=task.placement,
        )

    def first_token(self, task: Task, pool: Pool, now: float) -> None:
        labels = self._labels(pool, priority=task.priority.value)
        self._metrics.observe("latency_first_token_ms", labels, (now - task.created_s) * 1000)

    def decoded(self, pool: Pool, replica_id: str, tokens: int) -> None:
        key = pool.spec.engine, pool.spec.engine_version, pool.spec.pool_id, replica_id
        if (series := self._tokens_out.get(key)) is None:
            labels = self._labels(pool, replica_id=replica_id)
            series = self._tokens_out[key] = self._metrics.series("tokens_out_total", labels)
        series.inc(tokens)

    def ended(self, task: Task, pool: Pool) -> None:
        self._count_end(task, pool)
        error = task.error
        event(
            log,
            logging.WARNING if task.state is TaskState.FAILED else logging.INFO,
            f"task {task.state.value}" + ("" if error is None else f": {error.message}"),
            **self._fields(task, pool),
            state=task.state.value,
            code=None if error is None else error.code.value,
            tokens_in=task.tokens_in,
            tokens_out=task.tokens_out,
            decode_time_ms=None if task.outcome is None else task.outcome.decode_ms,
            seed=task.seed,
        )

    def _count_end(self, task: Task, pool: Pool) -> None:
        priority = task.priority.value
        self._metrics.count("tasks_finished_total", self._labels(pool, state=task.state.value))
        if task.state is TaskState.CANCELED:
            self._metrics.count("tasks_canceled_total", self._labels(pool, priority=priority))
        if task.replica_id is not None and task.started_s is not None and task.ended_s is not None:
            labels = self._labels(pool, replica_id=task.replica_id)
            self._metrics.count("tokens_in_total", labels, task.tokens_in or 0)
            decode_ms = (task.ended_s - task.started_s) * 1000
            self._metrics.observe("latency_decode_ms", self._labels(pool, priority=priority), decode_ms)
        elif task.error is not None and task.state is TaskState.FAILED:  # dropped, too late, or without a replica
            labels = {"engine": pool.spec.engine, "reason": task.error.code.value}
            self._metrics.count("tasks_rejected_total", labels)

    def replica_ready(self, replica: Replica, pool: Pool, load_ms: int, buffer_bytes: dict[str, int]) -> None:
        labels = self._labels(pool, device="+".join(replica.device_ids) or "elsewhere")
        self._metrics.observe("latency_load_ms", labels, load_ms)
        event(
            replica_log,
            logging.INFO,
            f"replica {replica.replica_id} is ready",
            **self._labels(pool, replica_id=replica.replica_id),
            load_ms=load_ms,
            slots=replica.slots,
            buffer_bytes=buffer_bytes or None,
        )

    def replica_unloading(self, replica: Replica, pool: Pool, reason: str) -> None:
        labels = self._labels(pool, replica_id=replica.replica_id)
        self._metrics.count("replica_evictions_total", {**labels, "reason": reason})
        event(
            replica_log,
            logging.INFO,
            f"replica {replica.replica_id} is unloaded: {reason}",
            **labels,
            vram_reserved_bytes=sum(replica.need_bytes.values()),
        )

    def replica_lost(self, replica: Replica, pool: Pool, reason: str, now: float) -> None:
        self._metrics.count("replica_restarts_total", self._labels(pool, replica_id=replica.replica_id))
        again = "given up" if replica.retry_at_s is None else f"next try in {replica.retry_at_s - now:.1f} s"
        event(
            replica_log,
            logging.ERROR,
            f"replica {replica.replica_id} was lost: {reason}; {again}",
            **self._labels(pool, replica_id=replica.replica_id),
            restarts=replica.restarts,
        )
