"""The scheduler: one state machine over tasks, queues, slots and replicas.

Methods are events; each takes the time (`now`, seconds, never going back) and leaves effects to be taken with
`take_effects`. No method waits, and none reads a clock, so a sequence of events gives the same effects every time.

Invariants, checked by tests/core/test_scheduler_machine.py after every event: a slot has at most one holder; a queue
stays within its capacity; within a priority tasks start in the order of admission; a task reaches one final state.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from llama_orch.contract.models import Priority, ReplicaState, TaskRequest, TaskState
from llama_orch.core import admission, placement, refusals
from llama_orch.core.effects import Abort, Admitted, Effect, Ended, Forget, Load, Start
from llama_orch.core.pool import Device, Pool, Replica
from llama_orch.core.prediction import Predictor
from llama_orch.core.queue import QueueFull
from llama_orch.core.task import ENDED, Outcome, Task, TaskEvent, request_digest
from llama_orch.errors import Conflict, LlorchError, NotFound

RETAINED_MAX = 10_000  # ended tasks kept at most, however long the time of retention is


@dataclass(frozen=True, slots=True)
class Verdict:
    """What admission says of one submission."""

    task: Task
    is_repeat: bool  # the same task_id with the same body came before (HP-ADM-8)


class Scheduler:
    """All state of admission and scheduling. `retain_s`: how long ended tasks stay readable."""

    def __init__(self, pools: Sequence[Pool], devices: Sequence[Device], *, retain_s: float) -> None:
        self.pools = {pool.spec.pool_id: pool for pool in pools}
        self.devices = {device.device_id: device for device in devices}
        self.replicas: dict[str, Replica] = {r.replica_id: r for pool in pools for r in pool.replicas.values()}
        self.tasks: dict[str, Task] = {}
        self.predictor = Predictor()
        self.is_draining = False
        self._retain_s = retain_s
        self._number = 0
        self._deadlines: list[tuple[float, int, str]] = []  # sorted; of the tasks that have not ended
        self._ended: deque[tuple[float, str]] = deque()
        self._effects: list[Effect] = []

    def take_effects(self) -> list[Effect]:
        taken, self._effects = self._effects, []
        return taken

    # -- admission ---------------------------------------------------------------------------------------------------

    def repeated(self, request: TaskRequest) -> Task | None:
        """The task that this request has made before; Conflict when its id stands for another body (HP-ADM-8)."""
        task = None if request.task_id is None else self.tasks.get(request.task_id.lower())
        if task is not None and task.request_digest != request_digest(request):
            raise Conflict(
                f"task {task.task_id} exists with another body; choose a new `task_id` or send the same body"
            )
        return task

    def choose_pool(self, request: TaskRequest) -> Pool:
        """The pool that the request would best go to now: ready ones first, then the least loaded per slot."""
        found = admission.matching_pools(list(self.pools.values()), request)

        def load(pool: Pool) -> tuple[bool, bool, bool, float]:
            busy = sum(replica.slots_busy for replica in pool.replicas.values())
            is_full = bool(len(pool.queue)) and len(pool.queue) >= pool.queue.capacity
            per_slot = (len(pool.queue) + busy) / max(1, pool.slots_total())
            return (not pool.is_live, not pool.is_ready, is_full, per_slot)

        return min(found, key=load)

    def check_room(self, pool: Pool, priority: Priority, now: float) -> None:
        """Refuse what `submit` would refuse now whatever the prompt is: an early word, the verdict is `submit`'s."""
        self._check_open(pool)
        if pool.queue.is_closed_to(priority) and not self._has_free_slot(pool):
            raise self._no_room(pool, now)

    def _no_room(self, pool: Pool, now: float) -> LlorchError:
        if not pool.is_ready and not len(pool.queue):  # a queue of no places is not what stands in the way
            return refusals.unready(pool, self.predictor.ready_advice_ms(pool, now))
        return refusals.full(pool, self.predictor.advice_ms(pool, self.tasks, now))

    @staticmethod
    def _has_free_slot(pool: Pool) -> bool:
        return any(replica.can_take(exclusive=False) for replica in pool.replicas.values())

    def submit(
        self,
        request: TaskRequest,
        *,
        task_id: str,
        seed: int,
        pool_id: str,
        prompt_tokens: Sequence[int],
        are_tokens_exact: bool,
        correlation_id: str,
        now: float,
    ) -> Verdict:
        """Admit or refuse. `prompt_tokens` has one count for each prompt; bounds instead of counts while no replica of
        the pool could be asked, then `are_tokens_exact` is false."""
        if (earlier := self.repeated(request)) is not None:
            return Verdict(earlier, is_repeat=True)
        pool = self.pools[pool_id]
        self._check_open(pool)
        check = admission.check_lengths if are_tokens_exact else admission.check_bounds
        max_tokens = check(request, pool.spec, prompt_tokens)
        self._number += 1
        task = Task(
            request=request,
            task_id=task_id,
            number=self._number,
            pool_id=pool_id,
            seed=seed,
            max_tokens=max_tokens,
            correlation_id=correlation_id,
            created_s=now,
            deadline_s=None if request.deadline_ms is None else now + request.deadline_ms / 1000,
            tokens_in=sum(prompt_tokens) if are_tokens_exact else None,
        )
        self._check_deadline(pool, task, now)
        self._enqueue(pool, task, now)
        return Verdict(task, is_repeat=False)

    def _check_open(self, pool: Pool) -> None:
        if self.is_draining or pool.is_draining:
            raise refusals.ending(pool)
        if not pool.is_live:
            raise refusals.gone(pool)

    def _check_deadline(self, pool: Pool, task: Task, now: float) -> None:
        if task.deadline_s is None:
            return
        wait_s = self.predictor.newcomer_wait_s(pool, task, self.tasks, now)
        if wait_s is None or now + wait_s < task.deadline_s:
            return
        raise refusals.cannot_be_met(pool, task, wait_s, self.predictor.advice_ms(pool, self.tasks, now))

    def _enqueue(self, pool: Pool, task: Task, now: float) -> None:
        """Start at once when nobody is ahead and a slot is free; else queue."""
        self.tasks[task.task_id] = task
        self._effects.append(Admitted(task.task_id))
        if pool.queue.has_ahead_of(task.priority) or not self._place(pool, task, now):
            try:
                dropped = pool.queue.put(task.task_id, task.priority)
            except QueueFull:
                del self.tasks[task.task_id]
                self._effects.pop()
                raise self._no_room(pool, now) from None
            if dropped is not None:
                wait_ms = self.predictor.advice_ms(pool, self.tasks, now)
                self._end(self.tasks[dropped], TaskEvent.FAIL, now, refusals.dropped(pool, wait_ms))
                self._dispatch(pool, now)  # the dropped one may have been a head that nobody could pass
        if task.deadline_s is not None:
            insort(self._deadlines, (task.deadline_s, task.number, task.task_id))

    # -- starting ----------------------------------------------------------------------------------------------------

    def _dispatch(self, pool: Pool, now: float) -> None:
        """Start tasks from the head of the queue while there is a place for it. The head is never overtaken, so a
        strict task that needs a whole replica gets it once the running ones end."""
        while (head := pool.queue.head()) is not None and self._place(pool, self.tasks[head], now):
            pool.queue.remove(head)

    def _place(self, pool: Pool, task: Task, now: float) -> bool:
        exclusive = task.is_strict and pool.spec.strict_needs_exclusive
        found = placement.candidates(pool.replicas.values(), self.devices, exclusive=exclusive)
        chosen = placement.pick(found)
        if chosen is None:
            return False
        task.placement = placement.reasons(chosen, found)
        task.lease = chosen.replica.take(task.task_id, exclusive=exclusive)
        task.replica_id = chosen.replica.replica_id
        task.started_s = now
        task.step(TaskEvent.START)
        self._effects.append(Start(task.task_id))
        return True

    # -- ending ------------------------------------------------------------------------------------------------------

    def cancel(self, task_id: str, now: float) -> None:
        """End a task for its client. Nothing when it has ended already (HP-STR-6)."""
        task = self.known(task_id)
        if task.state not in ENDED:
            pool = self.pools[task.pool_id]
            self._end(task, TaskEvent.CANCEL, now, refusals.canceled(pool))
            self._dispatch(pool, now)

    def cancel_all(self, now: float) -> None:
        """End every task that runs or waits, because the service ends."""
        for task in list(self.tasks.values()):
            if task.state not in ENDED:
                self._end(task, TaskEvent.CANCEL, now, refusals.service_ended(self.pools[task.pool_id]))

    # What engines report comes late at times: a lost replica's tasks have ended by then, or are forgotten.

    def counted(self, task_id: str, tokens_in: int) -> None:
        """The engine's own count, for a task that was admitted on a bound."""
        if (task := self.tasks.get(task_id)) is not None and task.state is TaskState.RUNNING:
            task.tokens_in = tokens_in

    def finished(self, task_id: str, outcome: Outcome, now: float) -> None:
        """The engine ran the task to its end and its slot is free."""
        if (task := self.tasks.get(task_id)) is None:
            return
        if task.state is TaskState.RUNNING and task.started_s is not None:
            task.tokens_in, task.tokens_out, task.outcome = outcome.tokens_in, outcome.tokens_out, outcome
            self.predictor.learn(task.pool_id, now - task.started_s, outcome)
            self._end(task, TaskEvent.FINISH, now, None)
        self._release(task, now)
        self._dispatch(self.pools[task.pool_id], now)

    def failed(self, task_id: str, error: LlorchError, now: float, *, is_replica_sound: bool = True) -> None:
        """The engine gave up on the task, and its slot is free; or `replica_lost` comes next, and frees it."""
        if (task := self.tasks.get(task_id)) is None:
            return
        if task.state is TaskState.RUNNING:
            self._end(task, TaskEvent.FAIL, now, error, abort=False)
        if is_replica_sound:
            self._release(task, now)
            self._dispatch(self.pools[task.pool_id], now)

    def released(self, task_id: str, now: float) -> None:
        """The engine has let go of an aborted task's slot."""
        if (task := self.tasks.get(task_id)) is not None:
            self._release(task, now)
            self._dispatch(self.pools[task.pool_id], now)

    def progressed(self, task_id: str, tokens: int) -> None:
        """The engine decoded this many more tokens of the task."""
        if (task := self.tasks.get(task_id)) is not None and task.state is TaskState.RUNNING:
            task.tokens_out += tokens

    def _end(self, task: Task, event: TaskEvent, now: float, error: LlorchError | None, *, abort: bool = True) -> None:
        was_running = task.state is TaskState.RUNNING
        task.step(event)
        task.ended_s, task.error = now, error
        pool = self.pools[task.pool_id]
        pool.tokens_in += task.tokens_in or 0
        pool.tokens_out += task.tokens_out
        if was_running and abort and event is not TaskEvent.FINISH:
            self._effects.append(Abort(task.task_id))
        if not was_running:
            pool.queue.remove(task.task_id)
        if task.deadline_s is not None:
            del self._deadlines[bisect_left(self._deadlines, (task.deadline_s, task.number, task.task_id))]
        task.forget_texts()
        self._effects.append(Ended(task.task_id))
        self._retire(task, now)

    def _release(self, task: Task, now: float) -> None:
        if task.lease is not None:
            self.replicas[task.lease.replica_id].release(task.lease, task.task_id)
            task.lease = None
            self._retire(task, now)

    # -- replicas ----------------------------------------------------------------------------------------------------

    def replica_ready(self, replica_id: str, *, slots: int, model_digest: str, now: float) -> None:
        replica = self.replicas[replica_id]
        pool = self.pools[replica.pool_id]
        replica.mark_ready(slots, now)
        pool.model_digest = model_digest
        self._dispatch(pool, now)

    def replica_lost(self, replica_id: str, reason: str, now: float) -> None:
        """Its worker is gone. Its tasks end with WORKER_RESET and nothing else is disturbed (HP-PLC-7)."""
        replica = self.replicas[replica_id]
        pool = self.pools[replica.pool_id]
        for task_id in dict.fromkeys(replica.leases.values()):
            task = self.tasks[task_id]
            if task.state is TaskState.RUNNING:
                self._end(task, TaskEvent.FAIL, now, refusals.reset(pool, replica_id, reason))
            self._release(task, now)
        replica.mark_lost(reason, now, may_restart=not self.is_draining)
        if not pool.is_live:
            self._fail_queue(pool, now)

    def replica_explained(self, replica_id: str, reason: str) -> None:
        """The true reason of a loss that was first seen from its effects, such as a connection that broke."""
        self.replicas[replica_id].last_error = reason

    def _fail_queue(self, pool: Pool, now: float) -> None:
        for task_id in list(pool.queue):
            self._end(self.tasks[task_id], TaskEvent.FAIL, now, refusals.gone(pool))

    def device_seen(self, device_id: str, vram_free_bytes: int) -> None:
        """What the device layer measured."""
        self.devices[device_id].vram_free_bytes = vram_free_bytes

    # -- time --------------------------------------------------------------------------------------------------------

    def drain(self, now: float) -> None:
        """Take nothing more. What waits is sent back; what runs may finish."""
        self.is_draining = True
        for replica in self.replicas.values():
            if replica.state is ReplicaState.BACKOFF:
                replica.mark_stopped()
        for pool in self.pools.values():
            pool.is_draining = True
            for task_id in list(pool.queue):
                self._end(self.tasks[task_id], TaskEvent.FAIL, now, refusals.ending(pool))

    @property
    def is_idle(self) -> bool:
        """No slot is held and nothing waits."""
        return not any(r.leases for r in self.replicas.values()) and not any(len(p.queue) for p in self.pools.values())

    def tick(self, now: float) -> None:
        """Let time pass: retention, deadlines, restarts; in this order, so no task ends and is forgotten at once."""
        while self._ended and (self._ended[0][0] + self._retain_s <= now or len(self._ended) > RETAINED_MAX):
            self.forget_oldest()
        while self._deadlines and self._deadlines[0][0] <= now:
            task = self.tasks[self._deadlines[0][2]]
            self._end(task, TaskEvent.FAIL, now, refusals.too_late(self.pools[task.pool_id], task))
            self._dispatch(self.pools[task.pool_id], now)
        for replica in self.replicas.values():
            if replica.retry_at_s is not None and replica.retry_at_s <= now:
                replica.mark_loading(now)
                self._effects.append(Load(replica.replica_id))

    def _retire(self, task: Task, now: float) -> None:
        """Once a task has ended and holds nothing, its time of retention begins."""
        if task.state in ENDED and task.lease is None:
            self._ended.append((now, task.task_id))

    def forget_oldest(self) -> bool:
        """Give up the task that ended first; False when there is none."""
        if not self._ended:
            return False
        _, task_id = self._ended.popleft()
        del self.tasks[task_id]
        self._effects.append(Forget(task_id))
        return True

    def next_due(self) -> float | None:
        """When `tick` has something to do next."""
        due = [replica.retry_at_s for replica in self.replicas.values() if replica.retry_at_s is not None]
        if self._deadlines:
            due.append(self._deadlines[0][0])
        if self._ended:
            ended_s = self._ended[0][0]
            due.append(ended_s if len(self._ended) > RETAINED_MAX else ended_s + self._retain_s)
        return min(due, default=None)

    # -- reading -----------------------------------------------------------------------------------------------------

    def known(self, task_id: str) -> Task:
        try:
            return self.tasks[task_id]
        except KeyError:
            raise NotFound(f"no task {task_id}; ended tasks are kept for {self._retain_s:.0f} s") from None

    def pool(self, pool_id: str) -> Pool:
        try:
            return self.pools[pool_id]
        except KeyError:
            raise NotFound(f"no pool {pool_id!r}; the pools are: {', '.join(self.pools)}") from None
