"""The scheduler: one state machine over tasks, queues, slots, replicas and devices.

Methods are events; each takes the time (`now`, seconds, never going back) and leaves effects to be taken with
`take_effects`. No method waits, and none reads a clock, so a sequence of events gives the same effects every time.

Invariants, checked by tests/core/test_scheduler_machine.py after every event: a slot has at most one holder; a queue
stays within its capacity; within a priority tasks start in the order of admission; a task reaches one final state; no
device is given away twice.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama_orch.contract.config import SessionsSettings
from llama_orch.contract.models import ReplicaState, TaskRequest, TaskState
from llama_orch.core import admission, refusals
from llama_orch.core.arrivals import Arrivals
from llama_orch.core.bar import Bar
from llama_orch.core.closing import Closing
from llama_orch.core.dispatch import Dispatcher
from llama_orch.core.effects import Abort, Admitted, Effect, Ended, Forget
from llama_orch.core.fleet import Fleet
from llama_orch.core.gate import Gate
from llama_orch.core.ledger import Device
from llama_orch.core.pool import Pool
from llama_orch.core.prediction import Predictor
from llama_orch.core.queue import QueueFull
from llama_orch.core.rollout import Rollouts
from llama_orch.core.sessionbook import SessionBook
from llama_orch.core.task import ENDED, Outcome, Task, TaskEvent, Verdict, request_digest
from llama_orch.core.tasktable import TaskTable
from llama_orch.errors import Conflict, LlorchError, NotFound


class Scheduler:
    """All state of admission and scheduling. `retain_s`: how long ended tasks stay readable; `min_residency_s`: how
    long a model that was loaded on demand stays at least."""

    def __init__(
        self,
        pools: Sequence[Pool],
        devices: Sequence[Device],
        *,
        retain_s: float,
        min_residency_s: float = 30.0,
        sessions: SessionsSettings | None = None,
    ) -> None:
        self._effects: list[Effect] = []
        self._table = TaskTable(retain_s)
        self.tasks = self._table.tasks
        self.predictor = Predictor()
        self.fleet = Fleet(pools, devices, self.predictor, self._emit, min_residency_s=min_residency_s)
        self.pools, self.replicas = self.fleet.pools, self.fleet.replicas
        self.devices = self.fleet.ledger.devices
        self.rollouts = Rollouts(self.fleet)
        self.book = SessionBook(sessions or SessionsSettings(), self.replicas, self.tasks, self.predictor, self._emit)
        self._dispatcher = Dispatcher(self.fleet, self.predictor, self.tasks, self.book, self._emit)
        self.closing = Closing(self.fleet, self.rollouts, self.tasks, self._end)
        self.arrivals = Arrivals(self.fleet, self.tasks, self._end, self.settle)
        self.gate = Gate(self.fleet, self.predictor, self.tasks, self.book)
        self._number = 0
        self.known = self._table.known

    def _emit(self, effect: Effect) -> None:
        self._effects.append(effect)

    def take_effects(self) -> list[Effect]:
        taken, self._effects = self._effects, []
        return taken

    @property
    def is_draining(self) -> bool:
        """The service ends."""
        return self.fleet.is_ending

    def pool(self, pool_id: str) -> Pool:
        try:
            return self.pools[pool_id]
        except KeyError:
            raise NotFound(f"no pool {pool_id!r}; the pools are: {', '.join(self.pools)}") from None

    # -- admission ---------------------------------------------------------------------------------------------------

    def repeated(self, request: TaskRequest) -> Task | None:
        """The task that this request has made before; Conflict when its id stands for another body (HP-ADM-8)."""
        task = None if request.task_id is None else self.tasks.get(request.task_id.lower())
        if task is not None and task.request_digest != request_digest(request):
            raise Conflict(
                f"task {task.task_id} exists with another body; choose a new `task_id` or send the same body"
            )
        return task

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
        self.gate.check_open(pool, now)
        self._number += 1
        task = admission.task_of(
            request,
            pool,
            prompt_tokens,
            are_tokens_exact=are_tokens_exact,
            number=self._number,
            task_id=task_id,
            seed=seed,
            correlation_id=correlation_id,
            now=now,
        )
        use = self.book.reserve(task, prompt_tokens, now)
        self.gate.check_deadline(pool, task, now)
        self._enqueue(pool, task, now)
        self.book.admit(task, use, now)
        self.gate.came(pool, request)
        self.settle(now)
        self._remember_prediction(task, now)
        return Verdict(task, is_repeat=False)

    def _enqueue(self, pool: Pool, task: Task, now: float) -> None:
        """Start at once when nobody is ahead and a slot is free; else queue."""
        self._table.add(task)
        self._emit(Admitted(task.task_id))
        may_wait = len(pool.queue) < pool.queue.capacity
        if pool.queue.has_ahead_of(task.priority) or not self._dispatcher.place(pool, task, now, may_wait=may_wait):
            try:
                dropped = pool.queue.put(task.task_id, task.priority)
            except QueueFull:
                self._table.withdraw(task)
                self._effects.pop()
                raise self.gate.no_room(pool, task.request, now) from None
            if dropped is not None:
                victim = self.tasks[dropped]
                wait_ms = self.gate.turn_ms(pool, victim.request, now)
                self._end(victim, TaskEvent.FAIL, now, refusals.dropped(pool, wait_ms))
                self._dispatcher.dispatch(pool, now)  # the dropped one may have been a head that nobody could pass

    def _remember_prediction(self, task: Task, now: float) -> None:
        """What the task is told now, to be held against the truth later (HP-PLC-3)."""
        if task.state is TaskState.QUEUED:
            start_in_s = self.predictor.outlook(task, self.tasks, now).start_in_s
            task.predicted_s = None if start_in_s is None else now + start_in_s

    def settle(self, now: float) -> None:
        """See that who waits gets a replica, and that no model keeps memory that nobody needs. Then see whether anybody
        is held back for a replica that is about to leave."""
        self.rollouts.settle(now)
        self.fleet.settle(now)
        while self.rollouts.settle(now):
            self.fleet.settle(now)
        for pool in self.fleet.every_pool():
            self._dispatcher.dispatch(pool, now)

    # -- ending ------------------------------------------------------------------------------------------------------

    def cancel(self, task_id: str, now: float) -> None:
        """End a task for its client. Nothing when it has ended already (HP-STR-6)."""
        task = self.known(task_id)
        if task.state not in ENDED:
            self._end(task, TaskEvent.CANCEL, now, refusals.canceled(task.pool))
            self._dispatcher.dispatch(task.pool, now)
            self.settle(now)

    def cancel_all(self, now: float) -> None:
        """End every task that runs or waits, because the service ends."""
        for task in list(self.tasks.values()):
            if task.state not in ENDED:
                self._end(task, TaskEvent.CANCEL, now, refusals.service_ended(task.pool))

    # What engines report comes late at times: a lost replica's tasks have ended by then, or are forgotten.

    def counted(self, task_id: str, tokens_in: int) -> None:
        """The engine's own count, for a task that was admitted on a bound."""
        if (task := self.tasks.get(task_id)) is not None and task.state is TaskState.RUNNING:
            task.tokens_in = tokens_in

    def finished(self, task_id: str, outcome: Outcome, now: float) -> None:
        """The engine ran the task to its end and its slot is free."""
        if (task := self.tasks.get(task_id)) is None:
            return
        if task.state is TaskState.RUNNING and task.started_s is not None and task.lease is not None:
            task.tokens_in, task.tokens_out, task.outcome = outcome.tokens_in, outcome.tokens_out, outcome
            replica = self.replicas[task.lease.replica_id]
            self.predictor.learn(task.pool, replica, now - task.started_s, outcome, task.request.expected_tokens)
            self.book.ran(task, replica, outcome)
            self._end(task, TaskEvent.FINISH, now, None)
        self._release(task, now)

    def failed(self, task_id: str, error: LlorchError, now: float, *, is_replica_sound: bool = True) -> None:
        """The engine gave up on the task, and its slot is free; or `replica_lost` comes next, and frees it."""
        if (task := self.tasks.get(task_id)) is None:
            return
        if task.state is TaskState.RUNNING:
            self._end(task, TaskEvent.FAIL, now, error, abort=False)
        if is_replica_sound:
            self._release(task, now)

    def released(self, task_id: str, now: float) -> None:
        """The engine has let go of an aborted task's slot."""
        if (task := self.tasks.get(task_id)) is not None:
            self._release(task, now)

    def progressed(self, task_id: str, tokens: int) -> None:
        """The engine decoded this many more tokens of the task."""
        if (task := self.tasks.get(task_id)) is not None and task.state is TaskState.RUNNING:
            task.tokens_out += tokens

    def _end(self, task: Task, event: TaskEvent, now: float, error: LlorchError | None, *, abort: bool = True) -> None:
        was_running = task.state is TaskState.RUNNING
        task.step(event)
        task.ended_s, task.error = now, error
        counted = self.pools.get(task.pool_id, task.pool)  # a pool's counts outlive its model
        counted.tokens_in += task.tokens_in or 0
        counted.tokens_out += task.tokens_out
        if was_running and abort and event is not TaskEvent.FINISH:
            self._emit(Abort(task.task_id))
        if not was_running:
            task.pool.queue.remove(task.task_id)
        self._table.settle_deadline(task)
        self.book.sessions.settle(task, now)
        task.forget_texts()
        self._emit(Ended(task.task_id))
        self._table.retire(task, now)

    def _let_go(self, task: Task, now: float) -> None:
        if task.lease is not None:
            if (replica := self.replicas.get(task.lease.replica_id)) is not None:
                slot = task.lease.slots[0]
                replica.release(task.lease, task.task_id, now, keeps_kv=self.book.affinity.holds(replica, slot))
                self.book.let_go(task, replica, slot)
            task.lease = None
            self._table.retire(task, now)

    def _release(self, task: Task, now: float) -> None:
        self._let_go(task, now)
        self._dispatcher.dispatch(task.pool, now)
        self.settle(now)

    # -- replicas and devices ----------------------------------------------------------------------------------------

    def replica_ready(self, replica_id: str, *, slots: int, model_digest: str | None, now: float) -> None:
        """`model_digest` is None of a model elsewhere."""
        replica = self.replicas[replica_id]
        if replica.state is not ReplicaState.LOADING:  # it was told to end while it reported
            return
        pool = self.fleet.owner(replica)
        self.predictor.learn_load(pool, replica, now)
        replica.mark_ready(slots, now)
        pool.model_digest = replica.model_digest = model_digest
        self.rollouts.came(replica)
        self.fleet.condemn_if_lost(replica)
        self._dispatcher.dispatch(pool, now)
        self.settle(now)

    def replica_lost(
        self, replica_id: str, reason: str, now: float, *, is_shortage: bool = False, is_gone: bool = True
    ) -> None:
        """Its worker is lost. Its tasks end with WORKER_RESET and nothing else is disturbed (HP-PLC-7). `is_shortage`:
        it could not be loaded because its devices had less room than was thought. Unless it `is_gone`, its process
        still has its memory, and `replica_gone` comes."""
        replica = self.replicas[replica_id]
        if not replica.is_launched or replica.state not in (ReplicaState.LOADING, ReplicaState.READY):
            return  # it was told to end before this was reported: `replica_unloaded` comes
        replica.is_lingering = not is_gone
        pool = self.fleet.owner(replica)
        for task_id in dict.fromkeys(replica.leases.values()):
            task = self.tasks[task_id]
            if task.state is TaskState.RUNNING:
                self._end(task, TaskEvent.FAIL, now, refusals.reset(pool, replica_id, reason))
            self._let_go(task, now)
        if self.rollouts.of(replica) is not None and not self.is_draining:
            replica.mark_failed_load(reason, now)
            self.rollouts.failed(replica.pool_id, reason, now)
        elif is_shortage and not self.is_draining:
            self.fleet.ran_short(replica, reason, now)
        else:
            replica.mark_lost(reason, now, may_restart=not self.is_draining)
        self._send_back_from(pool, now)
        self.settle(now)

    def _send_back_from(self, pool: Pool, now: float) -> None:
        """Where nothing is left that could serve those who wait."""
        if not pool.is_live:
            self.closing.end_all_of(pool, refusals.gone(pool), now)
        elif (lost := self.fleet.lost_devices(pool)) is not None:
            self.closing.end_all_of(pool, refusals.without_devices(pool, lost), now)

    def replica_gone(self, replica_id: str, now: float) -> None:
        """The process of a lost worker has ended, and its memory is back."""
        if (replica := self.replicas.get(replica_id)) is not None:
            replica.mark_gone()
            self.settle(now)

    def replica_explained(self, replica_id: str, reason: str) -> None:
        """The true reason of a loss that was first seen from its effects, such as a connection that broke."""
        if (replica := self.replicas.get(replica_id)) is not None:
            replica.last_error = reason

    def replica_unloaded(self, replica_id: str, now: float) -> None:
        """Its worker is gone as it was told, and its memory is back."""
        replica = self.replicas[replica_id]
        if replica.state is ReplicaState.UNLOADING:
            replica.mark_unloaded()
        self.settle(now)

    def device_seen(
        self, device_id: str, vram_free_bytes: int, now: float, problem: str | None = None, *, is_lost: bool = False
    ) -> None:
        """What the device layer measured. Tasks whose pool has nothing but lost devices left are sent back."""
        if self.fleet.device_seen(device_id, vram_free_bytes, problem, is_lost=is_lost):
            for pool in self.fleet.every_pool():
                self._send_back_from(pool, now)

    # -- pools -------------------------------------------------------------------------------------------------------

    def want(self, pool: Pool, now: float) -> None:
        """Somebody could not be queued because the pool's model is not loaded: load it, the request will come again."""
        self.fleet.want(pool, now)
        self.settle(now)

    def drain_pool(self, pool_id: str, deadline_s: float, now: float) -> None:
        """Take no new tasks for the pool; at the time `deadline_s` end what it still has; unload it."""
        self.closing.drain(self.pool(pool_id), deadline_s, now)
        self.tick(now)

    def bar_pool(self, pool: Pool, bar: Bar | None, now: float, deadline_s: float | None = None) -> None:
        """What the catalog has decided of the pool's model; None: it may be served (again)."""
        self.closing.bar(pool, bar, deadline_s, now)
        self.tick(now)

    def reload_pool(self, pool_id: str, new: Pool, now: float) -> None:
        """Put another model in the pool's place: see rollout.py."""
        old = self.pool(pool_id)
        if self.is_draining:
            raise refusals.ending(old)
        if self.rollouts.is_under_way(pool_id):
            raise Conflict(f"pool {pool_id} is being reloaded already ({old.last_reload}); wait for its outcome")
        self.rollouts.begin(old, new, now)
        self.settle(now)

    # -- time --------------------------------------------------------------------------------------------------------

    def drain(self, now: float) -> None:
        """The service ends: take nothing more. What waits is sent back; what runs may finish."""
        self.fleet.end()
        for pool in self.fleet.every_pool():
            pool.is_draining = True
            self.closing.end_all_of(pool, refusals.ending(pool), now)

    @property
    def is_idle(self) -> bool:
        """No slot is held and nothing waits."""
        return all(pool.is_idle for pool in self.fleet.every_pool())

    def tick(self, now: float) -> None:
        """Let time pass: retention, deadlines, restarts; in this order, so no task ends and is forgotten at once."""
        while self._table.is_crowded(now):
            self.forget_oldest()
        while (task := self._table.next_late(now)) is not None:
            self._end(task, TaskEvent.FAIL, now, refusals.too_late(task.pool, task))
        for pool in self.fleet.every_pool():
            self.closing.end_late(pool, now)
            if self.fleet.is_given_up(pool, now):
                self.closing.end_all_of(pool, refusals.without_room(pool), now)
            self._dispatcher.dispatch(pool, now)
        self.book.expire(now)
        if not self.is_draining:
            self.fleet.tick(now)
        self.settle(now)

    def forget_oldest(self) -> bool:
        """Give up the task that ended first; False when there is none."""
        task_id = self._table.forget_oldest()
        if task_id is not None:
            self._emit(Forget(task_id))
        return task_id is not None

    def next_due(self) -> float | None:
        """When `tick` has something to do next."""
        due = self._table.next_due()
        if (session_due := self.book.sessions.next_due()) is not None:
            due.append(session_due)
        busy = [pool for pool in self.fleet.every_pool() if not pool.is_idle]
        due += [pool.drain_until_s for pool in busy if pool.drain_until_s is not None]
        if not self.is_draining and (fleet_due := self.fleet.next_due()) is not None:
            due.append(fleet_due)
        return min(due, default=None)
