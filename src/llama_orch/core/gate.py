"""Who may enter now: the pool that a request would go to, and the refusals that need no look at its prompt."""

from __future__ import annotations

from collections.abc import Mapping

from llama_orch.contract.models import TaskRequest
from llama_orch.core import admission, refusals
from llama_orch.core.fleet import Fleet
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Predictor, to_advice_ms
from llama_orch.core.sessionbook import SessionBook
from llama_orch.core.task import Task, request_digest
from llama_orch.core.turns import Key
from llama_orch.errors import LlorchError


class Gate:
    """Over the scheduler's own tasks and fleet. Raises refusals; changes nothing but the quarantine of a pool, and the
    turns of those whom it sends away."""

    def __init__(self, fleet: Fleet, predictor: Predictor, tasks: Mapping[str, Task], book: SessionBook) -> None:
        self._fleet = fleet
        self._predictor = predictor
        self._tasks = tasks
        self._book = book

    def choose_pool(self, request: TaskRequest) -> Pool:
        """The pool that the request would best go to now: ready ones first, then the one that holds its session's KV,
        then the least loaded per slot."""
        found = admission.matching_pools(list(self._fleet.pools.values()), request)

        warmth = self._book.warmth(request.session_id)

        def load(pool: Pool) -> tuple[bool, bool, bool, bool, bool, float]:
            busy = sum(replica.slots_busy for replica in pool.replicas.values())
            is_full = bool(len(pool.queue)) and len(pool.queue) >= pool.queue.capacity
            per_slot = (len(pool.queue) + busy) / max(1, pool.slots_total())
            is_closed = pool.is_draining or pool.is_paused or pool.bar is not None
            is_warm = warmth is not None and warmth.replica_id in pool.replicas
            return (is_closed, not pool.is_live, not pool.is_ready, is_full, not is_warm, per_slot)

        return min(found, key=load)

    def check_room(self, pool: Pool, request: TaskRequest, now: float) -> None:
        """Refuse what `submit` would refuse now whatever the prompt is: an early word, the verdict is `submit`'s."""
        self.check_open(pool, now)
        has_slot = any(replica.can_take(exclusive=False) for replica in pool.replicas.values())
        if pool.queue.is_closed_to(request.priority) and not has_slot:
            raise self.no_room(pool, request, now)

    def no_room(self, pool: Pool, request: TaskRequest, now: float) -> LlorchError:
        if not pool.is_ready and not len(pool.queue):  # a queue of no places is not what stands in the way
            return refusals.unready(pool, self._predictor.ready_advice_ms(pool, now))
        return refusals.full(pool, self.turn_ms(pool, request, now))

    def turn_ms(self, pool: Pool, request: TaskRequest, now: float) -> int:
        """When the one who is sent away is to come again, which is a turn of its own."""
        wait_s = pool.turns.give(
            _key(request), now, lambda ahead: self._predictor.place_in_s(pool, self._tasks, now, ahead)
        )
        return to_advice_ms(wait_s)

    def came(self, pool: Pool, request: TaskRequest) -> None:
        """Who was told to come again has come, and found room."""
        pool.wanted_until_s = 0.0
        if len(pool.turns):
            pool.turns.came(_key(request))

    def check_open(self, pool: Pool, now: float) -> None:
        """Whether the pool takes tasks at all."""
        if self._fleet.is_ending:
            raise refusals.ending(pool)
        if pool.bar is not None:
            raise refusals.barred(pool, pool.bar)
        if pool.is_draining:
            raise refusals.draining(pool)
        if pool.is_paused:
            raise refusals.reloading(pool, self._predictor.advice_ms(pool, self._tasks, now))
        if not pool.is_live:
            self._fleet.revive(pool, now)
        if not pool.is_live:
            raise refusals.gone(pool)
        if (lost := self._fleet.lost_devices(pool)) is not None:
            raise refusals.without_devices(pool, lost)

    def check_deadline(self, pool: Pool, task: Task, now: float) -> None:
        """Refuse a deadline that cannot be met, as far as that is known (HP-ADM-7)."""
        if task.deadline_s is None:
            return
        wait_s = self._predictor.newcomer_wait_s(pool, task, self._tasks, now)
        if wait_s is None or now + wait_s < task.deadline_s:
            return
        # A repeat has as much time again. The soonest that it can be met is so much before the start that is predicted.
        raise refusals.cannot_be_met(pool, task, wait_s, to_advice_ms(now + wait_s - task.deadline_s))


def _key(request: TaskRequest) -> Key:
    """A client that gives its tasks no id is known by what it asks."""
    return request_digest(request) if request.task_id is None else request.task_id
