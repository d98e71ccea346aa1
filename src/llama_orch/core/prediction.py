"""Predictions over the scheduler's state: positions, starts, chances. Reads state and changes only its own averages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llama_orch.contract.models import Priority, ReplicaState, TaskState
from llama_orch.core.estimate import WAIT_GUESS_S, Lane, Speeds, forecast, on_time_probability
from llama_orch.core.pool import Pool
from llama_orch.core.task import Outcome, Task

ADVICE_MIN_MS = 100
ADVICE_MAX_MS = 300_000


@dataclass(frozen=True, slots=True)
class Outlook:
    """Where a task stands. Position null once it has started; seconds from now, null when unknown."""

    queue_position: int | None
    start_in_s: float | None


class Predictor:
    """Speeds per pool, and what follows from them for the tasks that wait."""

    def __init__(self) -> None:
        self._speeds: dict[str, Speeds] = {}

    def speeds(self, pool_id: str) -> Speeds:
        return self._speeds.setdefault(pool_id, Speeds.unknown())

    def learn(self, pool_id: str, service_s: float, outcome: Outcome) -> None:
        decode_s = min(service_s, outcome.decode_ms / 1000)
        self.speeds(pool_id).learn(service_s=service_s, decode_s=decode_s, tokens_out=outcome.tokens_out)

    def tokens_per_second(self, pool_id: str) -> float | None:
        speeds = self.speeds(pool_id)
        return 1 / speeds.token_s.mean if speeds.is_known and speeds.token_s.mean > 0 else None

    def outlooks(self, pool: Pool, tasks: Mapping[str, Task], now: float) -> dict[str, Outlook]:
        """For every task that waits in the pool, in one pass."""
        positions = pool.queue.positions()
        starts = self._starts(pool, tasks, [tasks[task_id] for task_id in positions], now)
        return {task_id: Outlook(place, starts.get(task_id)) for task_id, place in positions.items()}

    def newcomer_wait_s(self, pool: Pool, newcomer: Task, tasks: Mapping[str, Task], now: float) -> float | None:
        """Seconds until a task that is not queued yet would start."""
        ahead = [tasks[task_id] for task_id in pool.queue]
        if newcomer.priority is Priority.INTERACTIVE:
            ahead = [task for task in ahead if task.priority is Priority.INTERACTIVE]
        return self._starts(pool, tasks, [*ahead, newcomer], now).get(newcomer.task_id)

    def advice_ms(self, pool: Pool, tasks: Mapping[str, Task], now: float) -> int:
        """When the head of the queue will leave it, or without one a slot gets free: the soonest that a refused client
        finds room (HP-ERR-2)."""
        head = pool.queue.head()
        if head is None:
            wait_s = self._slot_wait_s(pool, tasks, now)
        else:
            wait_s = self._starts(pool, tasks, [tasks[head]], now).get(head)
        if wait_s is None:
            wait_s = WAIT_GUESS_S * (1 + len(pool.queue) / max(1, pool.slots_total()))
        return min(ADVICE_MAX_MS, max(ADVICE_MIN_MS, round(wait_s * 1000)))

    def ready_advice_ms(self, pool: Pool, now: float) -> int:
        """When to ask again for a pool without a ready replica: for all that is known, a load takes as long again as it
        has taken so far."""
        waits = [now - r.loading_since_s for r in pool.replicas.values() if r.state is ReplicaState.LOADING]
        waits += [r.retry_at_s - now for r in pool.replicas.values() if r.retry_at_s is not None]
        return min(ADVICE_MAX_MS, max(ADVICE_MIN_MS, round(min(waits, default=0.0) * 1000)))

    def on_time(self, task: Task, start_in_s: float | None, now: float) -> float | None:
        """Chance that the task meets its deadline; None without one or before anything was measured."""
        speeds = self.speeds(task.pool_id)
        if task.deadline_s is None or not speeds.is_known:
            return None
        asked = (task.max_tokens, task.request.expected_tokens)
        rest_s = speeds.service_s(*asked)
        if task.state is TaskState.RUNNING and task.started_s is not None:
            rest_s = max(0.0, rest_s - (now - task.started_s))
        elif start_in_s is None:
            return None
        else:
            rest_s += start_in_s
        return on_time_probability(task.deadline_s - now, rest_s, speeds.service_deviation_s(*asked))

    def _starts(self, pool: Pool, tasks: Mapping[str, Task], waiting: list[Task], now: float) -> dict[str, float]:
        speeds = self.speeds(pool.spec.pool_id)
        lanes = self._lanes(pool, tasks, speeds, now)
        if not lanes or not (speeds.is_known or self._is_free_now(lanes, waiting)):
            return {}
        exclusive = pool.spec.strict_needs_exclusive
        return forecast(lanes, [(t.task_id, t.is_strict and exclusive, self._service_s(speeds, t)) for t in waiting])

    def _slot_wait_s(self, pool: Pool, tasks: Mapping[str, Task], now: float) -> float | None:
        speeds = self.speeds(pool.spec.pool_id)
        wait_s = min((lane.start(exclusive=False) for lane in self._lanes(pool, tasks, speeds, now)), default=None)
        return wait_s if speeds.is_known or wait_s == 0 else None

    @staticmethod
    def _is_free_now(lanes: list[Lane], waiting: list[Task]) -> bool:
        """A lone task in front of an idle replica starts at once, whatever the speeds are."""
        return len(waiting) == 1 and any(max(lane.free_in_s) == 0 for lane in lanes)

    @staticmethod
    def _service_s(speeds: Speeds, task: Task) -> float:
        return speeds.service_s(task.max_tokens, task.request.expected_tokens) if speeds.is_known else 0.0

    def _lanes(self, pool: Pool, tasks: Mapping[str, Task], speeds: Speeds, now: float) -> list[Lane]:
        lanes = []
        for replica in pool.replicas.values():
            if replica.state is not ReplicaState.READY:
                continue
            free_in_s = [0.0] * replica.slots
            for slot, task_id in replica.leases.items():
                task = tasks[task_id]
                began = now if task.started_s is None else task.started_s
                # A task that outlives its estimate is taken to need a tenth of it more: never 0 while it runs.
                service_s = self._service_s(speeds, task)
                free_in_s[slot] = max(began + service_s - now, 0.1 * service_s, 0.001)
            lanes.append(Lane(free_in_s))
        return lanes
