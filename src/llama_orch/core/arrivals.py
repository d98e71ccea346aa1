"""Pools whose model's file is still on its way from elsewhere: tasks wait for it in their queues (HP-PLC-8).

Such a pool has no replicas, and what it says of itself is what its engine offers at all. Once the file is there, those
tasks that this very model cannot do end with a refusal; where it does not come, all of them do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from llama_orch.core import admission
from llama_orch.core.fleet import Fleet
from llama_orch.core.pool import Pool, PoolSpec
from llama_orch.core.replica import Replica
from llama_orch.core.task import Task, TaskEvent
from llama_orch.errors import LlorchError

End = Callable[[Task, TaskEvent, float, LlorchError], None]


class Arrivals:
    """Over the scheduler's own tasks and fleet. `end` ends one task; `settle` is called after each event."""

    def __init__(self, fleet: Fleet, tasks: Mapping[str, Task], end: End, settle: Callable[[float], None]) -> None:
        self._fleet = fleet
        self._tasks = tasks
        self._end = end
        self._settle = settle

    def came(self, pool: Pool, spec: PoolSpec, replicas: Mapping[str, Replica], now: float) -> None:
        """The file is there: the pool is this now, and has these replicas, which are `unloaded`."""
        self._fleet.arrive(pool, spec, replicas)
        for task in [self._tasks[task_id] for task_id in pool.queue]:
            bounds = admission.token_bounds(task.request, admission.texts(task.request))
            if (error := admission.refusal_after_all(task.request, spec, bounds)) is not None:
                self._end(task, TaskEvent.FAIL, now, error)
        self._settle(now)

    def failed(self, pool: Pool, error: LlorchError, now: float) -> None:
        """It does not come: who waits is told why, and the pool goes."""
        for task in [self._tasks[task_id] for task_id in pool.queue]:
            self._end(task, TaskEvent.FAIL, now, error)
        self._fleet.forget_arriving(pool)
        self._settle(now)
