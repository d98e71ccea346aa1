"""What must hold in every world, looked at after each event of the scheduler.

The checker stands where the runtime takes the scheduler's effects: what it sees is what the runtime is about to do. It
never raises there, because the runtime would take that for a fault of its own: what is wrong is kept in `violations`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from llama_orch.contract.models import ErrorCode, Priority, ReplicaState, TaskState
from llama_orch.core.effects import Abort, Admitted, Condemn, Dispose, Effect, Ended, Evict, Forget, Load, Start, Unload
from llama_orch.core.pool import Pool
from llama_orch.core.queue import PRIORITIES
from llama_orch.core.task import ENDED, Task
from llama_orch.testing.stage import Stage

VIOLATIONS_MAX = 20
DEADLINE_SLACK_S = 0.002

# What may follow what in a task's life. A Forget ends it, and its id is free again.
NEXT: dict[str, tuple[str, ...]] = {
    "": ("Admitted",),
    "Admitted": ("Start", "Ended"),
    "Start": ("Abort", "Ended"),
    "Abort": ("Ended",),
    "Ended": ("Forget",),
}


@dataclass(slots=True)
class Life:
    """One admitted task, and the last effect that was about it."""

    task: Task
    last: str = "Admitted"
    at_end: tuple[object, ...] | None = None

    def seen_at_end(self) -> tuple[object, ...]:
        task = self.task
        return task.state, task.error, task.ended_s, task.tokens_in, task.tokens_out, task.outcome


@dataclass(slots=True)
class Tally:
    """What was counted on the way, to compare the metrics with."""

    admitted: Counter[str] = field(default_factory=Counter)  # by pool
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)  # by pool and state
    started: Counter[str] = field(default_factory=Counter)


class Checker:
    """Watches one stage from before its first event. `note` is told of every effect, for the trace."""

    def __init__(self, stage: Stage, note: Callable[[str], None], now: Callable[[], float]) -> None:
        self._stage = stage
        self._scheduler = stage.scheduler
        self._note = note
        self._now = now
        self._take = self._scheduler.take_effects
        self._scheduler.take_effects = self._taken  # type: ignore[method-assign]
        self._last_started: dict[tuple[Pool, Priority], int] = {}
        self.lives: dict[str, Life] = {}
        self.past: list[Life] = []  # forgotten ones
        self.tally = Tally()
        self.violations: list[str] = []

    def violate(self, text: str) -> None:
        """Keep what is wrong, once each and not for ever."""
        if len(self.violations) < VIOLATIONS_MAX and text not in self.violations:
            self.violations.append(text)
            self._note(f"VIOLATION {text}")

    def expect(self, holds: bool, text: str) -> None:
        if not holds:
            self.violate(text)

    def _taken(self) -> list[Effect]:
        effects = self._take()
        for effect in effects:
            self._see(effect)
        if effects:
            self.check()
        return effects

    def check(self) -> None:
        """The state as it is now."""
        self._check_leases()
        for pool in self._scheduler.fleet.every_pool():
            self._check_queue(pool)
            self._check_head(pool)
        self.check_devices()
        for life in self.lives.values():
            if life.at_end is not None:
                self.expect(life.seen_at_end() == life.at_end, f"{self.name(life.task)} has changed after its end")

    @staticmethod
    def name(task: Task) -> str:
        return f"task {task.number}"

    def whereabouts(self, task_id: str | None) -> str:
        """What a task waits for, as far as can be told."""
        life = None if task_id is None else self.lives.get(task_id)
        if life is None:
            return "not admitted"
        task = life.task
        if task.state is not TaskState.QUEUED:
            return f"{task.state.value} on {task.replica_id}"
        states = ", ".join(f"{r.replica_id} {r.state.value}" for r in task.pool.replicas.values())
        return f"queued in {task.pool_id} ({states}), which lacks {task.pool.why_not_loaded or 'nothing'}"

    # -- effects -------------------------------------------------------------------------------------------------------

    def _see(self, effect: Effect) -> None:
        if isinstance(effect, Load | Unload | Condemn | Dispose):
            return self._on_replica(effect)
        if isinstance(effect, Evict):
            replica = self._scheduler.replicas.get(effect.replica_id)
            is_idle = replica is not None and effect.slot not in replica.leases
            # Within one event a task may have been started on it since; that one waits for the eviction.
            return self._note(f"evict {effect.replica_id} slot {effect.slot}{'' if is_idle else ', now taken'}")
        kind, task_id = type(effect).__name__, effect.task_id
        life = self.lives.get(task_id)
        last = "" if life is None else life.last
        if kind not in NEXT[last]:
            return self.violate(f"{kind} of {task_id[:8]} after {last or 'nothing'}")
        if life is None:
            life = self.lives[task_id] = Life(self._scheduler.tasks[task_id])
        life.last = kind
        match effect:
            case Admitted():
                self.tally.admitted[life.task.pool_id] += 1
                self._note(f"{self.name(life.task)} admitted to {life.task.pool_id} ({task_id[:8]})")
            case Start():
                self._on_start(life.task)
            case Abort():
                self._note(f"{self.name(life.task)} aborted on {life.task.replica_id}")
                self.expect(life.task.state in ENDED, f"{self.name(life.task)} is aborted, but has not ended")
            case Ended():
                self._on_ended(life)
            case Forget():
                self._note(f"{self.name(life.task)} forgotten")
                self.expect(life.task.lease is None, f"{self.name(life.task)} is forgotten, but holds a slot")
                self.past.append(self.lives.pop(task_id))

    def _on_replica(self, effect: Load | Unload | Condemn | Dispose) -> None:
        replica_id, kind = effect.replica_id, type(effect).__name__.lower()
        replica = self._scheduler.replicas.get(replica_id)
        reason = "" if isinstance(effect, Load | Dispose) else f": {effect.reason}"
        self._note(f"{kind} {replica_id}{reason}")
        if replica is None:
            return self.expect(isinstance(effect, Dispose), f"{kind} of {replica_id}, which does not exist")
        match effect:
            case Load():
                # Within one event it may have been told to end again: then its Unload comes next.
                able = (ReplicaState.LOADING, ReplicaState.UNLOADING)
                self.expect(replica.state in able, f"{replica_id} is to be loaded, but {replica.state}")
                self.expect(not self._scheduler.is_draining, f"{replica_id} is to be loaded while the service ends")
            case Unload():
                # What is unloaded at once may be told with the next event's effects; work it has none in any case.
                self.expect(not replica.leases, f"{replica_id} is to be unloaded with work on it")
            case Dispose():
                self.violate(f"{replica_id} is disposed of, but is there")

    def _on_start(self, task: Task) -> None:
        self.tally.started[task.pool_id] += 1
        slots = () if task.lease is None else task.lease.slots
        self._note(f"{self.name(task)} starts on {task.replica_id} slots {','.join(map(str, slots))}")
        pool = task.pool
        key = pool, task.priority
        last = self._last_started.get(key, 0)
        self.expect(
            last < task.number, f"{self.name(task)} starts after task {last} of its priority: not first in, first out"
        )
        self._last_started[key] = max(last, task.number)
        for task_id in pool.queue:
            other = self._scheduler.tasks[task_id]
            self.expect(self._rank(task) < self._rank(other), f"{self.name(task)} overtakes {self.name(other)}")
        if task.is_strict and pool.spec.strict_needs_exclusive and task.replica_id is not None:
            replica = self._scheduler.replicas[task.replica_id]
            self.expect(len(slots) == replica.slots, f"{self.name(task)} is strict, but not alone on {task.replica_id}")

    @staticmethod
    def _rank(task: Task) -> tuple[int, int]:
        return PRIORITIES.index(task.priority), task.number

    def _on_ended(self, life: Life) -> None:
        task = life.task
        code = "" if task.error is None else f" {task.error.code.value}"
        self._note(f"{self.name(task)} {task.state.value}{code}, {task.tokens_out} tokens")
        self.tally.ended[task.pool_id, task.state.value] += 1
        self.expect(task.state in ENDED, f"{self.name(task)} is told to have ended, but is {task.state}")
        self.expect(
            (task.error is None) is (task.state is TaskState.SUCCEEDED),
            f"{self.name(task)} {task.state} with error {task.error!r}",
        )
        if task.error is not None and task.error.code is ErrorCode.INTERNAL:
            self.violate(f"{self.name(task)} met a defect of ours: {task.error.message}")
        if task.deadline_s is not None:
            late_s = self._now() - task.deadline_s
            self.expect(late_s <= DEADLINE_SLACK_S, f"{self.name(task)} ends {late_s:.3f} s after its deadline")
        life.at_end = life.seen_at_end()

    # -- state ---------------------------------------------------------------------------------------------------------

    def _check_leases(self) -> None:
        """Tasks say what they hold and replicas say who holds them, and both say the same."""
        holders: dict[tuple[str, int], str] = {}
        for task in self._scheduler.tasks.values():
            if task.lease is None:
                self.expect(task.state is not TaskState.RUNNING, f"{self.name(task)} runs without a slot")
                continue
            for slot in task.lease.slots:
                key = task.lease.replica_id, slot
                if key in holders:
                    self.violate(f"slot {slot} of {key[0]} is leased twice: to {holders[key]} and {self.name(task)}")
                holders[key] = self.name(task)
        for replica_id, replica in self._scheduler.replicas.items():
            for slot, task_id in replica.leases.items():
                where = f"slot {slot} of {replica_id}"
                self.expect(slot in range(replica.slots), f"{where} does not exist")
                holder = self._scheduler.tasks.get(task_id)
                said = holders.pop((replica_id, slot), None)
                known = None if holder is None else self.name(holder)
                self.expect(said == known and said is not None, f"{where} is held by {known}, and {said} says it does")
            self.expect(
                not replica.leases or replica.state is ReplicaState.READY, f"{replica_id} is {replica.state} and leased"
            )
        for (replica_id, slot), who in holders.items():
            self.violate(f"{who} holds slot {slot} of {replica_id}, which knows nothing of it")

    def _check_queue(self, pool: Pool) -> None:
        pool_id, waiting = pool.spec.pool_id, list(pool.queue)
        self.expect(
            len(waiting) <= pool.queue.capacity,
            f"{len(waiting)} tasks wait in {pool_id}, with {pool.queue.capacity} places",
        )
        queued = {
            task_id
            for task_id, task in self._scheduler.tasks.items()
            if task.state is TaskState.QUEUED and task.pool is pool
        }
        for task_id in queued ^ set(waiting):
            self.violate(f"task {task_id[:8]} of {pool_id} is queued in one place and not in the other")
        if queued == set(waiting):
            ranks = [self._rank(self._scheduler.tasks[task_id]) for task_id in waiting]
            self.expect(ranks == sorted(ranks), f"the queue of {pool_id} is out of order: {ranks}")

    def _check_head(self, pool: Pool) -> None:
        """Who is first, strict or not, waits only while no replica can take it, or for a faster one that is busy. Since
        nobody is overtaken, neither kind keeps the other from its turn."""
        if (head := pool.queue.head()) is None:
            return
        task = self._scheduler.tasks[head]
        exclusive = task.is_strict and pool.spec.strict_needs_exclusive
        ready = [r for r in pool.replicas.values() if r.state is ReplicaState.READY and not r.is_closing]
        ready = [r for r in ready if self._scheduler.fleet.ledger.lost_device(r) is None]
        able = [replica for replica in ready if replica.can_take(exclusive=exclusive)]
        is_held_back = any(replica.leases for replica in ready if replica not in able)
        self.expect(not able or is_held_back, f"{self.name(task)} waits, though {able and able[0].replica_id} is free")

    def check_devices(self) -> None:
        """What workers hold is real; what the ledger has given must be at least possible."""
        for device_id, device in self._scheduler.devices.items():
            used = self._stage.machine.used_bytes(device_id)
            total = device.vram_total_bytes
            self.expect(used <= total, f"{device_id} is oversold: workers hold {used} of {total} bytes")
            if device_id in self._stage.machine.shared:
                continue  # a load that is measured by difference may then count what another program has
            ledger = self._scheduler.fleet.ledger
            held, room = ledger.held_bytes(device_id), ledger.capacity_bytes(device_id)
            if device.backend != "cuda":  # there the ledger has what was measured, others' doings included
                self.expect(held <= room, f"{device_id} is oversold: the ledger gave {held} of {room} bytes")

    # -- the end -------------------------------------------------------------------------------------------------------

    def check_end(self) -> None:
        """Once all clients are done and all engines have let go."""
        for life in self.lives.values():
            self.expect(
                life.last == "Ended",
                f"{self.name(life.task)} has no end: {life.last}, {self.whereabouts(life.task.task_id)}",
            )
            self.expect(life.task.lease is None, f"{self.name(life.task)} still holds a slot")
        for replica in self._scheduler.replicas.values():
            self.expect(not replica.leases, f"{replica.replica_id} is still leased: {replica.leases}")
            if replica.last_error is not None:
                self.expect("unforeseen" not in replica.last_error, f"{replica.replica_id}: {replica.last_error}")
        self.expect(self._scheduler.is_idle, "the scheduler is not idle, though nothing runs or waits")
        self.check()
