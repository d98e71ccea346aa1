"""Starts tasks from the heads of queues. A task is bound to a replica here and no sooner (late binding)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llama_orch.contract.models import ReplicaState
from llama_orch.core import placement
from llama_orch.core.effects import Effect, Start
from llama_orch.core.fleet import Fleet
from llama_orch.core.placement import Candidate, Faster
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Predictor
from llama_orch.core.replica import Replica
from llama_orch.core.sessionbook import SessionBook
from llama_orch.core.task import Task, TaskEvent

HOLD_BACK_QUEUE_MAX = 16  # where more wait, a slow card is of use in any case
# Of its time on the slow card, that a task is held back at most: who runs on the fast one may take far longer than was
# expected.
HOLD_BACK_SHARE_MAX = 0.5


class Dispatcher:
    """Over the scheduler's own tasks and fleet."""

    def __init__(
        self,
        fleet: Fleet,
        predictor: Predictor,
        tasks: Mapping[str, Task],
        book: SessionBook,
        emit: Callable[[Effect], None],
    ) -> None:
        self._fleet = fleet
        self._predictor = predictor
        self._tasks = tasks
        self._emit = emit
        self._book = book

    def dispatch(self, pool: Pool, now: float) -> None:
        """Start tasks from the head of the queue while there is a place for it. The head is never overtaken, so a
        strict task that needs a whole replica gets it once the running ones end."""
        while (head := pool.queue.head()) is not None and self.place(pool, self._tasks[head], now):
            pool.queue.remove(head)

    def place(self, pool: Pool, task: Task, now: float, *, may_wait: bool = True) -> bool:
        """Start the task on the replica that suits it best, if there is one. `may_wait`: it has a place in the queue,
        so that it can be held back."""
        exclusive = task.is_strict and pool.spec.strict_needs_exclusive
        session_id = self._book.session_for_kv(task)
        found = placement.candidates(
            [r for r in pool.replicas.values() if self._fleet.ledger.lost_device(r) is None],
            self._fleet.ledger.scarcest_free_bytes,
            exclusive=exclusive,
            warm_slot=lambda replica: self._book.affinity.slot_on(session_id, replica),
        )
        chosen = self._choose(pool, task, found, now) or (None if may_wait else placement.pick(found))
        if chosen is None:
            return False
        task.placement = placement.reasons(chosen, found)
        task.lease = chosen.replica.take(task.task_id, exclusive=exclusive, slot=chosen.warm_slot)
        task.replica_id, task.model_digest = chosen.replica.replica_id, chosen.replica.model_digest
        task.started_s = now
        self._book.started(task, chosen.replica)
        task.step(TaskEvent.START)
        self._emit(Start(task.task_id))
        return True

    def _choose(self, pool: Pool, task: Task, found: Sequence[Candidate], now: float) -> Candidate | None:
        """The best one on which the task need not be held back: the faster one may be free as well."""
        left = list(found)
        while (chosen := placement.pick(left)) is not None and self.is_held_back(pool, task, chosen, now):
            left = [candidate for candidate in left if candidate is not chosen]
        return chosen

    def is_held_back(self, pool: Pool, task: Task, chosen: Candidate, now: float) -> bool:
        """Whether the task is done sooner if it waits for a faster replica than the chosen one."""
        if len(pool.replicas) == 1 or len(pool.queue) > HOLD_BACK_QUEUE_MAX:
            return False
        own_s = self._predictor.service_s(pool, task, chosen.replica)
        if own_s is None:
            return False
        behind = [self._tasks[task_id] for task_id in pool.queue if task_id != task.task_id]
        faster = []
        for replica in pool.replicas.values():
            if replica is chosen.replica or replica.state is not ReplicaState.READY or replica.is_closing:
                continue
            services_s = [self._predictor.service_s(pool, one, replica) or 0.0 for one in (task, *behind)]
            if services_s[0] < own_s:
                faster.append(Faster(self._free_in_s(pool, task, replica, now), services_s))
        if not placement.hold_back(own_s, faster):
            return False
        since_s = task.held_back_since_s = now if task.held_back_since_s is None else task.held_back_since_s
        return now - since_s < HOLD_BACK_SHARE_MAX * own_s

    def _free_in_s(self, pool: Pool, task: Task, replica: Replica, now: float) -> float:
        free_in_s = self._predictor.free_in_s(pool, replica, self._tasks, now)
        return max(free_in_s) if task.is_strict and pool.spec.strict_needs_exclusive else min(free_in_s)
