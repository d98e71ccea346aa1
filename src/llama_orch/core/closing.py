"""Ends what a pool still has: at the deadline of its drain, when its model may not be served any more, and where
nothing is left that could serve."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llama_orch.contract.models import TaskState
from llama_orch.core import refusals
from llama_orch.core.bar import Bar, BarKind
from llama_orch.core.fleet import Fleet
from llama_orch.core.pool import Pool
from llama_orch.core.rollout import Rollouts
from llama_orch.core.task import Task, TaskEvent
from llama_orch.errors import LlorchError

End = Callable[[Task, TaskEvent, float, LlorchError], None]


class Closing:
    """Over the scheduler's own tasks and fleet. `end` ends one task."""

    def __init__(self, fleet: Fleet, rollouts: Rollouts, tasks: Mapping[str, Task], end: End) -> None:
        self._fleet = fleet
        self._rollouts = rollouts
        self._tasks = tasks
        self._end = end

    def end_all_of(self, pool: Pool, error: LlorchError, now: float, *, running_too: bool = False) -> None:
        for task in [self._tasks[task_id] for task_id in pool.queue]:
            self._end(task, TaskEvent.FAIL, now, error)
        for task in list(self._tasks.values()) if running_too else []:
            if task.pool is pool and task.state is TaskState.RUNNING:
                self._end(task, TaskEvent.FAIL, now, error)

    def end_late(self, pool: Pool, now: float) -> None:
        """What the pool still has at its deadline."""
        if pool.drain_until_s is not None and pool.drain_until_s <= now:
            pool.drain_until_s = None
            error = refusals.drained(pool) if pool.bar is None else refusals.barred(pool, pool.bar)
            self.end_all_of(pool, error, now, running_too=True)

    def drain(self, pool: Pool, deadline_s: float, now: float) -> None:
        """Take no new tasks for the pool; at the time `deadline_s` end what it still has; unload it."""
        pool.is_draining, pool.drain_until_s, pool.wanted_until_s = True, deadline_s, 0.0
        self._rollouts.failed(pool.spec.pool_id, "the pool was drained", now)

    def bar(self, pool: Pool, bar: Bar | None, deadline_s: float | None, now: float) -> None:
        """Close the pool's door, or open it (None). A retired model's tasks may run to their end, or until the time
        `deadline_s`; those of one that cannot be trusted end now."""
        was_lasting = pool.bar is not None and pool.bar.is_lasting
        pool.bar = bar
        if bar is None or not bar.is_lasting:
            if was_lasting and not pool.is_draining:
                pool.drain_until_s = None
            return
        pool.wanted_until_s = 0.0
        if self._fleet.coming.get(pool.spec.pool_id) is pool:
            self._rollouts.failed(pool.spec.pool_id, bar.reason, now)
        if bar.kind is BarKind.UNTRUSTED:
            self.end_all_of(pool, refusals.barred(pool, bar), now, running_too=True)
        elif deadline_s is not None:
            pool.drain_until_s = deadline_s
